"""Whether an ONNX file computes what the checkpoint does that it was made from."""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from retinanet.checkpoint import Checkpoint
from retinanet.config import PostprocessConfig
from retinanet.data.loader import PAD_MULTIPLE
from retinanet.errors import UserError
from retinanet.onnx.runtime import Found, OnnxHeader, OnnxModel, Parting, load_onnx
from retinanet.postprocess import build_postprocessor
from retinanet.structures import Detections, Predictions

RAW_TOLERANCE = 1e-3  # of logits and deltas as a share of the largest one above 1, of anchors in pixels
SCORE_TOLERANCE, BOX_TOLERANCE = 1e-3, 0.1  # of detections, boxes in pixels
TIES = 100  # one of so many may lack its like: where two scores, or an IoU and its limit, differ by rounding only
SEEN = 200  # so many pairs of anchor and class, about, pass the threshold that gives NMS something to do


@torch.no_grad()
def verify_onnx(path: Path, checkpoint: Checkpoint) -> dict[str, float]:
    """The largest differences between the file's outputs and the checkpoint's on drawn images: one and several, of two
    sizes where the graph takes them, with and without detections. Raises `UserError` when they are too large."""
    model, other, config = checkpoint.build(), load_onnx(path, "cpu", runtime="onnxruntime"), checkpoint.config
    fixed = checkpoint.categories, config.input, config.postprocess, checkpoint.thresholds
    header = OnnxHeader(*fixed, other.header.nms, model.anchor_generator.strides)
    if header.to_metadata() != other.header.to_metadata():
        raise UserError(f"{path} was not made from this checkpoint: its metadata differ")
    trials = [(model(*trial), *trial) for trial in _trials(other.input_size)]
    if not other.header.nms:
        return _compare_raw(path, [(expected, other(*trial)) for expected, *trial in trials])
    pairs = [pair for trial in trials for pair in _detections(*trial, other, config.postprocess)]
    return _compare_detections(path, pairs)


def _compare_raw(path: Path, pairs: list[tuple[Predictions, Predictions]]) -> dict[str, float]:
    worst = {}
    for name in ("cls_logits", "box_deltas", "anchors"):
        both = [(getattr(expected, name), getattr(found, name)) for expected, found in pairs]
        worst[name] = max(_difference(*values, scaled=name != "anchors") for values in both)
    failed = [f"{name} by {value:.3g}" for name, value in worst.items() if value > RAW_TOLERANCE]
    if failed:
        raise UserError(f"{path} does not compute what the checkpoint does: it differs in {', '.join(failed)}")
    return worst


def _difference(expected: Tensor, found: Tensor, *, scaled: bool) -> float:
    if expected.shape != found.shape:
        return float("inf")
    largest = (expected - found).abs().max().nan_to_num(nan=float("inf"), posinf=float("inf"))
    return float(largest / expected.abs().max().clamp(min=1) if scaled else largest)


def _detections(
    predictions: Predictions, images: Tensor, image_sizes: Tensor, other: OnnxModel, config: PostprocessConfig
) -> Iterator[tuple[Detections, Detections]]:
    """The checkpoint's detections in each image and the file's, at several thresholds: the file's own, one that lets
    through enough to suppress, and one above all scores of an image."""
    ours, theirs = build_postprocessor(config, ()), Parting(())
    scores = predictions.cls_logits.sigmoid().flatten(1)  # [B, R * K]
    best = scores.amax(dim=1).sort().values
    ranked = scores.flatten().topk(min(SEEN * 3 // 2, scores.numel())).values
    ranked = ranked[len(ranked) // 3 :]  # the threshold comes into the widest gap: no score may lie beside it
    gap = int((ranked[:-1] - ranked[1:]).argmax())
    for threshold in (None, float(ranked[gap : gap + 2].mean()), float(best[:2].mean())):
        ours.score_threshold = config.score_threshold if threshold is None else threshold
        other.score_threshold = threshold
        found = other(images, image_sizes)
        assert isinstance(found, Found)
        yield from zip(ours(predictions, image_sizes), theirs(found, image_sizes), strict=True)


def _compare_detections(path: Path, pairs: list[tuple[Detections, Detections]]) -> dict[str, float]:
    rows = torch.cat([nearest(*order) for pair in pairs for order in (pair, pair[::-1])])  # [2 * D, 2]
    if not len(rows):
        raise UserError(f"{path} cannot be compared: the checkpoint finds nothing in any image, whatever the threshold")
    like = (rows <= torch.tensor([SCORE_TOLERANCE, BOX_TOLERANCE])).all(dim=1)
    alone = rows[~like]
    if len(alone) > len(rows) // TIES:
        score, box = alone.amax(dim=0).tolist()
        raise UserError(
            f"{path} does not compute what the checkpoint does: {len(alone)} of {len(rows)} detections have no like, "
            f"the nearest differ by up to {score:.3g} in score and {box:.3g} pixels"
        )
    score, box = rows[like].amax(dim=0).tolist()
    return {"scores": score, "boxes": box}


def nearest(one: Detections, other: Detections) -> Tensor:
    """How far each of `one` is from the nearest of `other` with its label: score and box coordinate, [D, 2]."""
    if not len(other):
        return torch.full((len(one), 2), float("inf"))
    apart = torch.stack(
        [
            (one.scores[:, None] - other.scores).abs() / SCORE_TOLERANCE,
            (one.boxes[:, None] - other.boxes).abs().amax(dim=-1) / BOX_TOLERANCE,
        ],
        dim=-1,
    )  # [D, E, 2]
    apart[one.labels[:, None] != other.labels] = float("inf")
    best = apart.amax(dim=-1).argmin(dim=1)
    return apart[torch.arange(len(one)), best] * torch.tensor([SCORE_TOLERANCE, BOX_TOLERANCE])


def _trials(size: tuple[int, int] | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of images and their sizes, the same each time."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, *size)] if size else [(1, 4 * PAD_MULTIPLE, 6 * PAD_MULTIPLE), (3, 8 * PAD_MULTIPLE, 5 * PAD_MULTIPLE)]
    for batch, height, width in shapes:
        blocks = torch.rand(batch, 3, -(-height // 16), -(-width // 16), generator=generator)
        noise = torch.rand(batch, 3, height, width, generator=generator)
        images = 0.8 * F.interpolate(blocks, scale_factor=16.0)[:, :, :height, :width] + 0.2 * noise
        contrast = torch.linspace(1, 0.2, batch).view(-1, 1, 1, 1)  # so that the images' best scores differ
        padding = torch.tensor([[n * height // 8, n * width // 16] for n in range(batch)])
        yield (255 * contrast * images).to(torch.uint8), torch.tensor([height, width]) - padding
