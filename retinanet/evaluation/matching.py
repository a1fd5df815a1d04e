"""Which detection found which box: COCO's greedy matching at one IoU, as arrays."""

from typing import NamedTuple

import numpy as np

NONE, BEYOND = -1, -2  # in place of a box: found none; not looked at, the image has enough better ones
BLOCK = 1_000_000  # pairs whose overlap is worked out at a time: some 100 MB


class Pairs(NamedTuple):
    """Detections and boxes of the same image that overlap."""

    detection: np.ndarray  # [P] indices
    box: np.ndarray  # [P] indices
    iou: np.ndarray  # [P]; of a crowd the share of the detection inside


def match(
    boxes: np.ndarray,
    scores: np.ndarray,
    images: np.ndarray,
    truth_boxes: np.ndarray,
    truth_images: np.ndarray,
    crowd: np.ndarray,
    ignored: np.ndarray,
    *,
    iou: float = 0.5,
    max_detections: int = 100,
) -> np.ndarray:
    """The box that each detection found, [D] int64: an index into the truth, `NONE` or `BEYOND`.

    `boxes` [D, 4] and `truth_boxes` [N, 4] are [x, y, width, height]; `images` [D] and `truth_images` [N] say what belongs
    together; the rest as in `assign`.
    """
    pairs = find_pairs(boxes, images, truth_boxes, truth_images, crowd, min(iou, 1 - 1e-10))
    return assign(pairs, ranks(scores, images), crowd, ignored, iou, max_detections)


def ranks(scores: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """How many of its group come before each detection, [D] int64: the best score first, of equal ones the first."""
    order = np.lexsort((-scores, groups))
    result = np.empty(len(order), np.int64)
    result[order] = np.arange(len(order)) - np.searchsorted(groups[order], groups[order])
    return result


def assign(
    pairs: Pairs, rank: np.ndarray, crowd: np.ndarray, ignored: np.ndarray, iou: float, max_detections: int = 100
) -> np.ndarray:
    """As `match`, among `pairs`.

    As in COCOeval detections choose one after the other, the first in `rank` [D] first, among the boxes not taken that
    overlap by `iou`: those not `ignored` before those that are, the larger overlap first. A crowd is never taken.
    `ignored` [N] bool are the boxes that need not be found, among them `crowd` [N].
    """
    found = np.where(rank < max_detections, NONE, BEYOND)
    near = (pairs.iou >= min(iou, 1 - 1e-10)) & (rank[pairs.detection] < max_detections)
    detection, box, overlap = (column[near] for column in pairs)
    best_first = np.lexsort((-box, -overlap, ignored[box], rank[detection]))  # COCOeval takes the last of equal boxes
    taken = np.zeros(len(crowd), bool)
    for chooser, choice in zip(detection[best_first].tolist(), box[best_first].tolist(), strict=True):
        if found[chooser] == NONE and not taken[choice]:
            found[chooser] = choice
            taken[choice] = not crowd[choice]
    return found


def judge(found: np.ndarray, ignored: np.ndarray, outside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which detections are right, and which count at all (right or wrong), [D] bool each, given what `assign` says.

    COCOeval counts neither what found an `ignored` box [N], nor what found none and is of a size not looked at, `outside` [D].
    """
    hits = found >= 0
    hits[hits] = ~ignored[found[hits]]
    return hits, hits | ((found == NONE) & ~outside)


def find_pairs(
    boxes: np.ndarray, images: np.ndarray, truth_boxes: np.ndarray, truth_images: np.ndarray, crowd: np.ndarray, least: float
) -> Pairs:
    """Every detection and box of the same image whose overlap is `least` or more."""
    by_image = np.argsort(truth_images, kind="stable")
    begin, end = (np.searchsorted(truth_images[by_image], images, side) for side in ("left", "right"))
    ends = np.cumsum(end - begin)  # of the pairs of each detection
    cuts = np.searchsorted(ends, np.arange(BLOCK, ends[-1] if len(ends) else 0, BLOCK))
    parts = []
    for part in np.split(np.arange(len(images)), cuts):
        number = (end - begin)[part]
        detection, first = np.repeat(part, number), np.cumsum(number) - number
        box = by_image[np.arange(len(detection)) + np.repeat(begin[part] - first, number)]
        overlap = _overlaps(boxes[detection], truth_boxes[box], crowd[box])
        near = overlap >= least
        parts.append((detection[near], box[near], overlap[near]))
    return Pairs(*map(np.concatenate, zip(*parts)))


def _overlaps(boxes: np.ndarray, truth: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """IoU [P] of each pair, of crowds the share of the detection inside: to the last bit as in pycocotools' bbIou."""
    begin = np.maximum(boxes[:, :2], truth[:, :2])
    shared = (np.minimum(boxes[:, :2] + boxes[:, 2:], truth[:, :2] + truth[:, 2:]) - begin).clip(0).prod(axis=1)
    area = boxes[:, 2] * boxes[:, 3]
    union = np.where(crowd, area, area + truth[:, 2] * truth[:, 3] - shared)
    return np.divide(shared, union, out=np.zeros(len(boxes)), where=shared > 0)
