"""Raw predictions to detections: threshold, top-k on each level, decode, clip, NMS (paper section 4.1, "Inference")."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from retinanet.boxes import clip_boxes, decode_boxes, pairwise_iou, rescale_boxes
from retinanet.config import PostprocessConfig
from retinanet.structures import Category, Detections, Predictions
from retinanet.torchvision_import import import_torchvision


class Postprocessor:
    """Turns `Predictions` into `Detections`. The arguments are explained at `retinanet.config.PostprocessConfig`."""

    def __init__(
        self,
        *,
        score_threshold: float = 0.05,
        topk_per_level: int = 1000,
        nms_threshold: float = 0.5,
        nms: str = "hard",
        soft_nms_sigma: float = 0.5,
        class_agnostic: bool = False,
        max_detections: int = 100,
        clip: str = "before_nms",
        clamp_shrinking: bool = False,
        drop_empty: bool = True,
        categories: Sequence[Category] = (),
    ) -> None:
        self.score_threshold, self.topk_per_level = score_threshold, topk_per_level
        self.nms_threshold, self.nms, self.soft_nms_sigma = nms_threshold, nms, soft_nms_sigma
        self.class_agnostic, self.max_detections = class_agnostic, max_detections
        self.clip, self.clamp_shrinking, self.drop_empty = clip, clamp_shrinking, drop_empty
        self.categories = tuple(categories)

    @torch.no_grad()
    def __call__(self, predictions: Predictions, image_sizes: Tensor, original_sizes: Tensor | None = None) -> list[Detections]:
        """Detections of each image. Boxes are clipped to `image_sizes` [B, 2], the (height, width) before padding, and
        given in pixels of `original_sizes` [B, 2] if there are any."""
        originals = image_sizes if original_sizes is None else original_sizes
        sizes = zip(image_sizes.tolist(), originals.tolist(), strict=True)
        return [self._image(predictions, n, tuple(size), tuple(original)) for n, (size, original) in enumerate(sizes)]

    def _image(self, predictions: Predictions, n: int, size: tuple[int, int], original: tuple[int, int]) -> Detections:
        boxes, scores, labels = self._candidates(predictions, n)
        if self.clip == "before_nms":
            boxes = clip_boxes(boxes, size)
            valid = self._valid(boxes)
        else:  # what is empty shows only once it is clipped
            valid = boxes.isfinite().all(dim=1)
        valid = valid.nonzero()[:, 0]
        boxes, scores, labels = (values.index_select(0, valid) for values in (boxes, scores, labels))
        kept, scores = self._suppress(boxes, scores, labels)
        boxes, labels = rescale_boxes(boxes[kept], size, original), labels[kept]
        if self.clip == "after_nms":
            boxes = clip_boxes(boxes, original)
            valid = self._valid(boxes)
            boxes, scores, labels = boxes[valid], scores[valid], labels[valid]
        return Detections(boxes, scores, labels, self.categories)

    def _valid(self, boxes: Tensor) -> Tensor:
        """[C] bool: boxes with an area, or with `drop_empty` off all but NaN, one of which would switch NMS off."""
        if self.drop_empty:
            return (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        return boxes.isfinite().all(dim=1)

    def _candidates(self, predictions: Predictions, image: int) -> tuple[Tensor, Tensor, Tensor]:
        """The best (anchor, class) pairs of each level above the threshold: boxes [C, 4], scores [C], labels [C]."""
        logits, sizes = predictions.cls_logits[image], predictions.level_sizes
        least = _logit(self.score_threshold) - 1e-3  # a little lower: rounding may not cost a candidate
        # Few anchors have any class above the threshold: their best logit tells, without a sigmoid over all [R, K].
        best = logits.amax(dim=1).float()
        rows = (~(best <= least)).nonzero()[:, 0]  # also one with a NaN: its others may do
        rows = rows[self._best(best[rows], rows, sizes)]  # the best pairs are of the anchors with the best best logits
        theirs = logits.index_select(0, rows).float()  # [rows, K]; indexing takes five times as long
        row, label = (theirs > least).nonzero(as_tuple=True)  # NaN is not above anything
        anchor, scores = rows[row], theirs[row, label].sigmoid()
        above = (scores > self.score_threshold).nonzero()[:, 0]
        above = above[self._best(scores[above], anchor[above], sizes)]
        anchor, scores, label = anchor[above], scores[above], label[above]
        deltas = predictions.box_deltas[image].index_select(0, anchor).float()
        boxes = decode_boxes(deltas, predictions.anchors.index_select(0, anchor), clamp_shrinking=self.clamp_shrinking)
        return boxes, scores, label

    def _best(self, values: Tensor, anchors: Tensor, level_sizes: Sequence[int]) -> Tensor:
        """Indices, ascending, of those among the `topk_per_level` largest `values` [N] of their level, and of all NaN.
        `anchors` [N] they belong to, which ascend."""
        ends = torch.tensor(level_sizes, device=anchors.device).cumsum(0)
        bounds = [0, *torch.searchsorted(anchors, ends).tolist()]
        kept = [torch.arange(begin, end, device=anchors.device) for begin, end in pairwise(bounds)]
        for level, some in enumerate(kept):
            if len(some) > self.topk_per_level:
                mine = values[some]
                most = min(len(some), self.topk_per_level + int(mine.isnan().sum()))
                kept[level] = some[mine.topk(most).indices.sort().values]
        return torch.cat(kept)

    def _suppress(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of the kept boxes, best first, and their scores."""
        groups = torch.zeros_like(labels) if self.class_agnostic else labels
        if self.nms == "soft":
            return soft_nms(boxes, scores, groups, self.soft_nms_sigma, self.score_threshold, self.max_detections)
        return hard_nms(boxes, scores, groups, self.nms_threshold, self.max_detections)


