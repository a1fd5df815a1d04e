"""The one in-memory form of a labelled data set: arrays, not objects.

A million annotations as Python dicts are gigabytes that every loading process copies, because counting references
writes to them. Packed in arrays they are tens of megabytes that stay shared.
"""

import math
import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from retinanet.data.faults import DataError
from retinanet.structures import Category, Target, check_names

OVER = 1.0  # pixels that a box may reach over the border unreported: rounding


class PackedStrings:
    """A read-only list of strings in two arrays."""

    def __init__(self, strings: list[str]) -> None:
        encoded = [s.encode() for s in strings]
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._offsets = np.cumsum([0, *(len(e) for e in encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]  # negative ones count from the end, others are an IndexError
        return self._bytes[self._offsets[index] : self._offsets[index + 1]].tobytes().decode()


class ImageRow(NamedTuple):
    id: int
    file_name: str
    height: int  # 0 where unknown
    width: int


class AnnotationRow(NamedTuple):
    image: int  # index, not id
    id: int
    label: int
    coco_box: list[float]  # x, y, width, height
    area: float
    crowd: bool


ROW = np.dtype([("image", "i8"), ("id", "i8"), ("label", "i8"), ("coco_box", "f8", 4), ("area", "f8"), ("crowd", "?")])


def corner_row(
    image: int, number: int, label: int, corners: Sequence[float | str], where: str, *, crowd: bool = False, first: int = 0
) -> AnnotationRow:
    """The row of an xyxy box whose x1 and y1 count from `first`. Raises `UserError` if it, or its area, is not finite."""
    try:
        x1, y1, x2, y2 = map(float, corners)
        x, y, width, height = x1 - first, y1 - first, x2 - x1 + first, y2 - y1 + first
        if math.isfinite(x + y) and math.isfinite(width * height):
            return AnnotationRow(image, number, label, [x, y, width, height], width * height, crowd)
        raise ValueError
    except ValueError:
        message = f"{where}: the corners of the box must be finite numbers, got {reprlib.repr([*corners])}"
        raise DataError("unusable box", message) from None


@dataclass
class Annotations:
    """I images and their A annotations, those of image i at offsets[i] : offsets[i + 1].

    `coco_boxes` are [x, y, width, height] in float64 just as the file gives them, because evaluation must see what
    pycocotools would see; everything else in the program uses the xyxy boxes of `target`.
    """

    source: str  # the file, for messages
    image_dir: Path
    categories: tuple[Category, ...]  # the label is the position
    image_ids: np.ndarray  # [I] int64
    file_names: PackedStrings  # I of them
    sizes: np.ndarray  # [I, 2] int64 (height, width); 0 where unknown
    offsets: np.ndarray  # [I + 1] int64
    annotation_ids: np.ndarray  # [A] int64
    coco_boxes: np.ndarray  # [A, 4] float64
    areas: np.ndarray  # [A] float64
    labels: np.ndarray  # [A] int64
    crowd: np.ndarray  # [A] bool

    def __len__(self) -> int:
        return len(self.image_ids)

    @classmethod
    def pack(
        cls,
        source: str,
        image_dir: Path,
        categories: Sequence[Category],
        images: Sequence[ImageRow],
        rows: Iterable[AnnotationRow],
    ) -> "Annotations":
        """Packs what a reader found; annotations of an image keep their order. `rows` may be a generator: none is kept."""
        check_names(categories, source)
        table = np.fromiter(rows, ROW)
        order = np.argsort(table["image"], kind="stable")
        lengths = np.bincount(table["image"], minlength=len(images))
        return cls(
            source=source,
            image_dir=image_dir,
            categories=tuple(categories),
            image_ids=np.array([image.id for image in images], dtype=np.int64),
            file_names=PackedStrings([image.file_name for image in images]),
            sizes=np.array([[image.height, image.width] for image in images], np.int64).reshape(-1, 2),
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            annotation_ids=table["id"][order],
            labels=table["label"][order],
            coco_boxes=table["coco_box"][order],
            areas=table["area"][order],
            crowd=table["crowd"][order],
        )

    @property
    def image_of(self) -> np.ndarray:
        """[A] int64: the image index of each annotation."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def path(self, index: int) -> Path:
        return self.image_dir / self.file_names[index]

    def target(self, index: int, size: tuple[int, int]) -> Target:
        """The truth of image `index`, whose (height, width) is `size`: boxes clipped to it, those without area left out."""
        rows = slice(self.offsets[index], self.offsets[index + 1])
        boxes = self.coco_boxes[rows].copy()
        boxes[:, 2:] += boxes[:, :2]
        boxes = boxes.clip(0, [size[1], size[0], size[1], size[0]]).astype(np.float32)
        solid = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        crowd = self.crowd[rows]
        return Target(
            boxes=torch.from_numpy(boxes[solid & ~crowd]),
            labels=torch.from_numpy(self.labels[rows][solid & ~crowd]),
            ignore_boxes=torch.from_numpy(boxes[solid & crowd]),
            image_id=int(self.image_ids[index]),
        )

    def counts(self) -> np.ndarray:
        """Annotations of each class, crowds left out: [K] int64."""
        return np.bincount(self.labels[~self.crowd], minlength=len(self.categories))

    def has_boxes(self) -> np.ndarray:
        """[I] bool: images with at least one annotation that is no crowd and has an area."""
        useful = ~self.crowd & (self.coco_boxes[:, 2:] > 0).all(axis=1)
        return np.bincount(self.image_of[useful], minlength=len(self)) > 0

    def odd_boxes(self, sizes: np.ndarray) -> dict[str, np.ndarray]:
        """By kind the annotations [A] bool that training clips or leaves out; `sizes` [I, 2] (height, width), 0 if unknown."""
        size = sizes[self.image_of][:, ::-1]  # [A, 2], (width, height)
        known = (size > 0).all(axis=1)
        begin, wh = self.coco_boxes[:, :2], self.coco_boxes[:, 2:]
        negative = (wh < 0).any(axis=1)
        flat = ~negative & (wh == 0).any(axis=1)
        outside = known & ~negative & ~flat & ((begin >= size) | (begin + wh <= 0)).any(axis=1)
        across = known & ~negative & ~flat & ~outside & ((begin < -OVER) | (begin + wh > size + OVER)).any(axis=1)
        return {"zero-size box": flat, "negative box": negative, "outside box": outside, "border box": across}

    def select(self, images: np.ndarray, keep: np.ndarray | None = None) -> "Annotations":
        """The part with these image indices, in this order, and of their annotations those that `keep` [A] bool marks."""
        chosen = [np.arange(self.offsets[i], self.offsets[i + 1]) for i in images]
        if keep is not None:
            chosen = [rows[keep[rows]] for rows in chosen]
        rows = np.concatenate([np.empty(0, np.int64), *chosen])
        return replace(
            self,
            image_ids=self.image_ids[images],
            file_names=PackedStrings([self.file_names[int(i)] for i in images]),
            sizes=self.sizes[images],
            offsets=np.cumsum([0, *map(len, chosen)], dtype=np.int64),
            annotation_ids=self.annotation_ids[rows],
            coco_boxes=self.coco_boxes[rows],
            areas=self.areas[rows],
            labels=self.labels[rows],
            crowd=self.crowd[rows],
        )

    def to_coco(self) -> dict[str, Any]:
        """The data set as a COCO dict. Annotations are numbered from 1: pycocotools takes id 0 for "no match"."""
        image_of = self.image_ids[self.image_of].tolist()
        category_of = np.array([category.id for category in self.categories])[self.labels].tolist()
        columns = zip(image_of, category_of, self.coco_boxes.tolist(), self.areas.tolist(), self.crowd.tolist(), strict=True)
        return {
            "info": {},
            "images": [
                {"id": int(i), "file_name": self.file_names[n], "height": int(h), "width": int(w)}
                for n, (i, (h, w)) in enumerate(zip(self.image_ids, self.sizes, strict=True))
            ],
            "categories": [{"id": category.id, "name": category.name} for category in self.categories],
            "annotations": [
                {"id": n, "image_id": image, "category_id": category, "bbox": box, "area": area, "iscrowd": int(crowd)}
                for n, (image, category, box, area, crowd) in enumerate(columns, start=1)
            ],
        }
