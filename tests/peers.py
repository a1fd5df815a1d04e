"""The parts of other projects' detectors, written out once more in plain torch.

Nothing here imports the project: this is what its importers are held against.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CLAMP = math.log(1000 / 16)
THRESHOLD = 0.05


class Found(NamedTuple):
    boxes: Tensor  # [D, 4]
    scores: Tensor  # [D]
    labels: Tensor  # [D]


def pad(images: Sequence[Tensor]) -> Tensor:
    """[3, h, w] each -> [B, 3, H, W], zeros to the right and below, H and W multiples of 32."""
    height, width = (-(-max(image.shape[axis] for image in images) // 32) * 32 for axis in (1, 2))
    return torch.stack([F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in images])


class Layers:
    """Layers by name. One that is used for the first time gets random weights, and statistics that fit its input."""

    def __init__(self, seed: int = 0) -> None:
        self.state: dict[str, Tensor] = {}
        self.random = torch.Generator().manual_seed(seed)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random)

    def conv(
        self, name: str, x: Tensor, channels: int, kernel: int = 3, stride: int = 1, *, bias: bool = False, gain: float = 1
    ) -> Tensor:
        if f"{name}.weight" not in self.state:
            inputs = x.shape[1]
            scale = gain * math.sqrt(2 / inputs / kernel**2)
            self.state[f"{name}.weight"] = self._normal(channels, inputs, kernel, kernel) * scale
            if bias:
                self.state[f"{name}.bias"] = self._normal(channels) * 0.1
        return F.conv2d(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"), stride, kernel // 2)

    def norm(self, name: str, x: Tensor) -> Tensor:
        if f"{name}.weight" not in self.state:
            self.state[f"{name}.weight"] = 0.5 + torch.rand(x.shape[1], generator=self.random)
            self.state[f"{name}.bias"] = self._normal(x.shape[1]) * 0.2
            self.state[f"{name}.running_mean"] = x.mean((0, 2, 3))
            self.state[f"{name}.running_var"] = x.var((0, 2, 3))
        kinds = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(self.state[f"{name}.{kind}"] for kind in kinds), eps=1e-5)

    def output(
        self, name: str, levels: list[Tensor], channels: int, spread: float, bias: Callable[[Tensor], Tensor]
    ) -> list[Tensor]:
        """A subnet's last convolution: at first brought to a standard deviation of `spread`, then `bias` sees its output."""
        if f"{name}.weight" not in self.state:
            out = torch.cat([self.conv(name, x, channels).transpose(0, 1).flatten(1) for x in levels], dim=1)  # [channels, ..]
            scale = spread / out.std()
            self.state[f"{name}.weight"] *= scale
            self.state[f"{name}.bias"] = bias(out * scale)
        return [self.conv(name, x, channels) for x in levels]

    def class_bias(self, share: float) -> Callable[[Tensor], Tensor]:
        """Makes about this share of all scores pass the threshold, in every class and anchor."""

        def bias(logits: Tensor) -> Tensor:
            limit = logits.kthvalue(round(logits.shape[1] * (1 - share)), dim=1).values
            return -math.log(1 / THRESHOLD - 1) - limit + 0.2 * self._normal(len(logits))

        return bias

    def box_bias(self, anchors: int) -> Callable[[Tensor], Tensor]:
        """Deltas of every kind: the first anchors of a cell grow or shrink beyond any clamp, or leave the image."""

        def bias(_: Tensor) -> Tensor:
            deltas = 0.3 * self._normal(anchors, 4)
            deltas[0] += torch.tensor([0.0, 0.0, 5.0, 0.0])  # beyond ln(1000 / 16) = 4.135
            deltas[1] += torch.tensor([0.0, 0.0, 0.0, -6.0])
            deltas[2] += torch.tensor([40.0, 0.0, 0.0, 0.0])
            deltas[3] += torch.tensor([0.0, 0.0, -25.0, 0.0])  # no width is left in float32
            return deltas.flatten()

        return bias


