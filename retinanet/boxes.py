"""Arithmetic on boxes: xyxy, float32, pixels. No +1 anywhere: width is x2 - x1."""

import math

import torch
from torch import Tensor

# A delta beyond this would blow a box up by more than 1000 / 16 (the R-CNN code base's bound).
MAX_LOG_SCALE = math.log(1000 / 16)


def box_area(boxes: Tensor) -> Tensor:
    """[..., 4] -> [...]; 0 for a degenerate box."""
    return (boxes[..., 2] - boxes[..., 0]).clamp(min=0) * (boxes[..., 3] - boxes[..., 1]).clamp(min=0)


def by_coordinate(boxes: Tensor) -> Tensor:
    """The same [R, 4] with each coordinate contiguous: CPUs take ten times as long over strided ones."""
    return boxes.t().contiguous().t()


def _pairwise_intersection(a: Tensor, b: Tensor) -> Tensor:
    """[N, 4], [R, 4] -> [N, R]. One axis after the other: no [N, R, 2] temporaries."""
    width = torch.minimum(a[:, None, 2], b[None, :, 2]) - torch.maximum(a[:, None, 0], b[None, :, 0])
    height = torch.minimum(a[:, None, 3], b[None, :, 3]) - torch.maximum(a[:, None, 1], b[None, :, 1])
    return width.clamp_(min=0).mul_(height.clamp_(min=0))


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of every box of `a` [N, 4] with every box of `b` [R, 4]: [N, R]; 0 where both are empty."""
    b = by_coordinate(b)
    intersection = _pairwise_intersection(a, b)
    union = box_area(a)[:, None] + box_area(b)[None, :] - intersection
    return torch.where(union > 0, intersection / union, torch.zeros_like(union))


def pairwise_coverage(a: Tensor, b: Tensor) -> Tensor:
    """Share of each box of `b` [R, 4] that lies in each box of `a` [N, 4]: [N, R]."""
    b = by_coordinate(b)
    area = box_area(b)[None, :]
    return torch.where(area > 0, _pairwise_intersection(a, b) / area, torch.zeros_like(area))


def encode_boxes(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Deltas (dx, dy, dw, dh) that turn `anchors` into `boxes`, both [..., 4] (Girshick et al. 2014, appendix C)."""
    anchor_wh = anchors[..., 2:] - anchors[..., :2]
    box_wh = boxes[..., 2:] - boxes[..., :2]
    shift = (boxes[..., :2] + 0.5 * box_wh - anchors[..., :2] - 0.5 * anchor_wh) / anchor_wh
    return torch.cat([shift, torch.log(box_wh / anchor_wh)], dim=-1)


def decode_boxes(deltas: Tensor, anchors: Tensor, *, clamp_shrinking: bool = False) -> Tensor:
    """The inverse of `encode_boxes`; dw and dh are clamped at `MAX_LOG_SCALE`, and at its negative if asked."""
    anchor_wh = anchors[..., 2:] - anchors[..., :2]
    centre = deltas[..., :2] * anchor_wh + anchors[..., :2] + 0.5 * anchor_wh
    log_scale = deltas[..., 2:].clamp(min=-MAX_LOG_SCALE if clamp_shrinking else None, max=MAX_LOG_SCALE)
    half = 0.5 * torch.exp(log_scale) * anchor_wh
    return torch.cat([centre - half, centre + half], dim=-1)


def clip_boxes(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes [..., 4] cut off at the border of an image of `size` (height, width)."""
    limit = boxes.new_tensor([size[1], size[0], size[1], size[0]])
    return torch.minimum(boxes.clamp(min=0), limit)


def rescale_boxes(boxes: Tensor, size: tuple[int, int], new_size: tuple[int, int]) -> Tensor:
    """Boxes of an image of `size` (height, width) in the pixels of the same image at `new_size`."""
    y, x = new_size[0] / size[0], new_size[1] / size[1]
    return boxes * boxes.new_tensor([x, y, x, y])
