"""The anchors of a data set as a detector meets them: how few are foreground, and which negatives are the hardest."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from retinanet.boxes import pairwise_iou
from retinanet.data.annotations import Annotations
from retinanet.data.images import read_image
from retinanet.matcher import BACKGROUND, IGNORE
from retinanet.torchvision_import import import_torchvision
from retinanet.visualize import draw_boxes

KINDS = ("foreground", "background", "ignored")
CANDIDATES = 300  # best-scored background anchors of an image that NMS sees
PER_IMAGE = 3  # or one picture with one odd thing would fill the sheet
SAME = 0.5  # IoU from which two negatives are one mistake
CONTEXT = 2.0  # a crop's side, in sides of its anchor
SMALLEST_CROP = 48  # pixels


@dataclass
class Imbalance:
    """Anchors by pyramid level and kind, summed over images."""

    counts: np.ndarray = field(default_factory=lambda: np.zeros((0, len(KINDS)), np.int64))  # [levels, 3]
    images: int = 0

    def add(self, matches: Tensor, level_sizes: list[int]) -> None:
        """`matches` [R] of one image, as a matcher gives them."""
        levels = matches.split(level_sizes)
        kinds = [[int((level >= 0).sum()), int((level == BACKGROUND).sum()), int((level == IGNORE).sum())] for level in levels]
        self.counts = np.array(kinds) + (self.counts if self.images else 0)
        self.images += 1

    def rows(self) -> dict[str, np.ndarray]:
        """Anchors of each kind in a mean image, [3], by level and in all. Five levels are P3..P7, six P2..P7."""
        first = 8 - len(self.counts)
        means = self.counts / max(self.images, 1)
        return {**{f"P{first + n}": row for n, row in enumerate(means)}, "all": means.sum(axis=0)}

    def table(self) -> str:
        lines = [f"{'level':>6} {'anchors':>10} {'foreground':>11} {'background':>11} {'ignored':>9}  background : foreground"]
        for name, (foreground, background, ignored) in self.rows().items():
            ratio = f"{background / foreground:.0f} : 1" if foreground else "-"
            total = foreground + background + ignored
            lines.append(f"{name:>6} {total:>10.1f} {foreground:>11.2f} {background:>11.1f} {ignored:>9.2f}  {ratio:>23}")
        return "\n".join(lines)


class Negative(NamedTuple):
    """A background anchor and the class that it was taken for."""

    score: float
    image_id: int
    box: tuple[float, float, float, float]  # the anchor, xyxy in pixels of the original
    label: int
    iou: float  # with the nearest object; below what counts as foreground


class HardestNegatives:
    """The `count` background anchors that score highest, at most `PER_IMAGE` of an image and none twice."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.found: list[Negative] = []  # the hardest first

    def add(self, image_id: int, logits: Tensor, anchors: Tensor, matches: Tensor, boxes: Tensor, zoom: Tensor) -> None:
        """One image: `logits` [R, K], `anchors` [R, 4], `matches` [R], objects' `boxes` [N, 4]; `zoom` [2], (x, y), makes
        pixels of the original of these."""
        background = (matches == BACKGROUND).nonzero().flatten()
        best, labels = logits[background].float().max(dim=1)
        best, order = best.topk(min(CANDIDATES, len(best)))
        chosen, labels = background[order], labels[order]
        kept = import_torchvision().ops.nms(anchors[chosen], best, SAME)[:PER_IMAGE]
        nearest = pairwise_iou(boxes, anchors[chosen[kept]]).amax(dim=0) if len(boxes) else torch.zeros(len(kept))
        corners = anchors[chosen[kept]] * zoom.repeat(2)
        columns = (best[kept].sigmoid().tolist(), corners.tolist(), labels[kept].tolist(), nearest.tolist())
        here = [Negative(score, image_id, tuple(box), label, iou) for score, box, label, iou in zip(*columns, strict=True)]
        self.found = sorted(self.found + here, reverse=True)[: self.count]


def draw_negative(negative: Negative, annotations: Annotations) -> np.ndarray:
    """The anchor in what surrounds it, with the class it was taken for: uint8 [h, w, 3]."""
    image = read_image(annotations.path(int(np.flatnonzero(annotations.image_ids == negative.image_id)[0])))
    box = np.array(negative.box).reshape(2, 2)  # corners, (x, y)
    reach = max(CONTEXT * (box[1] - box[0]).max(), SMALLEST_CROP) / 2
    size = np.array(image.shape[1::-1])
    low = (box.mean(axis=0) - reach).astype(int).clip(0, size - 1)
    high = (box.mean(axis=0) + reach).astype(int).clip(low + 1, size)
    crop = np.ascontiguousarray(image[low[1] : high[1], low[0] : high[0]])
    caption = f"{annotations.categories[negative.label].name} {negative.score:.2f}, IoU {negative.iou:.2f}"
    return draw_boxes(crop, (box - low).reshape(1, 4), [negative.label], [caption], min_side=360)


def imbalance_chart(path: Path, imbalance: Imbalance) -> None:
    """Anchors of a mean image by level and kind, on a logarithmic axis."""
    from matplotlib.figure import Figure

    rows = imbalance.rows()
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for n, kind in enumerate(KINDS):
        bars = axes.bar(np.arange(len(rows)) + (n - 1) * 0.27, [row[n] for row in rows.values()], 0.27, label=kind)
        axes.bar_label(bars, fmt=lambda value: f"{value:.0f}" if value >= 100 else f"{value:.2g}" if value else "", fontsize=8)
    axes.set_yscale("symlog", linthresh=0.1)
    axes.margins(y=0.1)
    axes.set_xticks(range(len(rows)), list(rows))
    axes.set_ylabel("anchors in an image (mean)")
    axes.legend()
    figure.savefig(path, dpi=120)
