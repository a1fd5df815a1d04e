"""Raw predictions to detections: threshold, top-k on each level, decode, clip, NMS (paper section 4.1, "Inference")."""

from collections.abc import Sequence

import torch
from torch import Tensor

from retinanet.boxes import clip_boxes, decode_boxes, pairwise_iou, rescale_boxes
from retinanet.config import PostprocessConfig
from retinanet.structures import Category, Detections, Predictions


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
        categories: Sequence[Category] = (),
    ) -> None:
        self.score_threshold, self.topk_per_level = score_threshold, topk_per_level
        self.nms_threshold, self.nms, self.soft_nms_sigma = nms_threshold, nms, soft_nms_sigma
        self.class_agnostic, self.max_detections = class_agnostic, max_detections
        self.categories = tuple(categories)

    @torch.no_grad()
    def __call__(self, predictions: Predictions, image_sizes: Tensor, original_sizes: Tensor | None = None) -> list[Detections]:
        """Detections of each image. Boxes are clipped to `image_sizes` [B, 2], the (height, width) before padding, and
        given in pixels of `original_sizes` [B, 2] if there are any."""
        found = []
        for image, (height, width) in enumerate(image_sizes.tolist()):
            boxes, scores, labels = self._candidates(predictions, image)
            boxes = clip_boxes(boxes, (height, width))
            kept = self._suppress(boxes, scores, labels)
            boxes, scores, labels = boxes[kept[0]], kept[1], labels[kept[0]]
            if original_sizes is not None:
                boxes = rescale_boxes(boxes, (height, width), tuple(original_sizes[image].tolist()))
            found.append(Detections(boxes, scores, labels, self.categories))
        return found

    def _candidates(self, predictions: Predictions, image: int) -> tuple[Tensor, Tensor, Tensor]:
        """The best (anchor, class) pairs of each level above the threshold: boxes [C, 4], scores [C], labels [C]."""
        parts = []
        num_classes = predictions.cls_logits.shape[-1]
        levels = zip(
            predictions.cls_logits[image].split(predictions.level_sizes),
            predictions.box_deltas[image].split(predictions.level_sizes),
            predictions.anchors.split(predictions.level_sizes),
            strict=True,
        )
        for logits, deltas, anchors in levels:
            scores = logits.float().sigmoid().flatten()  # [r * K]
            candidates = (scores > self.score_threshold).nonzero()[:, 0]  # NaN is not above anything
            scores, order = scores[candidates].topk(min(self.topk_per_level, len(candidates)))
            anchor, label = candidates[order] // num_classes, candidates[order] % num_classes
            parts.append((decode_boxes(deltas[anchor].float(), anchors[anchor]), scores, label))
        boxes, scores, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        return boxes, scores, labels

    def _suppress(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of the kept boxes, best first, and their scores."""
        groups = torch.zeros_like(labels) if self.class_agnostic else labels
        if self.nms == "soft":
            return soft_nms(boxes, scores, groups, self.soft_nms_sigma, self.score_threshold, self.max_detections)
        from torchvision.ops import batched_nms

        keep = batched_nms(boxes, scores, groups, self.nms_threshold)[: self.max_detections]
        return keep, scores[keep]


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
