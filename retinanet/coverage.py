"""How well the anchors reach the boxes of a data set, as training would see them: before an hour is spent on finding out."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from retinanet.anchors import AnchorGenerator, build_anchors
from retinanet.boxes import box_area
from retinanet.config import InputConfig, LossConfig, ModelConfig
from retinanet.data.annotations import Annotations
from retinanet.data.images import known_sizes, resized_size
from retinanet.data.loader import PAD_MULTIPLE

REACHED, LOW_QUALITY, UNREACHED, NOT_TRAINED = 0, 1, 2, -1
AT_ONCE = 1 << 14  # boxes: with 54 anchors each, four numbers an anchor, 14 MB a temporary
SMALL, LARGE = 32**2, 96**2  # COCO's bounds of a medium box, in pixels


@dataclass
class TrainedBoxes:
    """The N boxes that training learns from, at its resolution."""

    boxes: Tensor  # [N, 4]
    image_sizes: Tensor  # [N, 2] int64, (height, width) of the box's image, resized
    rows: np.ndarray  # [N] int64: which annotations they are


@dataclass
class Coverage:
    """What the anchors are to each of A annotations.

    REACHED has an anchor of at least the foreground IoU. LOW_QUALITY has none, but is learnt by its best anchors, which
    are few and fit badly. UNREACHED teaches nothing. NOT_TRAINED are crowds, boxes without area, unreadable images.
    Other boxes are left out of account: where two want the same anchor, the worse one goes without it.
    """

    best_iou: np.ndarray  # [A] float32, nan where not trained
    kind: np.ndarray  # [A] int8
    areas: np.ndarray  # [A] float32, at the training resolution; nan where not trained

    def share(self, kind: int = REACHED) -> float:
        """Of the boxes trained; nan if there are none."""
        trained = self.kind[self.kind != NOT_TRAINED]
        return float(np.mean(trained == kind)) if len(trained) else float("nan")

    def table(self, annotations: Annotations) -> str:
        """A line for each class with boxes and each of COCO's sizes, and one for all."""
        names = [category.name for category in annotations.categories]
        trained = self.kind != NOT_TRAINED
        size = np.digitize(self.areas, [SMALL, LARGE])
        groups = [(name, annotations.labels == label) for label, name in enumerate(names)]
        groups += [(f"({name} in training)", size == n) for n, name in enumerate(("small", "medium", "large"))]
        groups += [("(all)", trained)]
        width = max(len(name) for name, _ in groups)
        lines = [f"{'boxes that anchors reach':<{width}}    boxes  reached  low quality  unreached  median IoU"]
        for name, members in groups:
            kinds, ious = self.kind[members & trained], self.best_iou[members & trained]
            if len(kinds):
                shares = [float(np.mean(kinds == kind)) for kind in (REACHED, LOW_QUALITY, UNREACHED)]
                one, two, three = (f"{share:.1%}" for share in shares)
                lines.append(f"{name:<{width}} {len(kinds):>8} {one:>8} {two:>12} {three:>10} {np.median(ious):>11.2f}")
        return "\n".join(lines)


def anchor_coverage(
    annotations: Annotations, model: ModelConfig, input: InputConfig, loss: LossConfig, *, progress: bool = False
) -> Coverage:
    """The best anchor of each annotation on the grid of its resized image, padded to a multiple of 32 by itself."""
    trained = trained_boxes(annotations, input)
    iou = best_iou(build_anchors(model.anchors), trained.boxes, trained.image_sizes, progress=progress).numpy()
    learnt = LOW_QUALITY if loss.low_quality_matches else UNREACHED
    best, areas = np.full((2, len(annotations.labels)), np.nan, np.float32)
    kind = np.full(len(annotations.labels), NOT_TRAINED, np.int8)
    best[trained.rows], areas[trained.rows] = iou, box_area(trained.boxes).numpy()
    kind[trained.rows] = np.where(iou >= loss.foreground_iou, REACHED, np.where(iou > 0, learnt, UNREACHED))
    return Coverage(best, kind, areas)


