"""What travels between the rooms.

Axes: B images in a batch, N boxes of an image, M ignore boxes, D detections, H W rows and columns,
A anchors in a cell, R anchors of all levels, K foreground classes.
Boxes are xyxy, float32, in pixels of the image at hand. Image sizes are (height, width). Labels are 0..K-1.
"""

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from retinanet.errors import CONTROL, UserError


class Category(NamedTuple):
    """A class of the data set: `id` is the data set's own, its position in a list of categories is the label."""

    id: int
    name: str


def check_names(categories: Sequence[Category], where: str) -> None:
    """Raises `UserError` for a class whose name holds control characters: names are printed to terminals."""
    for category in categories:
        if CONTROL.search(category.name):
            raise UserError(f"{where}: the name of class {category.id}, {reprlib.repr(category.name)}, has control characters")


def shortened(names: Sequence[str]) -> str:
    """The first eight, for a message."""
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


@dataclass
class Target:
    """The truth of one image. Crowds and other regions that are neither object nor background are `ignore_boxes`."""

    boxes: Tensor  # [N, 4]
    labels: Tensor  # [N] int64
    ignore_boxes: Tensor  # [M, 4]
    image_id: int = -1

    @classmethod
    def empty(cls, image_id: int = -1) -> "Target":
        return cls(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), image_id)

    def to(self, device: torch.device) -> "Target":
        move = {k: getattr(self, k).to(device, non_blocking=True) for k in ("boxes", "labels", "ignore_boxes")}
        return Target(**move, image_id=self.image_id)


@dataclass
class Batch:
    """Images padded to one size, with what was true before the padding."""

    images: Tensor  # [B, 3, H, W] uint8
    image_sizes: Tensor  # [B, 2] int64, before padding
    original_sizes: Tensor  # [B, 2] int64, before resizing
    targets: list[Target]
    file_names: list[str]
    faults: list[str] = field(default_factory=list)  # unreadable images, each with the reason
    readable: list[bool] = field(default_factory=list)  # False: a stand-in without content (evaluation only)

    def to(self, device: torch.device) -> "Batch":
        return Batch(
            self.images.to(device, non_blocking=True),
            self.image_sizes.to(device, non_blocking=True),
            self.original_sizes,
            [target.to(device) for target in self.targets],
            self.file_names,
            self.faults,
            self.readable,
        )

    def pin_memory(self) -> "Batch":
        self.images = self.images.pin_memory()
        return self

    def split(self, parts: int) -> list["Batch"]:
        """Cuts the batch into `parts` as even as may be, none of them empty; each keeps the common padding."""
        size = len(self.targets)
        parts = min(parts, size)
        cuts = [slice(i * size // parts, (i + 1) * size // parts) for i in range(parts)]
        return [
            Batch(self.images[c], self.image_sizes[c], self.original_sizes[c], self.targets[c], self.file_names[c])
            for c in cuts
        ]


class Predictions(NamedTuple):
    """What the model says, raw, in every mode. R runs over levels, then rows, columns and anchors of a cell."""

    cls_logits: Tensor  # [B, R, K]
    box_deltas: Tensor  # [B, R, 4]
    anchors: Tensor  # [R, 4]
    level_sizes: list[int]  # anchors of each level; they sum to R


@dataclass
class Detections:
    """Objects found in one image, best first. `names` and `category_ids` are the data set's own."""

    boxes: Tensor  # [D, 4]
    scores: Tensor  # [D]
    labels: Tensor  # [D] int64
    categories: tuple[Category, ...] = ()

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def names(self) -> list[str]:
        return [self.categories[label].name for label in self.labels.tolist()]

    @property
    def category_ids(self) -> list[int]:
        return [self.categories[label].id for label in self.labels.tolist()]

    def above(self, thresholds: float | Tensor) -> "Detections":
        """Those that score at least `thresholds`: one number, or one for each class, [K]."""
        limit = thresholds[self.labels.cpu()].to(self.scores) if isinstance(thresholds, Tensor) else thresholds
        keep = self.scores >= limit
        return Detections(self.boxes[keep], self.scores[keep], self.labels[keep], self.categories)

    def cpu(self) -> "Detections":
        return Detections(self.boxes.cpu(), self.scores.cpu(), self.labels.cpu(), self.categories)

    def numpy(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Boxes [D, 4], scores [D] and labels [D] as arrays."""
        here = self.cpu()
        return here.boxes.numpy(), here.scores.numpy(), here.labels.numpy()
