"""The losses, as pure functions. Each computes in float32 whatever comes in, also inside autocast.

`reduction` is "none" (default), "mean" or "sum", as in torchvision.ops.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from retinanet.boxes import box_area


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
