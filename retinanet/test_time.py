"""Test-time augmentation: a picture looked at mirrored and at several sizes, and what was found fused."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from retinanet.boxes import pairwise_iou
from retinanet.structures import Detections

SCALES = (0.75, 1.0, 1.25)  # of the input's edges
FUSE_IOU = 0.55  # the paper's


class Look(NamedTuple):
    """One way of looking at a picture."""

    scale: float = 1.0
    mirrored: bool = False


PLAIN = (Look(),)
AUGMENTED = tuple(Look(scale, mirrored) for scale in SCALES for mirrored in (False, True))


def mirror_boxes(boxes: Tensor, width: int) -> Tensor:
    """Boxes [D, 4] of a picture mirrored left to right, in the picture itself, and the other way round."""
    return torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)


def fuse(found: Sequence[Detections], *, max_detections: int = 100, class_agnostic: bool = False) -> Detections:
    """Weighted boxes fusion (Solovyev et al. 2021) of what several looks at one picture found, best first.

    Boxes of a class that overlap become their mean, weighted by score. Its score is the mean of theirs, times the share of
    the looks that saw it: what only one of six saw scores a sixth.
    """
    boxes, scores, labels = (torch.cat([getattr(part, name) for part in found]) for name in ("boxes", "scores", "labels"))
    order = scores.argsort(descending=True, stable=True)
    fused, fused_labels = torch.zeros_like(boxes), torch.zeros_like(labels)  # the first `used` are clusters
    weights, counts = torch.zeros_like(scores), torch.zeros_like(scores)
    used = 0
    for n in order.tolist():
        overlap = pairwise_iou(boxes[n, None], fused[:used])[0]
        if not class_agnostic:
            overlap = overlap * (fused_labels[:used] == labels[n])
        cluster = int(overlap.argmax()) if used and overlap.max() > FUSE_IOU else used
        if cluster == used:
            fused_labels[used], used = labels[n], used + 1
        weights[cluster] += scores[n]
        counts[cluster] += 1
        fused[cluster] += (boxes[n] - fused[cluster]) * (scores[n] / weights[cluster].clamp(min=1e-12))
    merged = weights[:used] / counts[:used] * (counts[:used] / len(found)).clamp(max=1)
    best = merged.argsort(descending=True, stable=True)[:max_detections]
    return Detections(fused[best], merged[best], fused_labels[best], found[0].categories)
