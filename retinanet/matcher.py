"""Which anchor learns which box (paper section 4.1, as refined by the code bases that followed it)."""

import torch
from torch import Tensor

from retinanet.boxes import pairwise_coverage, pairwise_iou

BACKGROUND = -1
IGNORE = -2

CROWD_COVERAGE = 0.5  # an anchor with this share inside an ignore region teaches nothing
BOXES_AT_ONCE = 64  # bounds the [N, R] matrix: 64 x 160,000 anchors are 41 MB, with P2 four times as much


class Matcher:
    """Assigns anchors to boxes by IoU.

    IoU >= `foreground_iou` is foreground, < `background_iou` background, between is ignored. With
    `low_quality_matches` the anchors that fit a box best are foreground whatever their IoU, if they touch it at all;
    such an anchor keeps the box *it* overlaps most.
    """

    def __init__(self, *, foreground_iou: float = 0.5, background_iou: float = 0.4, low_quality_matches: bool = True) -> None:
        self.foreground_iou, self.background_iou = foreground_iou, background_iou
        self.low_quality_matches = low_quality_matches

    @torch.no_grad()
    def __call__(self, anchors: Tensor, boxes: Tensor, ignore_boxes: Tensor | None = None) -> Tensor:
        """For each of `anchors` [R, 4] the index of its box in `boxes` [N, 4], or BACKGROUND, or IGNORE: [R] int64."""
        best_iou = anchors.new_zeros(len(anchors))  # [R]
        best_box = torch.full((len(anchors),), BACKGROUND, dtype=torch.int64, device=anchors.device)  # [R]
        low_quality = torch.zeros(len(anchors), dtype=torch.bool, device=anchors.device)  # [R]
        for start in range(0, len(boxes), BOXES_AT_ONCE):
            iou = pairwise_iou(boxes[start : start + BOXES_AT_ONCE], anchors)  # [n, R]
            chunk_iou, chunk_box = iou.max(dim=0)
            better = chunk_iou > best_iou
            best_iou = torch.where(better, chunk_iou, best_iou)
            best_box = torch.where(better, chunk_box + start, best_box)
            if self.low_quality_matches:
                best_of_box = iou.amax(dim=1, keepdim=True)  # [n, 1]
                low_quality |= ((iou == best_of_box) & (best_of_box > 0)).any(dim=0)

        matches = torch.where(best_iou < self.background_iou, BACKGROUND, IGNORE)
        foreground = (best_iou >= self.foreground_iou) | low_quality
        matches = torch.where(foreground, best_box, matches)
        if ignore_boxes is not None and len(ignore_boxes):
            for chunk in ignore_boxes.split(BOXES_AT_ONCE):
                inside = (pairwise_coverage(chunk, anchors) >= CROWD_COVERAGE).any(dim=0)
                matches = torch.where(inside & ~foreground, IGNORE, matches)
        return matches
