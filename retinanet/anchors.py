"""Anchors: reference boxes in every cell of every pyramid level (paper section 4, "Anchors")."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

STRIDES = (8, 16, 32, 64, 128)  # P3..P7


class AnchorGenerator(nn.Module):
    """Anchors of a grid of cells: `len(ratios) * len(scales)` in each, ratio-major (r0s0 r0s1 .. r1s0 ..).

    `sizes` are sides in pixels by level, `ratios` height / width at equal area, `offset` the centre within a cell
    as a share of its stride. Strides are fixed: they do not depend on the size of the padded image.
    """

    def __init__(
        self,
        sizes: Sequence[float] = (32, 64, 128, 256, 512),
        scales: Sequence[float] = (1.0, 2 ** (1 / 3), 2 ** (2 / 3)),
        ratios: Sequence[float] = (0.5, 1.0, 2.0),
        *,
        strides: Sequence[int] = STRIDES,
        offset: float = 0.5,
    ) -> None:
        super().__init__()
        if len(sizes) != len(strides):
            raise ValueError(f"{len(sizes)} anchor sizes for {len(strides)} levels")
        self.strides, self.offset = tuple(strides), offset
        self.num_anchors = len(scales) * len(ratios)  # A
        for level, size in enumerate(sizes):
            self.register_buffer(f"cell{level}", cell_anchors(size, scales, ratios), persistent=False)

    def forward(self, grid_sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Anchors of all levels, [R, 4], for feature maps of these (height, width), finest level first."""
        return torch.cat([self._grid(level, *size) for level, size in enumerate(grid_sizes)])

    def _grid(self, level: int, height: int, width: int) -> Tensor:
        cell: Tensor = getattr(self, f"cell{level}")
        stride = self.strides[level]
        x = (torch.arange(width, device=cell.device, dtype=cell.dtype) + self.offset) * stride
        y = (torch.arange(height, device=cell.device, dtype=cell.dtype) + self.offset) * stride
        y, x = torch.meshgrid(y, x, indexing="ij")
        centres = torch.stack([x, y, x, y], dim=-1)  # [height, width, 4]
        return (centres[:, :, None] + cell).reshape(-1, 4)


def cell_anchors(size: float, scales: Sequence[float], ratios: Sequence[float]) -> Tensor:
    """Anchors of one cell, centred at 0: [A, 4]. Each has the area (size * scale)^2."""
    half = torch.tensor(
        [[size * s / r**0.5 / 2, size * s * r**0.5 / 2] for r in ratios for s in scales], dtype=torch.float32
    )  # half width, half height: [A, 2]
    return torch.cat([-half, half], dim=1)