def _logit(score: float) -> float:
    return math.log(score / (1 - score)) if score > 0 else -math.inf


def hard_nms(boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float, max_detections: int) -> tuple[Tensor, Tensor]:
    """Greedy NMS within each group. Returns indices and scores, best first, at most `max_detections`.

    What survives among the best n depends on these n alone, so that few of many candidates need be looked at. Groups are
    kept apart by shifting them; in float64, for in float32 the shift would move boxes by rounding.
    """
    nms = import_torchvision().ops.nms
    order = scores.argsort(descending=True, stable=True)
    boxes, groups = boxes.double(), groups.double()
    low, high = (boxes.min(), boxes.max()) if len(boxes) else (0.0, 0.0)
    shifted = (boxes + (groups * (high - low + 1))[:, None])[order]
    tried = 2 * max_detections
    while True:
        kept = nms(shifted[:tried], scores[order[:tried]].double(), iou_threshold)[:max_detections]
        if len(kept) == max_detections or tried >= len(order):
            keep = order[kept]
            return keep, scores[keep]
        tried *= 2


def soft_nms(
    boxes: Tensor, scores: Tensor, groups: Tensor, sigma: float, score_threshold: float, max_detections: int
) -> tuple[Tensor, Tensor]:
    """Gaussian soft-NMS (Bodla et al. 2017): each kept box lowers the others of its group by exp(-IoU^2 / sigma).

    Returns indices and lowered scores, best first, all above `score_threshold`.
    """
    scores = scores.clone()
    keep: list[Tensor] = []
    kept_scores: list[Tensor] = []
    while len(keep) < max_detections and scores.numel():
        score, best = scores.max(dim=0)
        if score <= score_threshold:
            break
        keep.append(best)
        kept_scores.append(score)
        overlap = pairwise_iou(boxes[best][None], boxes)[0]
        scores = torch.where(groups == groups[best], scores * torch.exp(-(overlap**2) / sigma), scores)
        scores[best] = -1
    if not keep:
        return groups.new_zeros(0), scores.new_zeros(0)
    return torch.stack(keep), torch.stack(kept_scores)


def build_postprocessor(config: PostprocessConfig, categories: Sequence[Category]) -> Postprocessor:
    return Postprocessor(**config.model_dump(), categories=categories)
