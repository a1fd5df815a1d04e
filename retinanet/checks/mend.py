"""A copy of a data set without what is wrong with it."""

from collections import Counter
from dataclasses import replace
from typing import Literal

import numpy as np

from retinanet.checks.check import Check
from retinanet.checks.kinds import REFUSED
from retinanet.data.annotations import Annotations

Way = Literal["clip", "drop"]
NO_BOX = {"zero-size box", "negative box", "outside box", "duplicate box"}
NO_PICTURE = {"missing image", "unreadable image", "truncated image", "huge image"}
DOUBTFUL_BOX = {"border box", "two classes on a box"}
DOUBTFUL_PICTURE = {"size mismatch", "rotated size", "identical images across splits"}


def mend(result: Check, name: str, way: Way) -> tuple[Annotations, Counter[str]]:
    """Split `name` without boxes that are none and pictures that cannot be read; and how many it lost, by kind.

    "clip" cuts boxes at the border. "drop" leaves out those more than a pixel over it, and what else is doubtful: pictures
    of another size than annotated, and the second of two classes on a box, entries of a file, splits with one picture.
    """
    data, sizes, faults = result.splits[name], result.sizes[name], result.faults[name]
    strict = way == "drop"
    unwanted = NO_PICTURE | DOUBTFUL_PICTURE if strict else NO_PICTURE
    kind_of = {fault.file: fault.kind for fault in result.findings[name] if fault.kind in unwanted}
    done = Counter(fault.kind for fault in result.findings[name] if fault.kind in REFUSED)
    kept, seen = list[int](), set[str]()
    for index in range(len(data)):
        file = str(data.path(index))
        if kind := kind_of.get(file) or ("duplicate file name" if strict and file in seen else None):
            done[kind] += 1
        else:
            kept.append(index)
        seen.add(file)

    keep = np.isin(data.image_of, kept)
    for kind in sorted(NO_BOX | DOUBTFUL_BOX if strict else NO_BOX):
        done[kind] += int((faults[kind] & keep).sum())
        keep &= ~faults[kind]
    if not strict:
        done["border box, clipped"] = int((faults["border box"] & keep).sum())
        boxes = _clipped(data.coco_boxes, sizes[data.image_of])
        data = replace(data, coco_boxes=boxes, areas=np.minimum(data.areas, boxes[:, 2:].prod(axis=1)))
    data = replace(data, sizes=np.where(data.sizes > 0, data.sizes, sizes))
    return data.select(np.array(kept, np.int64), keep), +done


def _clipped(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """[A, 4] x, y, width, height, cut at the border of pictures of `sizes` [A, 2] (height, width) where these are known."""
    limit = np.where(sizes > 0, sizes, np.inf)[:, ::-1]
    begin, end = boxes[:, :2].clip(0, limit), (boxes[:, :2] + boxes[:, 2:]).clip(0, limit)
    return np.concatenate([begin, end - begin], axis=1)
