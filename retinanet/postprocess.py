"""Raw predictions to detections: threshold, top-k on each level, decode, clip, NMS (paper section 4.1, "Inference")."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from retinanet.boxes import clip_boxes, decode_boxes, pairwise_iou, rescale_boxes
from retinanet.config import PostprocessConfig
from retinanet.structures import Category, Detections, Predictions

FIRST_TRIED = 1024  # candidates that NMS sees at first


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
        boxes, scores, labels = boxes[valid], scores[valid], labels[valid]
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
        parts = []
        least = _logit(self.score_threshold) - 1e-3  # a little lower: rounding may not cost a candidate
        levels = zip(
            predictions.cls_logits[image].split(predictions.level_sizes),
            predictions.box_deltas[image].split(predictions.level_sizes),
            predictions.anchors.split(predictions.level_sizes),
            strict=True,
        )
        for logits, deltas, anchors in levels:
            # Few anchors have any class above the threshold: their best logit tells, without a sigmoid over all [r, K].
            best = logits.amax(dim=1).float()
            rows = (~(best <= least)).nonzero()[:, 0]  # also one with a NaN: its others may do
            if len(rows) > self.topk_per_level:  # the best pairs are of the anchors with the best best logits
                best = best[rows]
                most = self.topk_per_level + int(best.isnan().sum())
                rows = rows[best.topk(min(most, len(rows))).indices.sort().values]
            theirs = logits.index_select(0, rows).float()  # [rows, K]; indexing takes five times as long
            row, label = (theirs > least).nonzero(as_tuple=True)  # NaN is not above anything
            scores = theirs[row, label].sigmoid()
            above = int((scores > self.score_threshold).sum())
            scores, order = scores.topk(min(self.topk_per_level, above))
            anchor, label = rows[row[order]], label[order]
            boxes = decode_boxes(deltas[anchor].float(), anchors[anchor], clamp_shrinking=self.clamp_shrinking)
            parts.append((boxes, scores, label))
        boxes, scores, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        return boxes, scores, labels

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

    What survives among the best n depends on these n alone, so that most images need no more than the first thousand
    candidates. Groups are kept apart by shifting them; in float64, for in float32 the shift would move boxes by rounding.
    """
    from torchvision.ops import nms

    order = scores.argsort(descending=True, stable=True)
    boxes, groups = boxes.double(), groups.double()
    low, high = (boxes.min(), boxes.max()) if len(boxes) else (0.0, 0.0)
    shifted = (boxes + (groups * (high - low + 1))[:, None])[order]
    tried = FIRST_TRIED
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
