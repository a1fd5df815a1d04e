"""Anchors: reference boxes in every cell of every pyramid level (paper section 4, "Anchors")."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from retinanet.config import AnchorConfig

STRIDES = (8, 16, 32, 64, 128)  # P3..P7
P2_STRIDES = (4, *STRIDES)  # with a level more for tiny objects, which costs three times the cells of all others


class AnchorGenerator(nn.Module):
    """Anchors of a grid of cells: `len(ratios) * len(scales)` in each, ratio-major (r0s0 r0s1 .. r1s0 ..).

    `sizes` are sides in pixels by level, `ratios` height / width at equal area, `offset` the centre within a cell
    as a share of its stride. Without `strides` six sizes are those of P2..P7, others of P3..P7. Strides are fixed, so
    that anchors do not depend on the size of the padded image.

    `integer` and `strides_by_grid` are for weights trained with torchvision, whose anchors have whole-pixel sides and
    corners, and strides of padded size // grid, which drift off the cells where that does not divide.
    """

    def __init__(
        self,
        sizes: Sequence[float] = (32, 64, 128, 256, 512),
        scales: Sequence[float] = (1.0, 2 ** (1 / 3), 2 ** (2 / 3)),
        ratios: Sequence[float] = (0.5, 1.0, 2.0),
        *,
        strides: Sequence[int] | None = None,
        offset: float = 0.5,
        integer: bool = False,
        strides_by_grid: bool = False,
    ) -> None:
        super().__init__()
        if strides is None:
            strides = P2_STRIDES if len(sizes) == len(P2_STRIDES) else STRIDES
        if len(sizes) != len(strides):
            raise ValueError(f"{len(sizes)} anchor sizes for {len(strides)} levels")
        self.strides, self.offset, self.strides_by_grid = tuple(strides), offset, strides_by_grid
        self.num_anchors = len(scales) * len(ratios)  # A
        for level, size in enumerate(sizes):
            self.register_buffer(f"cell{level}", cell_anchors(size, scales, ratios, integer=integer), persistent=False)

    def forward(self, grid_sizes: Sequence[tuple[int, int]], image_size: tuple[int, int] | None = None) -> Tensor:
        """Anchors of all levels, [R, 4], for feature maps of these (height, width), finest level first.

        `image_size` (height, width), padding included, is needed with `strides_by_grid` only.
        """
        levels = []
        for level, (height, width) in enumerate(grid_sizes):
            stride_y = stride_x = self.strides[level]
            if self.strides_by_grid:
                assert image_size is not None
                stride_y, stride_x = image_size[0] // height, image_size[1] // width
            levels.append(self._grid(level, (height, width), (stride_y, stride_x)))
        return torch.cat(levels)

    def _grid(self, level: int, size: tuple[int, int], stride: tuple[int, int]) -> Tensor:
        cell: Tensor = getattr(self, f"cell{level}")  # [A, 4]
        y, x = (
            (torch.arange(size[axis], device=cell.device, dtype=cell.dtype) + self.offset) * stride[axis] for axis in (0, 1)
        )
        y, x = torch.meshgrid(y, x, indexing="ij")
        centres = torch.stack([x, y, x, y], dim=-1)  # [height, width, 4]
        return (centres[:, :, None] + cell).reshape(-1, 4)


def build_anchors(config: AnchorConfig) -> AnchorGenerator:
    return AnchorGenerator(
        config.sizes,
        config.scales,
        config.ratios,
        offset=config.offset,
        integer=config.integer,
        strides_by_grid=config.strides == "grid",
    )


def cell_anchors(size: float, scales: Sequence[float], ratios: Sequence[float], *, integer: bool = False) -> Tensor:
    """Anchors of one cell, centred at 0: [A, 4]. Each has the area (size * scale)^2, but for `integer` rounding."""
    sides = torch.tensor([int(size * s) if integer else size * s for s in scales], dtype=torch.float32)
    root = torch.tensor(ratios, dtype=torch.float32).sqrt()[:, None]
    half_wh = torch.stack([(1 / root * sides).flatten(), (root * sides).flatten()], dim=1) / 2  # [A, 2]
    corners = torch.cat([-half_wh, half_wh], dim=1)
    return corners.round() if integer else corners  # half to even
