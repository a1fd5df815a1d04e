"""Large pictures in overlapping tiles, and what was found in them put together without seams."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from retinanet.boxes import box_area, pairwise_coverage, pairwise_iou
from retinanet.errors import UserError
from retinanet.structures import Detections

Region = tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels of the picture
COVERED = 0.5  # a fragment that lies at least so far in a whole object is a part of it
SLACK_PIXELS, SLACK_SHARE = 4.0, 0.1  # how far off a side of a box may be: pixels, or of the box


@dataclass(frozen=True)
class Tiling:
    """Tiles of `tile` pixels a side that share at least `overlap` of it with their neighbours."""

    tile: int
    overlap: float = 0.2

    def __post_init__(self) -> None:
        if self.tile < 32:
            raise UserError(f"a tile must have at least 32 pixels a side, got {self.tile}")
        if not 0 <= self.overlap <= 0.9:
            raise UserError(f"the overlap of tiles is a share of their side, 0..0.9, got {self.overlap:g}")

    def regions(self, size: tuple[int, int]) -> list[Region]:
        """The tiles of a picture of `size` (height, width), row by row, evenly spread. A picture larger than one tile comes
        first as a whole, for the objects that fit into no tile."""
        rows, columns = map(self._spans, size)
        tiles = [(x1, y1, x2, y2) for y1, y2 in rows for x1, x2 in columns]
        return [(0, 0, size[1], size[0]), *tiles] if len(tiles) > 1 else tiles

    def _spans(self, side: int) -> list[tuple[int, int]]:
        step = max(1, int(self.tile * (1 - self.overlap)))
        over = max(0, side - self.tile)
        gaps = -(-over // step)
        starts = [n * over // max(gaps, 1) for n in range(gaps + 1)]
        return [(start, min(start + self.tile, side)) for start in starts]

    def merge(
        self, found: Sequence[Detections], size: tuple[int, int], *, nms_threshold: float, class_agnostic: bool = False
    ) -> Detections:
        """A picture's detections from those of its `regions`, in the same order, all in pixels of the picture.

        What the whole picture shows no larger than the overlap is left out: some tile has it whole, and larger. Whole
        objects suppress each other as in NMS, but only across regions: a region's own NMS has judged the rest. A fragment,
        ending at a seam, gives way to a whole object that covers half of it, unless that scores less than half as much.
        Fragments of an object that is whole nowhere become one box.
        """
        regions = torch.tensor(self.regions(size))
        boxes, scores, labels = (torch.cat([getattr(part, name) for part in found]) for name in ("boxes", "scores", "labels"))
        source = torch.cat([torch.full((len(part),), n) for n, part in enumerate(found)])  # [D], of `regions`
        groups = torch.zeros_like(labels) if class_agnostic else labels
        cut = touches_seam(boxes, regions[source], size)
        order = scores.argsort(descending=True, stable=True)
        grown = boxes + _slack(boxes) * boxes.new_tensor([-1, -1, 1, 1])  # a fragment may be a thin strip at its border

        small = (boxes[:, 2:] - boxes[:, :2]).amax(dim=1) <= self.tile * self.overlap
        gone = small & (source == 0) & (len(found) > 1)
        for n in order[~cut[order]].tolist():
            if not gone[n]:
                rival = (groups == groups[n]) & (source != source[n])
                same = ~cut & (pairwise_iou(boxes[n, None], boxes)[0] > nms_threshold)
                part = cut & (pairwise_coverage(grown[n, None], boxes)[0] >= COVERED) & (scores[n] >= 0.5 * scores)
                gone |= rival & (same | part)
        fragments = order[(cut & ~gone)[order]]
        boxes[fragments], gone[fragments] = _join(boxes[fragments], groups[fragments], regions[source[fragments]])
        keep = order[~gone[order]]
        return Detections(boxes[keep], scores[keep], labels[keep], found[0].categories)


def touches_seam(boxes: Tensor, regions: Tensor, size: tuple[int, int]) -> Tensor:
    """[D] bool: boxes [D, 4] that end at a border of their regions [D, 4] which is none of the picture's: they may go on."""
    inner = regions != torch.tensor([0, 0, size[1], size[0]])
    return (((boxes - regions).abs() <= _slack(boxes)) & inner).any(dim=1)


def _slack(boxes: Tensor) -> Tensor:
    return (SLACK_SHARE * (boxes[:, 2:] - boxes[:, :2])).clamp(min=SLACK_PIXELS).repeat(1, 2)  # [D, 4]


def _join(boxes: Tensor, groups: Tensor, regions: Tensor) -> tuple[Tensor, Tensor]:
    """Fragments [F, 4], best first, as boxes in which an object's first fragment spans all of them, and [F] bool: the rest."""
    joined, rest = boxes.clone(), torch.zeros(len(boxes), dtype=torch.bool)
    for n in range(len(boxes)):
        if rest[n]:
            continue
        members = [n]
        for m in members:  # grows: a fragment of a fragment's neighbour belongs to it too
            more = (groups == groups[n]) & ~rest & _agree(boxes[m], boxes, regions[m], regions)
            more[: n + 1] = False
            rest |= more
            members += more.nonzero()[:, 0].tolist()
        joined[n] = torch.cat([boxes[members, :2].amin(dim=0), boxes[members, 2:].amax(dim=0)])
    return joined, rest


def _agree(box: Tensor, boxes: Tensor, region: Tensor, regions: Tensor) -> Tensor:
    """[F] bool: the box [4] and each of `boxes` [F, 4] look alike, IoU of a half, where their two regions overlap."""
    shared = _common(region, regions)
    one, others = _common(box, shared), _common(boxes, shared)
    common = box_area(_common(one, others))
    alike = common >= 0.5 * (box_area(one) + box_area(others) - common)
    return alike & (common > 0) & (region != regions).any(dim=1)  # those of one tile are two objects


def _common(one: Tensor, others: Tensor) -> Tensor:
    """[F, 4]: what `one` [4] or [F, 4] and each of `others` [F, 4] have in common; no area where nothing."""
    return torch.cat([torch.maximum(one[..., :2], others[:, :2]), torch.minimum(one[..., 2:], others[:, 2:])], dim=1)
