"""Our detector in torchvision's clothes: the calls of its detection models, which many other programs make."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retinanet.checkpoint import Checkpoint
from retinanet.config import InputConfig, LossConfig, PostprocessConfig
from retinanet.criterion import build_criterion
from retinanet.data.images import resized_size
from retinanet.data.loader import PAD_MULTIPLE
from retinanet.distributed import sum_over_ranks, world_size
from retinanet.errors import UserError
from retinanet.model import RetinaNet
from retinanet.postprocess import build_postprocessor
from retinanet.structures import Category, Target, shortened
from retinanet.weights.zoo import load_weights

MODEL = "model."  # where the detector is in this module; its state dict goes without it


class Sides:
    """What images are resized to, under torchvision's names: tools set `model.transform.min_size`.

    Of several `min_size` training draws one for each image, evaluation takes the last.
    """

    def __init__(self, min_size: tuple[float, ...], max_size: float, rounding: str = "nearest") -> None:
        self.min_size, self.max_size, self.rounding = min_size, max_size, rounding

    def choose(self, size: tuple[int, int], *, draw: bool) -> tuple[int, int]:
        """The (height, width) that an image of `size` gets."""
        chosen = int(torch.randint(len(self.min_size), ())) if draw and len(self.min_size) > 1 else -1
        return resized_size(size, self.min_size[chosen], self.max_size, self.rounding)  # type: ignore[arg-type]


class TorchvisionDetector(nn.Module):
    """A `RetinaNet` that is called as torchvision's detectors are.

    `model(images)` in eval mode: `[{"boxes" [D, 4], "scores" [D], "labels" [D]}, ...]`, in pixels of the images given.
    `model(images, targets)` in training mode: `{"classification", "bbox_regression"}`, of which the sum is to be
    back-propagated; they are divided by the foreground of the whole batch, that of other ranks included.

    `images` are RGB tensors [3, H, W], float in 0..1, of any sizes. `targets` are dicts of `boxes` [N, 4] (xyxy, in pixels
    of the image), `labels` [N] and, if there are crowds, `iscrowd` [N]: those teach neither object nor background.

    Labels, in and out, are the ids of `categories`, which are the data set's own: COCO's run from 1 to 90 with gaps. None
    stands for the background. Mean and standard deviation are the model's; of `input` only the sides are used. The state
    dict is that of `model`. Raises `UserError` for images and targets that are not as above.
    """

    category_ids: Tensor

    def __init__(
        self,
        model: RetinaNet,
        categories: Sequence[Category],
        *,
        input: InputConfig | None = None,
        loss: LossConfig | None = None,
        postprocess: PostprocessConfig | None = None,
    ) -> None:
        super().__init__()
        if len(categories) != model.num_classes:
            raise UserError(f"the model has {model.num_classes} classes, but {len(categories)} categories are given")
        input = input or InputConfig()
        self.model = model
        self.categories = tuple(categories)
        self.transform = Sides((input.short_edge,), input.long_edge, input.size_rounding)
        self._criterion = build_criterion(loss or LossConfig(), model.anchor_generator.num_anchors)
        self._postprocess = build_postprocessor(postprocess or PostprocessConfig(), self.categories)
        self.register_buffer("category_ids", torch.tensor([c.id for c in categories]), persistent=False)  # [K]
        self.register_load_state_dict_pre_hook(_find_model)
        self.train(model.training)

    @classmethod
    def from_checkpoint(cls, source: Checkpoint | str | Path) -> "TorchvisionDetector":
        """From a checkpoint, its path, or a name of the zoo; in eval mode, with the averaged weights if there are any."""
        checkpoint = source if isinstance(source, Checkpoint) else load_weights(source)
        config = checkpoint.config
        return cls(
            checkpoint.build(),
            checkpoint.categories,
            input=config.input,
            loss=config.loss,
            postprocess=config.postprocess,
        )

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.state_dict(*args, **kwargs)

    def forward(self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]] | None = None) -> Any:
        images = [self._checked(n, image) for n, image in enumerate(images)]
        if not images:
            raise UserError("there are no images")
        if self.training and (targets is None or len(targets) != len(images)):
            given = "none" if targets is None else str(len(targets))
            raise UserError(f"training needs a target for each image: {len(images)} images, but {given}")
        originals = [(image.shape[-2], image.shape[-1]) for image in images]
        sizes = [self.transform.choose(size, draw=self.training) for size in originals]
        batch, image_sizes = self._batch(images, sizes), torch.tensor(sizes)
        if self.training:
            assert targets is not None
            pairs = zip(targets, originals, sizes, strict=True)
            return self._losses(batch, image_sizes, [self._target(n, *pair) for n, pair in enumerate(pairs)])
        found = self._postprocess(self.model(batch, image_sizes), image_sizes, torch.tensor(originals))
        return [{"boxes": d.boxes, "scores": d.scores, "labels": self.category_ids[d.labels]} for d in found]

    def _losses(self, batch: Tensor, image_sizes: Tensor, targets: list[Target]) -> dict[str, Tensor]:
        sums = self._criterion.sums(self.model(batch, image_sizes), targets)
        foreground = sum_over_ranks(sums.num_foreground.clone()).clamp(min=1)
        normalizer = foreground / world_size()  # DDP averages the gradients over the ranks
        return {"classification": sums.loss_cls / normalizer, "bbox_regression": sums.loss_box / normalizer}

    def _checked(self, n: int, image: Tensor) -> Tensor:
        """The image in the model's number format, on its device."""
        if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != 3 or not image.numel():
            given = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise UserError(f"images[{n}] must be a tensor [3, height, width], got {given}")
        if not image.is_floating_point():
            raise UserError(f"images[{n}] must be of a float type, in 0..1, got {image.dtype}")
        return image.to(self.model.mean)

    def _batch(self, images: Sequence[Tensor], sizes: list[tuple[int, int]]) -> Tensor:
        """Images resized, padded to one size and on the 0..255 scale: [B, 3, H, W]."""
        height, width = (-(-max(sides) // PAD_MULTIPLE) * PAD_MULTIPLE for sides in zip(*sizes, strict=True))
        batch = images[0].new_zeros(len(images), 3, height, width)
        for n, (image, size) in enumerate(zip(images, sizes, strict=True)):
            if image.shape[-2:] != size:
                image = F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]  # noqa: PLW2901
            batch[n, :, : size[0], : size[1]] = image
        low, high = torch.stack(batch.detach().aminmax()).tolist()
        if not (low >= -0.5 and high <= 1.5):  # augmentation overshoots a little; NaN is in no range
            raise UserError(f"images must lie in 0..1, not yet normalised, got {low:g}..{high:g}")
        return batch * 255

    def _target(self, n: int, given: Mapping[str, Tensor], old: tuple[int, int], new: tuple[int, int]) -> Target:
        """The truth of an image of size `old` that has become `new`."""
        boxes, labels, crowd = (value.to(self.category_ids.device) for value in checked_target(n, given))
        new_side, old_side = (boxes.new_tensor([side[1], side[0]] * 2) for side in (new, old))
        boxes = boxes * new_side / old_side  # in this order a box at the border stays at it
        solid = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        known = labels[:, None] == self.category_ids  # [N, K]
        unknown = labels[~crowd & ~known.any(dim=1)]
        if len(unknown):
            ids = shortened([str(category.id) for category in self.categories])
            raise UserError(f"targets[{n}] has label {int(unknown[0])}, but labels are the classes' ids, here {ids}")
        return Target(boxes[solid & ~crowd], known.int().argmax(dim=1)[solid & ~crowd], boxes[solid & crowd])


def checked_target(n: int, target: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes [N, 4] float32, labels [N] and crowds [N] bool of target number `n`. Raises `UserError`."""
    if not isinstance(target, Mapping):
        raise UserError(f"targets[{n}] must be a dict of boxes and labels, got {type(target).__name__}")
    for key in ("boxes", "labels"):
        if not isinstance(target.get(key), Tensor):
            raise UserError(f"targets[{n}]['{key}'] must be a tensor, got {type(target.get(key)).__name__}")
    boxes, labels = target["boxes"], target["labels"]
    crowd = target.get("iscrowd", torch.zeros_like(labels))
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise UserError(f"targets[{n}]['boxes'] must be [N, 4], for an image without boxes [0, 4], got {list(boxes.shape)}")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise UserError(f"targets[{n}]['labels'] must be whole numbers (int64), got {labels.dtype}")
    for key, value in (("labels", labels), ("iscrowd", crowd)):
        if value.shape != boxes.shape[:1]:
            raise UserError(f"targets[{n}] has {len(boxes)} boxes, but '{key}' is {list(value.shape)}")
    boxes = boxes.detach().float()
    faulty = ~(boxes.isfinite().all(dim=1) & (boxes[:, 2:] > boxes[:, :2]).all(dim=1))
    if faulty.any():
        raise UserError(f"targets[{n}] has the box {boxes[faulty][0].tolist()}, which has no area: x1, y1, x2, y2 are wanted")
    return boxes, labels, crowd.bool()


def _find_model(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before loading: the keys, which are those of the inner detector, are put where it is."""
    for key in [key for key in state if key.startswith(prefix) and not key.startswith(prefix + MODEL)]:
        state[prefix + MODEL + key.removeprefix(prefix)] = state.pop(key)
