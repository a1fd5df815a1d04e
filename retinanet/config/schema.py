"""The one schema: defaults, help texts, YAML, command line and the editor's JSON schema all come from these models."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Backbone = Literal[
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"
]
Share = Annotated[float, Field(ge=0, le=1)]


def _named_transform(entry: Any) -> Any:
    if isinstance(entry, dict):
        entry = {name: {} if arguments is None else arguments for name, arguments in entry.items()}  # YAML's `- Name:`
    if isinstance(entry, str) or (isinstance(entry, dict) and all(isinstance(arguments, dict) for arguments in entry.values())):
        return entry
    raise ValueError("expected a transform's name, or 'name: {argument: value}'")


Transform = Annotated[dict[str, dict[str, Any]] | str, BeforeValidator(_named_transform)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, validate_assignment=True)


class AnchorConfig(Section):
    sizes: list[float] = Field([32, 64, 128, 256, 512], description="Sides in pixels by level: P3..P7, or six: P2..P7.")
    scales: list[float] = Field([1.0, 2 ** (1 / 3), 2 ** (2 / 3)], description="Factors on the side; 3 per octave.")
    ratios: list[float] = Field([0.5, 1.0, 2.0], description="Height / width.")
    offset: float = Field(0.5, description="Where in its cell an anchor is centred, as a share of the stride.")
    integer: bool = Field(False, description="Sides cut to whole pixels and corners rounded, as torchvision's are.")
    strides: Literal["fixed", "grid"] = Field(
        "fixed", description="fixed: (4), 8..128. grid: padded image size // grid, as torchvision's; it depends on the padding."
    )

    @model_validator(mode="after")
    def _levels(self) -> Self:
        if len(self.sizes) not in (5, 6) or not self.scales or not self.ratios:
            raise ValueError("sizes needs one number for each of P3..P7 (5) or P2..P7 (6), scales and ratios at least one")
        if min(self.sizes + self.scales + self.ratios) <= 0:
            raise ValueError("sizes, scales and ratios must be positive")
        return self


class ModelConfig(Section):
    num_classes: int | None = Field(None, ge=1, description="Foreground classes; null takes them from the training data.")
    backbone: Backbone = Field("resnet50", description="torchvision's ResNet or ResNeXt.")
    backbone_weights: str = Field(
        "imagenet", description="imagenet (torchvision's V1), imagenet_v2, none, or the path of a state dict."
    )
    norm: Literal["frozen", "batch", "sync", "group"] = Field(
        "frozen", description="Normalisation in the backbone. frozen needs trained weights; group suits random ones."
    )
    norm_eps: float = Field(1e-5, ge=0, description="The backbone's BatchNorm epsilon; it comes with trained weights.")
    stride_in_1x1: bool = Field(False, description="Bottlenecks downsample in their 1x1 convolution (Caffe, detectron2).")
    freeze_stages: int = Field(2, ge=0, le=5, description="Frozen from the input on: 1 is the stem, 2 adds C2, ... 5 all.")
    fpn_channels: int = Field(256, ge=8)
    p6_from: Literal["c5", "p5"] = Field("c5", description="What P6 is convolved from.")
    p7_relu: bool = Field(True, description="P7 is convolved from ReLU(P6), or from P6 itself (mmdet).")
    head_convs: int = Field(4, ge=0, description="3x3 convolutions in each subnet before its output.")
    head_norm: Literal["none", "group"] = Field("none", description="Normalisation after each of them.")
    head_init: Literal["paper", "he"] = Field("paper", description="The subnets start from N(0, 0.01), or He's, for few steps.")
    prior: float = Field(0.01, gt=0, lt=1, description="Foreground probability at the start (paper section 4.1).")
    anchors: AnchorConfig = AnchorConfig()

    @model_validator(mode="after")
    def _groups_fit(self) -> Self:
        if self.head_norm == "group" and (self.fpn_channels % 32 or self.fpn_channels < 64):
            raise ValueError(f"head_norm group has 32 groups: fpn_channels must be 64, 96, 128, ..., not {self.fpn_channels}")
        return self


class InputConfig(Section):
    short_edge: int = Field(800, ge=32, description="Images are resized to this shorter side,")
    long_edge: int = Field(1333, ge=32, description="... unless the longer one would exceed this.")
    size_rounding: Literal["nearest", "floor"] = Field("nearest", description="How the longer side becomes whole pixels.")
    reduced_decode: bool = Field(
        False, description="Training and evaluation decode large JPEGs at 1/2, 1/4 or 1/8: faster, slightly other pixels."
    )
    mean: tuple[float, float, float] = Field((123.675, 116.28, 103.53), description="RGB, on the 0..255 scale.")
    std: tuple[float, float, float] = Field((58.395, 57.12, 57.375), description="RGB, on the 0..255 scale.")


class LossConfig(Section):
    alpha: float | None = Field(0.25, ge=0, le=1, description="Focal loss: weight of the positives; null weighs nothing.")
    gamma: float = Field(2.0, ge=0, description="Focal loss: how much easy examples are down-weighted; 0: cross entropy.")
    box_loss: Literal["l1", "smooth_l1", "focal_l1", "iou", "giou", "diou", "ciou", "eiou", "focal_eiou"] = Field(
        "l1", description="The l1's act on deltas, the others on boxes; docs/losses.md."
    )
    smooth_l1_beta: float = Field(0.1, gt=0, description="Where smooth L1 turns from square to linear.")
    focal_l1_beta: float = Field(0.8, ge=0.3679, le=1, description="How steep focal L1 stays for outliers: 1 not at all.")
    focal_eiou_gamma: float = Field(0.5, ge=0, description="How much Focal-EIoU down-weights boxes that fit badly.")
    box_loss_weight: float = Field(1.0, ge=0)
    matcher: Literal["iou", "atss"] = Field("iou", description="By the IoUs below, or ATSS: by each object's own statistics.")
    atss_topk: int = Field(9, ge=1, description="Cells of a level that are candidates for an object.")
    foreground_iou: float = Field(0.5, gt=0, le=1, description="An anchor with at least this IoU learns its box.")
    background_iou: float = Field(0.4, gt=0, le=1, description="One below this learns background; between is ignored.")
    low_quality_matches: bool = Field(True, description="A box's best anchors are foreground whatever their IoU.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.background_iou > self.foreground_iou:
            raise ValueError("background_iou must not exceed foreground_iou")
        return self


class PostprocessConfig(Section):
    score_threshold: float = Field(0.05, ge=0, lt=1, description="Detections must score more than this.")
    topk_per_level: int = Field(1000, ge=1, description="Best candidates kept on each pyramid level.")
    nms_threshold: float = Field(0.5, ge=0, le=1, description="Of two boxes with a higher IoU the weaker is dropped.")
    nms: Literal["hard", "soft"] = Field("hard", description="soft: Gaussian soft-NMS lowers scores instead of dropping.")
    soft_nms_sigma: float = Field(0.5, gt=0)
    class_agnostic: bool = Field(False, description="Boxes suppress each other across classes: one class per object.")
    max_detections: int = Field(100, ge=1, description="Detections kept in an image.")
    clip: Literal["before_nms", "after_nms"] = Field("before_nms", description="When boxes are cut at the image's border.")
    clamp_shrinking: bool = Field(False, description="Bound how much a box shrinks its anchor too, not only how it grows.")
    drop_empty: bool = Field(True, description="Leave out boxes that have no area inside the image.")


class DatasetConfig(Section):
    format: Literal["auto", "coco", "voc", "yolo", "csv"] = Field("auto", description="auto: told by the files; docs/data.md.")
    path: str = Field(..., description="Folder of the data set, or its JSON, CSV or data.yaml file or list of images itself.")
    annotations: str | None = Field(
        None, description="A JSON or CSV file beside `path`, the folder of its images; voc, yolo: a text file of image names."
    )
    classes: str | None = Field(None, description="yolo, csv: the file with the names of the classes, if it is elsewhere.")
    one_based: bool = Field(False, description="voc: coordinates count from 1; 1 is subtracted from xmin and ymin.")
    part: Literal["train", "val", "test"] | None = Field(None, description="Of a data.yaml; null: what this stands under.")


class DataConfig(Section):
    train: DatasetConfig | None = None
    val: DatasetConfig | None = None
    test: DatasetConfig | None = None
    val_share: float | None = Field(None, gt=0, lt=1, description="Without val: the share of train, by class, held out for it.")
    drop_empty: bool = Field(False, description="Leave images without boxes out of training.")
    group_by_aspect: bool = Field(True, description="Batches hold portrait or landscape images only: less padding.")
    repeat_threshold: float | None = Field(
        None, gt=0, le=1, description="Repeat images of classes that fewer than this share of the images have (LVIS: 0.001)."
    )
    workers: int | None = Field(None, ge=0, description="Loading processes per rank; null chooses from the cores.")
    cache: bool = Field(False, description="Decode training pictures once and keep them in memory, if it is large enough.")
    max_corrupt_share: float = Field(0.01, ge=0, le=1, description="Stop when more of the images read are unreadable.")

    @model_validator(mode="after")
    def _know_their_parts(self) -> Self:
        for name, dataset in (("train", self.train), ("val", self.val), ("test", self.test)):
            if dataset is not None and dataset.part is None:
                dataset.part = name  # type: ignore[assignment]
        return self


class AugmentConfig(Section):
    short_edges: list[int] | None = Field(None, description="Training draws the shorter side from these; null: input's.")
    transforms: list[Transform] = Field(
        [{"HorizontalFlip": {"p": 0.5}}], description="albumentations transforms, in order: a name, or name: {arguments}."
    )
    min_visibility: float = Field(0.1, ge=0, le=1, description="Boxes with a smaller share left after a crop are dropped.")


class TrainConfig(Section):
    batch_size: int = Field(16, ge=1, description="Images in an optimizer step: all ranks and accumulated parts together.")
    reference_batch_size: int | None = Field(
        None, ge=1, description="Batch the learning rate and steps are written for; another batch_size rescales them."
    )
    accumulate_steps: int = Field(1, ge=1, description="Parts that a rank's share of a batch is cut into to save memory.")
    epochs: float | None = Field(None, gt=0, description="Length in passes over the data.")
    max_steps: int | None = Field(None, ge=1, description="Length in optimizer steps. Neither: 8,000 images, 12 to 100 epochs.")
    max_minutes: float | None = Field(None, gt=0, description="Stop, validate and save after this time in any case.")
    patience: int | None = Field(None, ge=1, description="Stop after so many validations in a row without a better AP.")
    init_from: str | None = Field(
        None, description="Start from these weights: a checkpoint, a name of the zoo, imagenet, or a backbone's state dict."
    )
    init_part: Literal["all", "backbone"] = Field(
        "all", description="What of init_from is taken: all, its classes matched by name, or the backbone alone."
    )
    adopt_model: bool = Field(False, description="Settings of the model come from init_from's detector, if it is one.")
    fit_anchors: bool = Field(False, description="Where the heads start fresh, fit anchors that reach too few boxes.")
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = Field(0.01, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD's momentum.")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's.")
    weight_decay: float = Field(1e-4, ge=0)
    decay_norm_and_bias: bool = Field(True, description="false: no weight decay on norms and biases.")
    schedule: Literal["multistep", "cosine"] = "multistep"
    milestones: list[Share] = Field([2 / 3, 8 / 9], description="multistep: where in the run, 0..1, the rate drops to a tenth.")
    warmup_steps: int | None = Field(None, ge=0, description="Linear warm-up; null: 1000, but at most a tenth of the run.")
    warmup_factor: float = Field(0.001, ge=0, le=1, description="The rate at the first step, as a share.")
    clip_grad_norm: float | None = Field(10.0, gt=0, description="Largest gradient norm; null does not clip.")
    ema_decay: float | None = Field(None, gt=0, lt=1, description="Average the weights with this decay; null does not.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="auto: bf16 where the hardware has it.")
    channels_last: bool = Field(True, description="NHWC memory layout: faster convolutions on CPUs and tensor cores.")
    compile: bool = Field(False, description="torch.compile the model.")
    log_every_steps: int = Field(20, ge=1)
    validate_every_steps: int | None = Field(None, ge=1, description="null: once an epoch, at most 20 times in a run.")
    save_every_steps: int | None = Field(None, ge=1, description="Save so often, besides at every validation,")
    save_every_minutes: float | None = Field(15.0, gt=0, description="... and when the last save is so old: what a kill costs.")
    keep_checkpoints: int = Field(2, ge=1, description="last.pt, previous.pt, previous-2.pt ...: so many are kept.")
    max_bad_steps: int = Field(10, ge=0, description="Skipped non-finite steps in a row before training stops.")

    @model_validator(mode="after")
    def _part_of_something(self) -> Self:
        if self.init_part != "all" and self.init_from is None:
            raise ValueError("init_part needs init_from, the weights to take a part of")
        return self


class EvaluationConfig(Section):
    batch_size: int = Field(8, ge=1, description="Images in a forward, on each rank.")
    split: Literal["val", "test", "train"] = Field("val", description="Which part of data is evaluated.")
    engine: Literal["auto", "pycocotools", "faster-coco-eval"] = Field(
        "auto", description="What computes the COCO numbers, which are the same; auto: faster-coco-eval where it is installed."
    )


class Config(Section):
    """Everything a run depends on. Build it with `load_config`."""

    model: ModelConfig = ModelConfig()
    input: InputConfig = InputConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    postprocess: PostprocessConfig = PostprocessConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    output_dir: str | None = Field(None, description="Where a run keeps its files; null: runs/<the config's stem>.")
    seed: int = Field(0, ge=0, description="Of everything random.")

    @model_validator(mode="after")
    def _cached_in_full(self) -> Self:
        if self.data.cache and self.input.reduced_decode:
            raise ValueError("data.cache keeps pictures in full, for all sizes: it does not go with input.reduced_decode")
        return self
