"""Which detection found which box: COCO's greedy matching at one IoU, as arrays."""

import numpy as np

NONE, BEYOND = -1, -2  # in place of a box: found none; not looked at, the image has enough better ones


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

    As in COCOeval the detections of an image choose one after the other, the best score first, among the boxes not taken
    that overlap by `iou`: those not `ignored` before those that are, the larger overlap first. A crowd is never taken.

    `boxes` [D, 4] and `truth_boxes` [N, 4] are [x, y, width, height]; `images` [D] and `truth_images` [N] say what belongs
    together; `ignored` [N] bool are the boxes that need not be found, among them `crowd` [N].
    """
    order = np.lexsort((-scores, images))  # stable: of equal scores the first comes first
    rank = np.arange(len(order)) - np.searchsorted(images[order], images[order])
    found = np.full(len(boxes), NONE)
    found[order[rank >= max_detections]] = BEYOND
    order = order[rank < max_detections]
    turn, box = _pairs(images[order], truth_images)
    overlap = _overlaps(boxes[order[turn]], truth_boxes[box], crowd[box])
    near = overlap >= min(iou, 1 - 1e-10)
    turn, box, overlap = turn[near], box[near], overlap[near]
    best_first = np.lexsort((-box, -overlap, ignored[box], turn))  # COCOeval takes the last of equal boxes
    taken = np.zeros(len(truth_boxes), bool)
    for chooser, choice in zip(order[turn[best_first]].tolist(), box[best_first].tolist(), strict=True):
        if found[chooser] == NONE and not taken[choice]:
            found[chooser] = choice
            taken[choice] = not crowd[choice]
    return found


def _pairs(images: np.ndarray, truth_images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every (detection, box) of the same image, as indices [P] and [P]."""
    by_image = np.argsort(truth_images, kind="stable")
    begin, end = (np.searchsorted(truth_images[by_image], images, side) for side in ("left", "right"))
    detection = np.repeat(np.arange(len(images)), end - begin)
    first = np.cumsum(end - begin) - (end - begin)  # where the pairs of each detection begin
    return detection, by_image[np.arange(len(detection)) + (begin - first)[detection]]


def _overlaps(boxes: np.ndarray, truth: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """IoU [P] of each pair, of crowds the share of the detection inside: to the last bit as in pycocotools' bbIou."""
    begin = np.maximum(boxes[:, :2], truth[:, :2])
    shared = (np.minimum(boxes[:, :2] + boxes[:, 2:], truth[:, :2] + truth[:, 2:]) - begin).clip(0).prod(axis=1)
    area = boxes[:, 2] * boxes[:, 3]
    union = np.where(crowd, area, area + truth[:, 2] * truth[:, 3] - shared)
    return np.divide(shared, union, out=np.zeros(len(boxes)), where=shared > 0)
