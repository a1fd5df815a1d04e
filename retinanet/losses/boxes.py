"""Box losses: of deltas (L1 and its kin), and of the boxes themselves (IoU and its kin)."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from retinanet.boxes import box_area
from retinanet.losses.reduction import precise, reduce

EPS = 1e-7  # keeps the ratios of boxes without area finite


def l1_loss(input: Tensor, target: Tensor, reduction: str = "none") -> Tensor:
    """|input - target|."""
    input, target = precise(input, target)
    return reduce((input - target).abs(), reduction)


def smooth_l1_loss(input: Tensor, target: Tensor, beta: float = 1.0, reduction: str = "none") -> Tensor:
    """x^2 / (2 beta) where x = |input - target| < beta, x - beta / 2 beyond (Girshick 2015)."""
    input, target = precise(input, target)
    return reduce(F.smooth_l1_loss(input, target, beta=beta, reduction="none"), reduction)


def focal_l1_loss(input: Tensor, target: Tensor, beta: float = 0.8, reduction: str = "none") -> Tensor:
    """-alpha x^2 (2 ln(beta x) - 1) / 4 where x = |input - target| <= 1, -alpha x ln(beta) + C beyond (Zhang et al. 2021,
    arXiv 2101.08158), alpha = e beta for a largest slope of 1, C for no step at 1.

    1/e <= beta <= 1: the smaller, the flatter beyond 1. Large errors, of outliers, and small ones pull less than those
    between: the slope is -alpha x ln(beta x), at most 1, where x = 1 / (e beta).
    """
    if not 1 / math.e <= beta <= 1:
        raise ValueError(f"beta must lie in 1/e..1, got {beta}")
    alpha = math.e * beta
    input, target = precise(input, target)
    x = (input - target).abs()
    near = x.clamp(max=1)
    safe = near.clamp(min=torch.finfo(x.dtype).tiny)  # 0^2 ln 0 is 0, but not to a computer
    inner = -alpha * near**2 * (2 * torch.log(beta * safe) - 1) / 4
    constant = alpha * (2 * math.log(beta) + 1) / 4
    return reduce(torch.where(x <= 1, inner, -alpha * math.log(beta) * x + constant), reduction)


def iou_loss(boxes: Tensor, target_boxes: Tensor, reduction: str = "none", eps: float = EPS) -> Tensor:
    """1 - IoU of paired xyxy boxes, both [N, 4]. Boxes that do not touch have no gradient."""
    return reduce(1 - _compare(boxes, target_boxes, eps).iou, reduction)


def giou_loss(boxes: Tensor, target_boxes: Tensor, reduction: str = "none", eps: float = EPS) -> Tensor:
    """1 - IoU + (hull - union) / hull, hull the area of the smallest box around both (Rezatofighi et al. 2019)."""
    pair = _compare(boxes, target_boxes, eps)
    hull = pair.hull_width * pair.hull_height
    return reduce(1 - pair.iou + (hull - pair.union) / (hull + eps), reduction)


def diou_loss(boxes: Tensor, target_boxes: Tensor, reduction: str = "none", eps: float = EPS) -> Tensor:
    """1 - IoU + rho^2 / c^2: the distance of the centres by the diagonal of the hull (Zheng et al. 2020)."""
    return reduce(_diou(_compare(boxes, target_boxes, eps), eps), reduction)


def ciou_loss(boxes: Tensor, target_boxes: Tensor, reduction: str = "none", eps: float = EPS) -> Tensor:
    """DIoU loss + alpha v, v = 4 / pi^2 (arctan(w* / h*) - arctan(w / h))^2, alpha = v / (1 - IoU + v) as a constant (Zheng
    et al. 2020)."""
    pair = _compare(boxes, target_boxes, eps)
    (width, height), (target_width, target_height) = (_sides(b).unbind(-1) for b in precise(boxes, target_boxes))
    angle, target_angle = torch.atan(width / (height + eps)), torch.atan(target_width / (target_height + eps))
    v = 4 / math.pi**2 * (target_angle - angle) ** 2
    with torch.no_grad():
        alpha = v / (1 - pair.iou + v + eps)
    return reduce(_diou(pair, eps) + alpha * v, reduction)


def eiou_loss(boxes: Tensor, target_boxes: Tensor, reduction: str = "none", eps: float = EPS) -> Tensor:
    """DIoU loss + (w - w*)^2 / c_w^2 + (h - h*)^2 / c_h^2, c_w and c_h the sides of the hull (Zhang et al. 2021, arXiv
    2101.08158)."""
    return reduce(_eiou(_compare(boxes, target_boxes, eps), boxes, target_boxes, eps), reduction)


def focal_eiou_loss(
    boxes: Tensor, target_boxes: Tensor, gamma: float = 0.5, reduction: str = "none", eps: float = EPS
) -> Tensor:
    """IoU^gamma EIoU loss, the factor as a constant (Zhang et al. 2021). As published it is 0, without a gradient, where the
    boxes do not touch: such a pair never learns."""
    pair = _compare(boxes, target_boxes, eps)
    return reduce(pair.iou.detach() ** gamma * _eiou(pair, boxes, target_boxes, eps), reduction)


class _Pair(NamedTuple):
    """What paired boxes have in common, [N] each."""

    iou: Tensor
    union: Tensor
    hull_width: Tensor  # of the smallest box around both
    hull_height: Tensor
    distance: Tensor  # of the centres, squared


def _compare(boxes: Tensor, target_boxes: Tensor, eps: float) -> _Pair:
    a, b = precise(boxes, target_boxes)
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    intersection = (low[..., 2:] - high[..., :2]).clamp(min=0).prod(dim=-1)
    union = box_area(a) + box_area(b) - intersection
    hull_width, hull_height = (high[..., 2:] - low[..., :2]).clamp(min=0).unbind(-1)
    centres = (a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]) / 2
    return _Pair(intersection / (union + eps), union, hull_width, hull_height, (centres**2).sum(dim=-1))


def _diou(pair: _Pair, eps: float) -> Tensor:
    return 1 - pair.iou + pair.distance / (pair.hull_width**2 + pair.hull_height**2 + eps)


def _eiou(pair: _Pair, boxes: Tensor, target_boxes: Tensor, eps: float) -> Tensor:
    boxes, target_boxes = precise(boxes, target_boxes)
    width, height = ((_sides(boxes) - _sides(target_boxes)) ** 2).unbind(-1)
    return _diou(pair, eps) + width / (pair.hull_width**2 + eps) + height / (pair.hull_height**2 + eps)


def _sides(boxes: Tensor) -> Tensor:
    """(width, height): [..., 2]."""
    return boxes[..., 2:] - boxes[..., :2]
