"""Checkpoints to ONNX files, each compared with the checkpoint before it gets its name."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from retinanet.boxes import decode_boxes
from retinanet.checkpoint import Checkpoint
from retinanet.config import InputConfig, PostprocessConfig
from retinanet.data.loader import PAD_MULTIPLE
from retinanet.errors import UserError
from retinanet.inference import prepare
from retinanet.model import RetinaNet
from retinanet.onnx.runtime import INPUTS, NMS_OUTPUTS, RAW_OUTPUTS, OnnxHeader
from retinanet.onnx.sessions import PACKAGES, THRESHOLD, import_onnx
from retinanet.onnx.verify import verify_onnx
from retinanet.structures import Predictions

TORCH = (2, 9)  # earlier ones take some of the open sizes for fixed
CANDIDATES = ["nms_boxes", "nms_scores", "nms_labels", "nms_shown", "nms_final"]  # nms_final with clip after_nms only

# The end of a graph with NMS. B images, P planes (a class each, or one for all), C candidates, D <= max_detections.
# Each candidate is in one plane only, so that what survives can be laid out as [B, C] and sorted for all images at once.
SUPPRESSION = """
<ir_version: {ir_version}, opset_import: ["" : {opset}]>
suppression (float[B, C, 4] nms_boxes, float[B, P, C] nms_scores, int64[B, C] nms_labels,
             float[B, C] nms_shown, float[B, C, 4] nms_final)
         => (int64[N] image_index, float[N, 4] boxes, float[N] scores, int64[N] labels)