def anchors(grids: Sequence[tuple[int, int]], *, size_major: bool) -> list[Tensor]:
    """Around the corner of each cell, strides 8..128: [h * w * 9, 4] of each level."""
    scales, ratios = [2 ** (n / 3) for n in range(3)], (0.5, 1.0, 2.0)  # height / width
    pairs = [(s, r) for s in scales for r in ratios] if size_major else [(s, r) for r in ratios for s in scales]
    levels = []
    for level, (rows, columns) in enumerate(grids):
        stride, side = 8 * 2**level, 32 * 2**level
        boxes = []
        for y in range(rows):
            for x in range(columns):
                for scale, ratio in pairs:
                    w, h = side * scale / math.sqrt(ratio), side * scale * math.sqrt(ratio)
                    boxes.append([x * stride - w / 2, y * stride - h / 2, x * stride + w / 2, y * stride + h / 2])
        levels.append(torch.tensor(boxes))
    return levels


def decode(deltas: Tensor, boxes: Tensor, *, shrink_clamped: bool) -> Tensor:
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    x, y = boxes[:, 0] + w / 2 + deltas[:, 0] * w, boxes[:, 1] + h / 2 + deltas[:, 1] * h
    lower = -CLAMP if shrink_clamped else -math.inf
    w, h = w * deltas[:, 2].clamp(lower, CLAMP).exp(), h * deltas[:, 3].clamp(lower, CLAMP).exp()
    return torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=1)


def candidates(
    logits: list[Tensor], deltas: list[Tensor], classes: int, image: int, *, size_major: bool, shrink_clamped: bool
) -> Found:
    """The 1000 best (anchor, class) pairs of each level that pass the threshold, from maps [B, 9 * n, h, w]."""
    parts = []
    boxes = anchors([(x.shape[2], x.shape[3]) for x in logits], size_major=size_major)
    for level_logits, level_deltas, level_boxes in zip(logits, deltas, boxes):
        scores = level_logits[image].permute(1, 2, 0).reshape(-1, classes).sigmoid()
        rows = level_deltas[image].permute(1, 2, 0).reshape(-1, 4)
        where = (scores > THRESHOLD).nonzero()
        best, order = scores[scores > THRESHOLD].sort(descending=True, stable=True)
        where = where[order[:1000]]
        decoded = decode(rows[where[:, 0]], level_boxes[where[:, 0]], shrink_clamped=shrink_clamped)
        parts.append((decoded, best[:1000], where[:, 1]))
    return Found(*(torch.cat(part) for part in zip(*parts)))


def suppress(found: Found, keep: int, threshold: float = 0.5) -> Found:
    """Greedy NMS in each class, then the `keep` best of all classes."""
    kept = []
    for label in found.labels.unique():
        rows = (found.labels == label).nonzero()[:, 0]
        rows = rows[found.scores[rows].sort(descending=True, stable=True).indices]
        while len(rows):
            best, rows = rows[0], rows[1:]
            kept.append(best)
            low = torch.maximum(found.boxes[best, :2], found.boxes[rows, :2])
            high = torch.minimum(found.boxes[best, 2:], found.boxes[rows, 2:])
            overlap = (high - low).clamp(min=0).prod(1)
            area = (found.boxes[:, 2:] - found.boxes[:, :2]).prod(1)
            rows = rows[~(overlap / (area[best] + area[rows] - overlap) > threshold)]
    order = torch.stack(kept) if kept else torch.zeros(0, dtype=torch.int64)
    order = order[found.scores[order].sort(descending=True, stable=True).indices[:keep]]
    return Found(*(part[order] for part in found))


def clip(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    return torch.stack([boxes[:, 0::2].clamp(0, size[1]), boxes[:, 1::2].clamp(0, size[0])], dim=2).flatten(1)


def nonempty(found: Found) -> Found:
    keep = (found.boxes[:, 2] > found.boxes[:, 0]) & (found.boxes[:, 3] > found.boxes[:, 1])
    return Found(*(part[keep] for part in found))