def trained_boxes(annotations: Annotations, input: InputConfig) -> TrainedBoxes:
    """Boxes clipped to their image and resized by `input`; without crowds and what has no area."""
    old = known_sizes(annotations, faults=[])  # [I, 2]
    kinds, kind_of = np.unique(old, axis=0, return_inverse=True)
    edges = input.short_edge, input.long_edge, input.size_rounding
    new_of_kind = [resized_size((height, width), *edges) if height > 0 else (0, 0) for height, width in kinds.tolist()]
    new = np.array(new_of_kind, np.int64).reshape(-1, 2)[kind_of.reshape(-1)]  # [I, 2]

    image_of = annotations.image_of
    old_wh, new_wh = (size[image_of][:, [1, 0, 1, 0]] for size in (old, new))  # [A, 4]
    boxes = annotations.coco_boxes.copy()
    boxes[:, 2:] += boxes[:, :2]
    boxes = boxes.clip(0, old_wh).astype(np.float32)
    solid = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    with np.errstate(invalid="ignore"):  # 0 / 0 of an image without a size
        boxes = boxes * new_wh.astype(np.float32) / old_wh.astype(np.float32)  # in the order of the training's resize
    rows = np.flatnonzero(solid & (boxes[:, 2:] > boxes[:, :2]).all(axis=1) & ~annotations.crowd)
    return TrainedBoxes(torch.from_numpy(boxes[rows]), torch.from_numpy(new[image_of[rows]]), rows)


def best_iou(anchors: AnchorGenerator, boxes: Tensor, image_sizes: Tensor, *, progress: bool = False) -> Tensor:
    """The largest IoU of each of `boxes` [N, 4] with any anchor of its image of `image_sizes` [N, 2]: [N]."""
    long = progress and len(boxes) > 10 * AT_ONCE
    starts = tqdm(range(0, len(boxes), AT_ONCE), desc="anchors of boxes", disable=not long, leave=False)
    parts = [_best_iou(anchors, boxes[n : n + AT_ONCE], image_sizes[n : n + AT_ONCE]) for n in starts]
    return torch.cat([boxes.new_zeros(0), *parts])


def _best_iou(anchors: AnchorGenerator, boxes: Tensor, image_sizes: Tensor) -> Tensor:
    """Of anchors of one shape the best lies in the cell nearest to the box's centre, in x and in y apart.

    For the overlap along an axis never grows with the distance of the centres, and IoU only grows with the overlaps.
    """
    centre = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2  # [N, 1, 2]
    stride = image_sizes.new_tensor(anchors.strides)[None, :, None]  # [1, L, 1]
    padded = -(-image_sizes.flip(1)[:, None] // PAD_MULTIPLE) * PAD_MULTIPLE  # [N, 1, 2], (width, height)
    cells = -(-padded // stride)  # [N, L, 2]
    step = padded // cells if anchors.strides_by_grid else stride
    nearest = (centre / step - anchors.offset).round().clamp(min=0).minimum(cells - 1.0)  # [N, L, 2]
    middle = ((nearest + anchors.offset) * step)[:, :, None]  # [N, L, 1, 2]
    shapes = torch.stack([getattr(anchors, f"cell{level}") for level in range(len(anchors.strides))])  # [L, A, 4]
    box = boxes[:, None, None]  # [N, 1, 1, 4]
    corners = middle + shapes[..., :2], middle + shapes[..., 2:]  # each [N, L, A, 2]
    overlap = (torch.minimum(corners[1], box[..., 2:]) - torch.maximum(corners[0], box[..., :2])).clamp(min=0)
    intersection = overlap.prod(dim=-1)  # [N, L, A]
    union = (corners[1] - corners[0]).prod(dim=-1) + box_area(boxes)[:, None, None] - intersection
    return (intersection / union).flatten(1).amax(dim=1)
