"""Which anchor learns which box: by IoU (paper section 4.1, as refined by the code bases that followed it), or ATSS."""

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from retinanet.boxes import by_coordinate, pairwise_coverage, pairwise_iou

BACKGROUND = -1
IGNORE = -2

CROWD_COVERAGE = 0.5  # an anchor with this share inside an ignore region teaches nothing
CACHED = 2**16  # numbers that a core's cache holds several times
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
    def __call__(
        self, anchors: Tensor, boxes: Tensor, ignore_boxes: Tensor | None = None, level_sizes: Sequence[int] = ()
    ) -> Tensor:
        """For each of `anchors` [R, 4] the index of its box in `boxes` [N, 4], or BACKGROUND, or IGNORE: [R] int64.

        `level_sizes`, how many anchors each level has, do not matter here.
        """
        blocks = [by_coordinate(block) for block in anchors.split(_block_size(anchors, boxes))]  # [r, 4] each
        matched = [_Matched.start(block) for block in blocks]
        for start in range(0, len(boxes), BOXES_AT_ONCE):
            chunk = boxes[start : start + BOXES_AT_ONCE]  # [n, 4]
            ious = [pairwise_iou(chunk, block) for block in blocks]  # [n, r] each
            best_of_box = _best_of_box(ious) if self.low_quality_matches else None
            matched = [so_far.update(iou, start, best_of_box) for so_far, iou in zip(matched, ious, strict=True)]
        best_iou, best_box, low_quality = (torch.cat(parts) for parts in zip(*matched, strict=True))
        matches = torch.where(best_iou < self.background_iou, BACKGROUND, IGNORE)
        matches = torch.where((best_iou >= self.foreground_iou) | low_quality, best_box, matches)
        return _ignore_crowds(matches, anchors, ignore_boxes)


class _Matched(NamedTuple):
    """What is known of a block of anchors, [r] each, after some of the boxes."""

    best_iou: Tensor
    best_box: Tensor
    low_quality: Tensor  # which fit a box as well as any anchor

    @classmethod
    def start(cls, anchors: Tensor) -> Self:
        nothing = torch.zeros_like(anchors[:, 0])
        return cls(nothing, nothing.new_full(nothing.shape, BACKGROUND, dtype=torch.int64), nothing > 0)

    def update(self, iou: Tensor, first_box: int, best_of_box: Tensor | None) -> Self:
        """With boxes from number `first_box` on, their `iou` [n, r] and the best that each has, [n, 1], if that matters."""
        best_iou, box = iou.max(dim=0)
        better = best_iou > self.best_iou
        low_quality = self.low_quality
        if best_of_box is not None:  # `==` of [n, r], then `any`, takes ten times as long
            low_quality = low_quality | ((iou - best_of_box).amax(dim=0) == 0)
        best_box = torch.where(better, box + first_box, self.best_box)
        return type(self)(torch.where(better, best_iou, self.best_iou), best_box, low_quality)


def _best_of_box(ious: Sequence[Tensor]) -> Tensor:
    """Of boxes that have `ious` [n, r] with blocks of anchors the best, [n, 1]; infinite for one that touches none."""
    best = torch.stack([iou.amax(dim=1) for iou in ious]).amax(dim=0)[:, None]
    return torch.where(best > 0, best, torch.inf)


def _block_size(anchors: Tensor, boxes: Tensor) -> int:
    """So many anchors at once that on a CPU their [n, r] stay in the cache; on a GPU all of them."""
    at_once = max(1024, CACHED // max(1, min(len(boxes), BOXES_AT_ONCE)))
    return at_once if anchors.device.type == "cpu" else max(1, len(anchors))


class ATSSMatcher:
    """Assigns anchors to boxes by Adaptive Training Sample Selection (Zhang et al. 2020, arXiv 1912.02424, algorithm 1).

    On each level the anchors of the `topk` cells nearest to a box's centre are its candidates. Foreground are those whose
    IoU reaches the candidates' mean plus standard deviation and whose centre lies in the box; an anchor of several boxes
    keeps the one it overlaps most. All others are background: nothing lies between. A box in which no centre lies, one
    smaller than the finest stride, may get no anchor.
    """

    def __init__(self, *, topk: int = 9, anchors_per_cell: int = 9) -> None:
        self.topk, self.anchors_per_cell = topk, anchors_per_cell

    @torch.no_grad()
    def __call__(
        self, anchors: Tensor, boxes: Tensor, ignore_boxes: Tensor | None = None, level_sizes: Sequence[int] = ()
    ) -> Tensor:
        """As `Matcher`, which it can stand in for. Without `level_sizes` all anchors are of one level."""
        centres = (anchors[:, :2] + anchors[:, 2:]) / 2  # [R, 2]
        best_iou = anchors.new_zeros(len(anchors))  # [R]
        matches = torch.full((len(anchors),), BACKGROUND, dtype=torch.int64, device=anchors.device)  # [R]
        for start in range(0, len(boxes), BOXES_AT_ONCE):
            chunk = boxes[start : start + BOXES_AT_ONCE]  # [n, 4]
            candidates = self._candidates(centres, chunk, level_sizes or [len(anchors)])  # [n, C]
            iou = pairwise_iou(chunk, anchors)  # [n, R]
            theirs = iou.gather(1, candidates)  # [n, C]
            enough = theirs.mean(dim=1, keepdim=True) + theirs.std(dim=1, keepdim=True)  # [n, 1]
            at = centres[candidates]  # [n, C, 2]
            inside = ((at > chunk[:, None, :2]) & (at < chunk[:, None, 2:])).all(dim=2)
            chosen = torch.where((theirs >= enough) & inside, theirs, 0)
            chunk_iou, chunk_box = iou.zero_().scatter_(1, candidates, chosen).max(dim=0)
            better = chunk_iou > best_iou
            best_iou = torch.where(better, chunk_iou, best_iou)
            matches = torch.where(better, chunk_box + start, matches)
        return _ignore_crowds(matches, anchors, ignore_boxes)

    def _candidates(self, centres: Tensor, boxes: Tensor, level_sizes: Sequence[int]) -> Tensor:
        """Of each of `boxes` [n, 4] the anchors that are nearest on each level: [n, C]."""
        middle = (boxes[:, :2] + boxes[:, 2:]) / 2  # [n, 2]
        found, first = [], 0
        for level in centres.split(list(level_sizes)):
            distance = (middle[:, None, 0] - level[:, 0]) ** 2 + (middle[:, None, 1] - level[:, 1]) ** 2  # [n, r]
            found.append(distance.topk(min(self.topk * self.anchors_per_cell, len(level)), largest=False).indices + first)
            first += len(level)
        return torch.cat(found, dim=1)


def _ignore_crowds(matches: Tensor, anchors: Tensor, ignore_boxes: Tensor | None) -> Tensor:
    """`matches` [R] with IGNORE for what is not foreground and lies in one of `ignore_boxes` [M, 4]."""
    if ignore_boxes is not None and len(ignore_boxes):
        for chunk in ignore_boxes.split(BOXES_AT_ONCE):
            inside = (pairwise_coverage(chunk, anchors) >= CROWD_COVERAGE).any(dim=0)
            matches = torch.where(inside & (matches < 0), IGNORE, matches)
    return matches
