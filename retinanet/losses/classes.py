"""Classification losses, from logits: cross entropy, its balanced form, and the focal losses (Lin et al. 2017)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from retinanet.losses.reduction import precise, reduce

IGNORED = -2  # a label of `focal_loss_sum`; -1 is background
CHUNK = 2**18  # logits at once: a megabyte in float32, so that ten passes over it stay in the cores' caches


def sigmoid_cross_entropy_loss(logits: Tensor, targets: Tensor, alpha: float | None = None, reduction: str = "none") -> Tensor:
    """-log(p_t), p = sigmoid(logits); with `alpha` -alpha_t log(p_t), the balanced form (Lin et al. 2017, equations 1, 3)."""
    return sigmoid_focal_loss(logits, targets, alpha, 0.0, reduction)


def sigmoid_focal_loss(
    logits: Tensor, targets: Tensor, alpha: float | None = 0.25, gamma: float = 2.0, reduction: str = "none"
) -> Tensor:
    """-alpha_t (1 - p_t)^gamma log(p_t), p = sigmoid(logits) (Lin et al. 2017, equation 5).

    `targets` has the shape of `logits` and holds 0 or 1 (or anything between). `alpha` weighs the positives and
    1 - alpha the negatives; None, or as in torchvision a negative alpha, switches the weighting off.

    Computed from log-probabilities throughout, so that value and gradient stay finite at any logit and any
    gamma >= 0: the power of a probability that has underflowed to 0 would have an infinite slope for gamma < 1.
    """
    logits, targets = precise(logits, targets)
    log_p, log_not_p = F.logsigmoid(logits), F.logsigmoid(-logits)
    cross_entropy = -(targets * log_p + (1 - targets) * log_not_p)
    # log(1 - p_t), with p_t = p t + (1 - p)(1 - t)
    log_miss = torch.logaddexp(log_p + torch.log1p(-targets), log_not_p + torch.log(targets))
    loss = torch.exp(gamma * log_miss) * cross_entropy
    if alpha is not None and alpha >= 0:
        loss = (alpha * targets + (1 - alpha) * (1 - targets)) * loss
    return reduce(loss, reduction)


def focal_loss_sum(logits: Tensor, labels: Tensor, alpha: float | None = 0.25, gamma: float = 2.0) -> Tensor:
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
    def forward(ctx: Any, logits: Tensor, labels: Tensor, alpha: float | None, gamma: float) -> Tensor:
        # float16 has no room for small slopes before `backward` scales them, which is what torch.amp.GradScaler is for
        kept = torch.float32 if logits.dtype == torch.float16 else logits.dtype
        gradient = torch.empty_like(logits, dtype=kept) if ctx.needs_input_grad[0] else None
        weights = (1.0, 1.0) if alpha is None or alpha < 0 else (alpha, 1 - alpha)
        rows = max(1, (CHUNK if logits.device.type == "cpu" else 32 * CHUNK) // logits.shape[1])
        room = logits.new_empty(4, min(rows, len(logits)), logits.shape[1], dtype=torch.float32)
        total = logits.new_zeros((), dtype=torch.float32)
        for start in range(0, len(logits), rows):
            part = slice(start, start + rows)
            x, into = logits[part].float(), None if gradient is None else gradient[part]
            total += _focal_chunk(x, labels[part], weights, gamma, room[:, : len(x)], into)
        ctx.gradient, ctx.dtype = gradient, logits.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        gradient, ctx.gradient = ctx.gradient, None  # scaled in place: it is the largest tensor of a training step
        if gradient is None:
            raise RuntimeError("focal_loss_sum keeps its gradient for one backward pass only")
        return gradient.mul_(grad_output).to(ctx.dtype), None, None, None


def _focal_chunk(
    x: Tensor, labels: Tensor, weights: tuple[float, float], gamma: float, room: Tensor, gradient: Tensor | None
) -> Tensor:
    """The sum of rows `x` [r, K], and into `gradient` [r, K], if given, its slope: first as if all were negative, then each
    row's own class put right. `room` [4, r, K] is written over.

    Every row is treated alike, for to ask which have a class would make the host wait for the device.
    """
    column, has_class, unused = (labels.clamp(min=0)[:, None], (labels >= 0)[:, None], labels == IGNORED)  # [r, 1], [r, 1], [r]
    own = -x.gather(1, column)
    own_room = own.new_empty(4, *own.shape)
    loss, positive = _focal_terms(x, weights[1], gamma, room), _focal_terms(own, weights[0], gamma, own_room)
    _clear(loss.scatter_(1, column, torch.where(has_class, positive, loss.gather(1, column))), unused)
    if gradient is not None:
        slope, rise = _focal_slope(gamma, room), _focal_slope(gamma, own_room)
        gradient.copy_(_clear(slope.scatter_(1, column, torch.where(has_class, -rise, slope.gather(1, column))), unused))
    return loss.sum()


def _clear(values: Tensor, rows: Tensor) -> Tensor:
    """Sets `rows` [r] of `values` [r, K] to 0. On a CPU the mask may be looked at, and few rows be written instead of all."""
    if values.device.type == "cpu":
        return values.index_fill_(0, rows.nonzero()[:, 0], 0)
    return values.masked_fill_(rows[:, None], 0)


def _focal_terms(x: Tensor, weight: float, gamma: float, room: Tensor) -> Tensor:
    """weight p^gamma s(x), the last of `room` [4, *x.shape]; the others are left for `_focal_slope`."""
    p, cross_entropy, factor, loss = room
    torch.sigmoid(x, out=p)
    F.softplus(x, out=cross_entropy)  # type: ignore[call-arg]  # it takes one as all elementwise functions do
    (torch.mul(p, p, out=factor) if gamma == 2 else torch.pow(p, gamma, out=factor)).mul_(weight)  # weight p^gamma
    return torch.mul(cross_entropy, factor, out=loss)


def _focal_slope(gamma: float, room: Tensor) -> Tensor:
    """The derivative by x of what `_focal_terms` left in `room`; in its place."""
    p, cross_entropy, factor, _ = room
    return cross_entropy.mul_(gamma).lerp_(p.new_ones(()), p).mul_(factor)  # lerp: gamma s(x) (1 - p) + p


def softmax_focal_loss(
    logits: Tensor,
    target: Tensor,
    alpha: float | Tensor = 1.0,
    gamma: float = 2.0,
    ignore_index: int = -100,
    reduction: str = "none",
) -> Tensor:
    """-alpha (1 - p_t)^gamma log(p_t), p_t the softmax probability of the true class, for classes that exclude each other.

    `logits` [N, C, ...], `target` [N, ...] int64: images, segmentations, volumes. `alpha` is a number or one for each class,
    [C]. Where the target is `ignore_index` the loss is 0, and "mean" divides by the number of the others; code that is
    going around averages over the ignored ones too.
    """
    (logits,) = precise(logits)
    counts = target != ignore_index
    target = target.where(counts, 0)
    log_p = F.log_softmax(logits, dim=1)
    log_p_t = log_p.gather(1, target.unsqueeze(1)).squeeze(1)
    # log(1 - p_t) from the other classes' logits: 1 - p_t itself rounds to 0, where its powers below 1 have no slope
    others = log_p.scatter(1, target.unsqueeze(1), -torch.inf).logsumexp(dim=1)
    weight = alpha.to(log_p)[target] if isinstance(alpha, Tensor) else alpha
    factor = torch.exp(gamma * others) if gamma else 1.0
    loss = torch.where(counts, -weight * factor * log_p_t, 0)
    if reduction == "mean":
        return loss.sum() / counts.sum().clamp(min=1)
    return reduce(loss, reduction)


class FocalLoss(nn.Module):
    """`sigmoid_focal_loss` as a module."""

    def __init__(self, alpha: float | None = 0.25, gamma: float = 2.0, reduction: str = "mean") -> None:
        super().__init__()
        self.alpha, self.gamma, self.reduction = alpha, gamma, reduction

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return sigmoid_focal_loss(logits, targets, self.alpha, self.gamma, self.reduction)


class SoftmaxFocalLoss(nn.Module):
    """`softmax_focal_loss` as a module; weights for each class move with it to a device."""

    alpha: float | Tensor

    def __init__(
        self, alpha: float | Tensor = 1.0, gamma: float = 2.0, ignore_index: int = -100, reduction: str = "mean"
    ) -> None:
        super().__init__()
        if isinstance(alpha, Tensor):
            self.register_buffer("alpha", alpha)
        else:
            self.alpha = alpha
        self.gamma, self.ignore_index, self.reduction = gamma, ignore_index, reduction

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return softmax_focal_loss(logits, target, self.alpha, self.gamma, self.ignore_index, self.reduction)
