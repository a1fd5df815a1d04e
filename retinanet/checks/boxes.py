"""What is wrong with boxes, in arrays over all annotations; and what stands out in a data set's classes and numbers."""

from collections.abc import Iterator

import numpy as np

from retinanet.config import InputConfig
from retinanet.data.annotations import Annotations
from retinanet.data.faults import Fault

TINY = 4.0  # pixels of the shorter side in training, half a cell of P3
EXTREME = 10.0  # long side / short side
WHOLE = 0.99  # share of both sides of the image
NEAR, SAME = 1.0, 0.8  # boxes whose corners lie so many pixels apart and whose IoU is at least this are one
MANY, RARE, CROWDED = 300, 10, 0.2  # boxes of an image, boxes of a class, share of crowds
STEPS = 256  # `neighbours` looks no further: bounds the time where all boxes are alike


def neighbours(group: np.ndarray, value: np.ndarray, reach: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of rows of one group whose values differ by at most `reach`, as two arrays at a time, the lesser row first."""
    order = np.lexsort((value, group))
    at = np.arange(len(order))
    for step in range(1, STEPS + 1):
        at = at[at + step < len(order)]
        a, b = order[at], order[at + step]
        near = (group[a] == group[b]) & (value[b] - value[a] <= reach)
        at = at[near]  # what is not near now is even less so after the next step
        if not len(at):
            return
        yield np.minimum(a, b)[near], np.maximum(a, b)[near]


def box_faults(data: Annotations, sizes: np.ndarray, input: InputConfig) -> dict[str, np.ndarray]:
    """For each kind the annotations [A] bool that it is true of. `sizes` [I, 2] (height, width), 0 where unknown."""
    odd = data.odd_boxes(sizes)
    wh, image_of = data.coco_boxes[:, 2:], data.image_of
    size = sizes[image_of][:, ::-1]  # [A, 2], (width, height)
    known = (size > 0).all(axis=1)
    one = ~data.crowd & ~odd["negative box"] & ~odd["zero-size box"] & ~odd["outside box"]
    same, other = _repeated(data, image_of, one)
    repeated = np.ones(len(data.labels), bool)
    repeated[np.unique(data.annotation_ids, return_index=True)[1]] = False
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.minimum(input.short_edge / size.min(axis=1), input.long_edge / size.max(axis=1))
        tiny = wh.min(axis=1) * scale < TINY
    return odd | {
        "duplicate box": same,
        "two classes on a box": other,
        "tiny box": one & known & tiny,
        "extreme box": one & (wh.max(axis=1) > EXTREME * wh.min(axis=1)),
        "whole-image box": one & known & (wh >= WHOLE * size).all(axis=1),
        "duplicate annotation id": repeated,
    }


def _repeated(data: Annotations, image_of: np.ndarray, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[A] bool twice: an earlier box lies in the same place and has the same class, or another."""
    same, other = np.zeros((2, len(data.labels)), bool)
    corners = np.concatenate([data.coco_boxes[:, :2], data.coco_boxes[:, :2] + data.coco_boxes[:, 2:]], axis=1)
    rows = np.flatnonzero(among)
    for a, b in neighbours(image_of[rows], corners[rows, 0], NEAR):
        first, second = corners[rows[a]], corners[rows[b]]
        sides = np.minimum(first, second)[:, 2:] - np.maximum(first, second)[:, :2]
        shared = sides.clip(0).prod(axis=1)
        union = sum((box[:, 2:] - box[:, :2]).prod(axis=1) for box in (first, second)) - shared
        twins = (np.abs(first - second).max(axis=1) <= NEAR) & (shared >= SAME * union)
        alike = data.labels[rows[a]] == data.labels[rows[b]]
        same[rows[b[twins & alike]]] = True
        other[rows[b[twins & ~alike]]] = True
    return same, other


def box_findings(data: Annotations, sizes: np.ndarray, faults: dict[str, np.ndarray]) -> Iterator[Fault]:
    """A finding for each annotation of `box_faults`."""
    image_of = data.image_of.tolist()
    for kind, mask in faults.items():
        for row in np.flatnonzero(mask).tolist():
            image = image_of[row]
            box = ", ".join(f"{number:.6g}" for number in data.coco_boxes[row])
            name, (height, width) = data.categories[data.labels[row]].name, sizes[image]
            message = f"{name}, [x, y, width, height] = [{box}] in {width} x {height} pixels"
            yield Fault(kind, str(data.path(image)), int(data.annotation_ids[row]), message)


def census_findings(data: Annotations, *, learnt: bool) -> Iterator[Fault]:
    """What stands out in the numbers of boxes, by image and by class; few of a class only where it is to be `learnt`."""
    boxes = np.diff(data.offsets)
    for index in np.flatnonzero(~data.has_boxes()).tolist():
        yield Fault("image without boxes", str(data.path(index)), None, f"{boxes[index]} annotations")
    for index in np.flatnonzero(boxes > MANY).tolist():
        yield Fault("many boxes", str(data.path(index)), None, f"{boxes[index]} boxes")
    if data.crowd.any():
        crowds = f"{data.crowd.sum()} of {len(data.crowd)} annotations"
        yield Fault("crowd boxes", data.source, None, crowds)
        if data.crowd.mean() > CROWDED:
            yield Fault("many crowds", data.source, None, crowds)
    for category, count in zip(data.categories, data.counts().tolist(), strict=True):
        if learnt and count < RARE:
            kind = "rare class" if count else "class without boxes"
            yield Fault(kind, data.source, None, f"class {category.name} (id {category.id}) has {count} boxes")
    ids = [category.id for category in data.categories]
    if max(ids) - min(ids) >= len(ids):
        yield Fault("class id gap", data.source, None, f"{len(ids)} classes with ids from {min(ids)} to {max(ids)}")
