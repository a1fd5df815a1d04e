"""The losses, as pure functions. Each computes in float32 whatever comes in, also inside autocast.

`reduction` is "none" (default), "mean" or "sum", as in torchvision.ops.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from retinanet.boxes import box_area

IGNORED = -2  # a label of `focal_loss_sum`; -1 is background
CHUNK = 2**17  # logits at once: half a megabyte in float32, so that a dozen passes over it stay in a core's cache


def sigmoid_focal_loss(
    logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0, reduction: str = "none"
) -> Tensor:
    """-alpha_t (1 - p_t)^gamma log(p_t), p = sigmoid(logits) (Lin et al. 2017, equation 5).

    `targets` has the shape of `logits` and holds 0 or 1 (or anything between). `alpha` weighs the positives and
    1 - alpha the negatives; a negative alpha switches the weighting off.

    Computed from log-probabilities throughout, so that value and gradient stay finite at any logit and any
    gamma >= 0: the power of a probability that has underflowed to 0 would have an infinite slope for gamma < 1.
    """
    logits, targets = logits.float(), targets.float()
    log_p, log_not_p = F.logsigmoid(logits), F.logsigmoid(-logits)
    cross_entropy = -(targets * log_p + (1 - targets) * log_not_p)
    # log(1 - p_t), with p_t = p t + (1 - p)(1 - t)
    log_miss = torch.logaddexp(log_p + torch.log1p(-targets), log_not_p + torch.log(targets))
    loss = torch.exp(gamma * log_miss) * cross_entropy
    if alpha >= 0:
        loss = (alpha * targets + (1 - alpha) * (1 - targets)) * loss
    return _reduce(loss, reduction)


def focal_loss_sum(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """The sum of `sigmoid_focal_loss` over `logits` [R, K] and one-hot targets of `labels` [R]: the class 0..K-1 of each
    row, -1 where all classes are background, -2 where the row does not count.

    The same values to rounding, but in chunks that stay in the cache, with the gradient written down instead of recorded:
    no [R, K] tensor is kept except the gradient itself. Not differentiable twice.
    """
    return _FocalLossSum.apply(logits, labels, alpha, gamma)


class _FocalLossSum(torch.autograd.Function):
    """With p = sigmoid(x), s(x) = log(1 + e^x) and p' = 1 - p the loss of a negative and its slope are
    (1 - alpha) p^gamma s(x) and (1 - alpha) p^gamma (gamma p' s(x) + p); those of a positive are the same of -x and alpha,
    the slope with the other sign.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, alpha: float, gamma: float) -> Tensor:
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        weights = (alpha, 1 - alpha) if alpha >= 0 else (1.0, 1.0)
        rows = max(1, (CHUNK if logits.device.type == "cpu" else 64 * CHUNK) // logits.shape[1])
        total = logits.new_zeros((), dtype=torch.float32)
        for start in range(0, len(logits), rows):
            part = slice(start, start + rows)
            loss, slope = _focal_chunk(logits[part].float(), labels[part], weights, gamma, slope=gradient is not None)
            total += loss
            if gradient is not None and slope is not None:
                gradient[part] = slope
        ctx.gradient = gradient
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        gradient, ctx.gradient = ctx.gradient, None  # scaled in place: it is the largest tensor of a training step
        if gradient is None:
            raise RuntimeError("focal_loss_sum keeps its gradient for one backward pass only")
        return gradient.mul_(grad_output), None, None, None


def _focal_chunk(
    x: Tensor, labels: Tensor, weights: tuple[float, float], gamma: float, *, slope: bool
) -> tuple[Tensor, Tensor | None]:
    """Sum and slope [r, K] of rows `x` [r, K]: first as if all were negative, then each row's own class put right.

    Every row is treated alike, for to ask which have a class would make the host wait for the device.
    """
    loss, gradient = _focal_terms(x, weights[1], gamma, slope=slope)
    column, has_class, unused = (labels.clamp(min=0)[:, None], (labels >= 0)[:, None], (labels == IGNORED)[:, None])  # [r, 1]
    positive, rise = _focal_terms(-x.gather(1, column), weights[0], gamma, slope=slope)
    loss.scatter_(1, column, torch.where(has_class, positive, loss.gather(1, column))).masked_fill_(unused, 0)
    if gradient is not None and rise is not None:
        gradient.scatter_(1, column, torch.where(has_class, -rise, gradient.gather(1, column))).masked_fill_(unused, 0)
    return loss.sum(), gradient


def _focal_terms(x: Tensor, weight: float, gamma: float, *, slope: bool) -> tuple[Tensor, Tensor | None]:
    """weight p^gamma s(x), and its derivative by x."""
    p, cross_entropy = x.sigmoid(), F.softplus(x)
    factor = (p * p if gamma == 2 else p**gamma).mul_(weight)  # weight p^gamma
    loss = cross_entropy * factor
    if not slope:
        return loss, None
    return loss, cross_entropy.mul_(gamma).mul_(1 - p).add_(p).mul_(factor)


def l1_loss(input: Tensor, target: Tensor, reduction: str = "none") -> Tensor:
    """|input - target|."""
    return _reduce((input.float() - target.float()).abs(), reduction)


def smooth_l1_loss(input: Tensor, target: Tensor, beta: float = 1.0, reduction: str = "none") -> Tensor:
    """x^2 / (2 beta) where x = |input - target| < beta, x - beta / 2 beyond (Girshick 2015)."""
    return _reduce(F.smooth_l1_loss(input.float(), target.float(), beta=beta, reduction="none"), reduction)


def giou_loss(boxes: Tensor, target_boxes: Tensor, reduction: str = "none", eps: float = 1e-7) -> Tensor:
    """1 - GIoU of paired xyxy boxes, both [N, 4] (Rezatofighi et al. 2019)."""
    boxes, target_boxes = boxes.float(), target_boxes.float()
    inter_wh = _wh(torch.maximum(boxes[..., :2], target_boxes[..., :2]), torch.minimum(boxes[..., 2:], target_boxes[..., 2:]))
    hull_wh = _wh(torch.minimum(boxes[..., :2], target_boxes[..., :2]), torch.maximum(boxes[..., 2:], target_boxes[..., 2:]))
    intersection, hull = inter_wh.prod(dim=-1), hull_wh.prod(dim=-1)
    union = box_area(boxes) + box_area(target_boxes) - intersection
    giou = intersection / (union + eps) - (hull - union) / (hull + eps)
    return _reduce(1 - giou, reduction)


def _wh(top_left: Tensor, bottom_right: Tensor) -> Tensor:
    return (bottom_right - top_left).clamp(min=0)


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean":
        return loss.mean() if loss.numel() else loss.sum()
    raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