<float[1] score_threshold = {{{score_threshold!r}}}, float[1] nms_iou = {{{nms_threshold!r}}},
 int64[1] nms_limit = {{{max_detections}}}, int64[1] nms_zero = {{0}}, int64[1] nms_one = {{1}}, int64[2] nms_ends = {{0, 2}}>
{{
    kept = NonMaxSuppression (nms_boxes, nms_scores, nms_limit, nms_iou, score_threshold)
    kept_scores = GatherND (nms_scores, kept)
    places = Gather <axis = 1> (kept, nms_ends)
    shape = Shape (nms_labels)
    nothing = ConstantOfShape (shape)
    survivors = ScatterND (nothing, places, kept_scores)
    width = Shape <start = 1> (nms_labels)
    depth = Min (width, nms_limit)
    best, candidates = TopK <axis = 1> (survivors, depth)
    shown = GatherElements <axis = 1> (nms_shown, candidates)
    visible = Mul (best, shown)
    columns = NonZero (visible)
    found = Transpose <perm = [1, 0]> (columns)
    scores = GatherND (best, found)
    candidate = GatherND (candidates, found)
    row = Gather <axis = 1> (found, nms_zero)
    image_index = Squeeze (row, nms_one)
    column = Unsqueeze (candidate, nms_one)
    place = Concat <axis = 1> (row, column)
    boxes = GatherND (nms_final, place)
    labels = GatherND (nms_labels, place)
}}
"""


def export_onnx(
    checkpoint: Checkpoint, path: Path, *, nms: bool = False, dynamic: bool = False, size: tuple[int, int] | None = None
) -> dict[str, float]:
    """Writes `path` and returns the largest differences between its outputs and the checkpoint's.

    `nms` puts all of the postprocessing into the graph. `dynamic` leaves batch, height and width open; without it the graph
    takes one image of `size`, by default that of a landscape picture as the config resizes it. A file that fails the
    comparison is left as `path`.unverified, and a `UserError` says by how much it fails.
    """
    if nms and checkpoint.config.postprocess.nms == "soft":
        raise UserError("postprocess.nms soft cannot be put into an ONNX graph: export without --nms")
    if dynamic and size is not None:
        raise UserError("a graph has either one size or any: give --size or --dynamic")
    height, width = size or default_size(checkpoint.config.input)
    if min(height, width) < PAD_MULTIPLE or height % PAD_MULTIPLE or width % PAD_MULTIPLE:
        raise UserError(f"the size of a graph must be multiples of {PAD_MULTIPLE}, got {height}x{width}")
    check_exporter()
    postprocess = checkpoint.config.postprocess
    model = prepare(checkpoint.build())
    assert isinstance(model, RetinaNet)
    strides = model.anchor_generator.strides
    header = OnnxHeader(checkpoint.categories, checkpoint.config.input, postprocess, checkpoint.thresholds, nms, strides)
    network = Candidates(model, postprocess) if nms else Raw(model)
    proto = to_proto(network, None if dynamic else (height, width))
    if nms:
        proto = with_nms(proto, postprocess)
    finish(proto, header)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.unverified")
    draft.write_bytes(proto.SerializeToString())
    differences = verify_onnx(draft, checkpoint)
    draft.replace(path)
    return differences


def check_exporter() -> None:
    """Raises `UserError` when something is missing that writing takes. Running a file takes onnxruntime only."""
    import_onnx(*PACKAGES)
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < TORCH:
        least = ".".join(map(str, TORCH))
        raise UserError(
            f"writing ONNX files needs torch {least}, not {torch.__version__}: pip install --upgrade torch torchvision"
        )


def default_size(input: InputConfig) -> tuple[int, int]:
    short, long = (-(-edge // PAD_MULTIPLE) * PAD_MULTIPLE for edge in (input.short_edge, input.long_edge))
    return min(short, long), long


class Raw(nn.Module):
    """The model, without what is no tensor."""

    outputs: ClassVar = RAW_OUTPUTS

    def __init__(self, model: RetinaNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, image_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        predictions = self.model(images, image_sizes)
        return predictions.cls_logits, predictions.box_deltas, predictions.anchors


class Candidates(nn.Module):
    """The model and the postprocessing before NMS, as `Postprocessor` does it but for all images at once: the score
    threshold is left to NMS, and what is no candidate stays, with a score of 0."""

    def __init__(self, model: RetinaNet, config: PostprocessConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.outputs = CANDIDATES if config.clip == "after_nms" else CANDIDATES[:-1]

    def forward(self, images: Tensor, image_sizes: Tensor) -> tuple[Tensor, ...]:
        """`CANDIDATES`: boxes [B, C, 4], scores [B, P, C], labels [B, C], 1 for what may be put out, else 0 [B, C], and the
        boxes [B, C, 4] to put out where those for NMS are not clipped."""
        decoded, scores, labels = self._best(self.model(images, image_sizes))
        limit = image_sizes.flip(1).repeat(1, 2)[:, None].to(decoded.dtype)  # [B, 1, 4]
        clipped = torch.minimum(decoded.clamp(min=0), limit)
        boxes = clipped if self.config.clip == "before_nms" else decoded
        valid = self._valid(boxes) if boxes is clipped else boxes.isfinite().all(dim=-1)
        scores = torch.where(valid, scores, torch.zeros_like(scores))[:, None]  # [B, 1, C]
        if not self.config.class_agnostic:
            classes = torch.arange(self.model.num_classes, device=labels.device)[:, None]
            scores = torch.where(labels[:, None] == classes, scores, torch.zeros_like(scores))  # [B, K, C]
        shown = self._valid(clipped).to(scores.dtype)
        return (boxes, scores, labels, shown) if boxes is clipped else (boxes, scores, labels, shown, clipped)

    def _best(self, predictions: Predictions) -> tuple[Tensor, Tensor, Tensor]:
        """The best (anchor, class) pairs of each level: boxes [B, C, 4], scores [B, C], labels [B, C]."""
        parts = []
        levels = zip(
            predictions.cls_logits.split(predictions.level_sizes, dim=1),
            predictions.box_deltas.split(predictions.level_sizes, dim=1),
            predictions.anchors.split(predictions.level_sizes),
            strict=True,
        )
        for logits, deltas, anchors in levels:
            scores = logits.sigmoid().flatten(1)  # [B, r * K]
            scores = torch.where(scores > 0, scores, torch.zeros_like(scores))  # NaN is no candidate
            scores, order = scores.topk(torch.sym_min(self.config.topk_per_level, scores.shape[1]))
            anchor, label = order // self.model.num_classes, order % self.model.num_classes
            mine = deltas.gather(1, anchor[:, :, None].expand(-1, -1, 4))
            parts.append((decode_boxes(mine, anchors[anchor], clamp_shrinking=self.config.clamp_shrinking), scores, label))
        boxes, scores, labels = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        return boxes, scores, labels

    def _valid(self, boxes: Tensor) -> Tensor:
        if self.config.drop_empty:
            return (boxes[..., 2:] > boxes[..., :2]).all(dim=-1)
        return boxes.isfinite().all(dim=-1)


def to_proto(network: Raw | Candidates, size: tuple[int, int] | None) -> Any:
    """`network` as an ONNX model, for one image of `size`, or for any batch of any multiples of 32."""
    height, width = size or (12 * PAD_MULTIPLE, 20 * PAD_MULTIPLE)  # no level has a side of 1: it would be taken for fixed
    images = torch.zeros(1 if size else 2, 3, height, width, dtype=torch.uint8)
    image_sizes = torch.tensor([[height, width]]).repeat(len(images), 1)
    dim = torch.export.Dim
    batch = dim("batch", min=1, max=1024)
    sides = {2: PAD_MULTIPLE * dim("rows", min=1, max=256), 3: PAD_MULTIPLE * dim("columns", min=1, max=256)}
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            network.eval(),
            (images, image_sizes),
            dynamo=True,
            input_names=INPUTS,
            output_names=network.outputs,
            dynamic_shapes=None if size else ({0: batch, **sides}, {0: batch}),
            optimize=True,
            verbose=False,
        )
    assert program is not None
    return program.model_proto


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's talk with itself: what it makes is compared with the model."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def with_nms(proto: Any, config: PostprocessConfig) -> Any:
    """`proto`, which puts out `CANDIDATES`, with NMS and what follows it."""
    import_onnx("onnx")
    import onnx.compose
    import onnx.parser

    opset = next(entry.version for entry in proto.opset_import if entry.domain == "")
    settings = config.model_dump(include={"max_detections", "nms_threshold", "score_threshold"})
    tail = onnx.parser.parse_model(SUPPRESSION.format(ir_version=proto.ir_version, opset=opset, **settings))
    inner = onnx.compose.add_prefix(proto, "network_", rename_inputs=False, rename_outputs=False)
    pairs = [(name, name) for name in CANDIDATES[:-1]]
    pairs += [("nms_final" if config.clip == "after_nms" else "nms_boxes", "nms_final")]
    whole = onnx.compose.merge_models(inner, tail, io_map=pairs)
    del whole.opset_import[1:]  # merged, it has one of each part
    default = onnx.helper.make_tensor_value_info(THRESHOLD, onnx.TensorProto.FLOAT, [1])
    whole.graph.input.append(default)  # an input that has an initializer may be left out
    return whole


def finish(proto: Any, header: OnnxHeader) -> None:
    """Metadata in, shapes named; the exporter's notes, among them paths of this machine's files, out."""
    import_onnx("onnx")
    import onnx.helper

    for part in (proto, proto.graph, *proto.graph.node, *proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    proto.graph.ClearField("value_info")
    proto.graph.name, proto.producer_name = "retinanet", "retinanet"
    onnx.helper.set_model_props(proto, header.to_metadata())
    axes = {"images": ["batch", "", "height", "width"], "image_sizes": ["batch"], "anchors": ["anchors"]}
    axes |= {"cls_logits": ["batch", "anchors"], "box_deltas": ["batch", "anchors"]}
    axes |= {name: ["detections"] for name in NMS_OUTPUTS}
    for value in (*proto.graph.input, *proto.graph.output):
        for dim, name in zip(value.type.tensor_type.shape.dim, axes.get(value.name, [])):
            if dim.dim_param and name:
                dim.dim_param = name
