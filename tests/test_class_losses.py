"""Losses of classes: published and hand-computed numbers, float64 formulas, torchvision, and the extremes."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss as torchvision_focal_loss

from retinanet.losses import (
    FocalLoss,
    SoftmaxFocalLoss,
    classes,
    focal_loss_sum,
    sigmoid_cross_entropy_loss,
    sigmoid_focal_loss,
    softmax_focal_loss,
)

GAMMAS = [0.0, 0.5, 1.0, 2.0, 5.0]


def logit(p: float) -> Tensor:
    return torch.tensor([math.log(p / (1 - p))], dtype=torch.float64)


def focal_in_float64(logits: Tensor, targets: Tensor, alpha: float, gamma: float) -> tuple[Tensor, Tensor]:
    """Value and derivative by the paper's formula, for targets of 0 and 1 and moderate logits."""
    sign = targets.double() * 2 - 1
    x = logits.double() * sign  # p_t = sigmoid(x)
    p_t, miss = 1 / (1 + torch.exp(-x)), 1 / (1 + torch.exp(x))
    log_p_t = -torch.log1p(torch.exp(-x))
    alpha_t = targets.double() * alpha + (1 - targets.double()) * (1 - alpha) if alpha >= 0 else torch.ones_like(x)
    value = -alpha_t * miss**gamma * log_p_t
    derivative = sign * alpha_t * miss**gamma * (gamma * p_t * log_p_t - miss)  # paper, appendix B, equation 11
    return value, derivative


# --- the numbers everybody quotes


def test_cross_entropy_by_hand() -> None:
    logits, targets = torch.tensor([2.0, -1, 3, -2]), torch.tensor([1.0, 0, 1, 0])
    # ln(1 + e^-2), ln(1 + e^-1), ln(1 + e^-3), ln(1 + e^-2)
    expected = torch.tensor([0.1269280, 0.3132617, 0.0485874, 0.1269280])
    torch.testing.assert_close(sigmoid_cross_entropy_loss(logits, targets), expected, rtol=0, atol=2e-7)
    torch.testing.assert_close(sigmoid_focal_loss(logits, targets, alpha=-1, gamma=0), expected, rtol=0, atol=2e-7)
    # .25 (.119203^2 .126928 + .0474259^2 .0485874) + .75 (.268941^2 .313262 + .119203^2 .126928), divided by 4
    assert sigmoid_focal_loss(logits, targets, reduction="mean").item() == pytest.approx(0.004706109, abs=5e-9)


@pytest.mark.parametrize(
    ("p", "target", "cross_entropy", "balanced", "focal"),
    [
        (0.95, 1.0, 0.0512933, 0.0128233, 3.20583e-5),  # -ln .95; .25 of it; .05^2 of that: CE / focal = 1,600
        (0.05, 0.0, 0.0512933, 0.0384700, 9.61749e-5),  # .75 of it
        (0.05, 1.0, 2.9957323, 0.7489331, 0.6759121),  # -ln .05; .95^2: 4.4
        (0.95, 0.0, 2.9957323, 2.2467992, 2.0277363),
        (0.99, 1.0, 0.0100503, 0.0025126, 2.51259e-7),  # -ln .99; .01^2: 40,000
        (0.01, 0.0, 0.0100503, 0.0075378, 7.53776e-7),
    ],
)
def test_how_much_examples_weigh(p: float, target: float, cross_entropy: float, balanced: float, focal: float) -> None:
    x, t = logit(p), torch.tensor([target])
    assert sigmoid_cross_entropy_loss(x, t).item() == pytest.approx(cross_entropy, rel=5e-6)
    assert sigmoid_cross_entropy_loss(x, t, alpha=0.25).item() == pytest.approx(balanced, rel=1e-5)
    assert sigmoid_focal_loss(x, t).item() == pytest.approx(focal, rel=3e-6)


def test_what_the_focal_factor_divides_by() -> None:
    """The paper, section 3.2: with gamma 2 an example of p_t 0.9 costs 100x less, of 0.968 about 1000x; 0.2 keeps 0.64."""
    for p, factor in ((0.9, 0.01), (0.968, 0.032**2), (0.2, 0.64)):
        ratio = sigmoid_focal_loss(logit(p), torch.ones(1), alpha=-1) / sigmoid_cross_entropy_loss(logit(p), torch.ones(1))
        assert ratio.item() == pytest.approx(factor, rel=1e-6)


# --- sigmoid focal loss


@pytest.mark.parametrize("alpha", [0.25, 0.0, 1.0, 0.5, -1])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_focal_loss_equals_torchvision(alpha: float, gamma: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 8, generator=generator) * 4
    hard, soft = (torch.rand(40, 8, generator=generator) < 0.3).float(), torch.rand(40, 8, generator=generator)
    for targets in (hard, soft, torch.zeros(40, 8), torch.ones(40, 8)):
        ours = sigmoid_focal_loss(logits, targets, alpha, gamma)
        torch.testing.assert_close(ours, torchvision_focal_loss(logits, targets, alpha, gamma), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_focal_loss_with_soft_targets_has_torchvisions_gradient(gamma: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits, targets = torch.randn(50, generator=generator) * 3, torch.rand(50, generator=generator)
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    sigmoid_focal_loss(ours, targets, gamma=gamma).sum().backward()
    torchvision_focal_loss(theirs, targets.double(), gamma=gamma).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.25, -1])
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("target", [0.0, 1.0])
def test_value_and_gradient_follow_the_float64_formula(alpha: float, gamma: float, target: float) -> None:
    logits = torch.linspace(-60, 60, 241).requires_grad_()
    targets = torch.full_like(logits, target)
    loss = sigmoid_focal_loss(logits, targets, alpha, gamma)
    loss.sum().backward()
    value, derivative = focal_in_float64(logits.detach(), targets, alpha, gamma)
    # float32 knows gamma * log(1 - p_t), down to -300, to 2e-5: so much error has its exponential
    torch.testing.assert_close(loss, value.float(), rtol=5e-5, atol=1e-30)
    torch.testing.assert_close(logits.grad, derivative.float(), rtol=5e-5, atol=1e-30)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("size", [20.0, 90.0, 1e4])
def test_extreme_logits(gamma: float, size: float) -> None:
    logits = torch.tensor([size, -size, size, -size], requires_grad=True)
    loss = sigmoid_focal_loss(logits, torch.tensor([1.0, 1, 0, 0]), gamma=gamma)
    loss.sum().backward()
    # wrong by far: alpha_t * |logit| with slope alpha_t; right by far: nothing, or e^-20 of plain cross entropy
    torch.testing.assert_close(loss, torch.tensor([0, 0.25 * size, 0.75 * size, 0]), rtol=1e-6, atol=2e-9)
    torch.testing.assert_close(logits.grad, torch.tensor([0, -0.25, 0.75, 0]), rtol=1e-6, atol=2e-9)


def test_nan_logits_are_not_hidden() -> None:
    loss = sigmoid_focal_loss(torch.tensor([math.nan, 0.0]), torch.tensor([0.0, 0]))
    assert loss.isnan().tolist() == [True, False]


def test_gradient_reaches_half_precision_inputs() -> None:
    logits = torch.tensor([1.5, -2.5], dtype=torch.bfloat16, requires_grad=True)
    sigmoid_focal_loss(logits, torch.tensor([1.0, 0])).sum().backward()
    _, derivative = focal_in_float64(logits.detach(), torch.tensor([1.0, 0]), 0.25, 2)
    assert logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(logits.grad.double(), derivative, rtol=2**-8, atol=0)  # bfloat16 has 8 bits


# --- softmax focal loss, and the modules


def softmax_focal_in_numpy(logits: np.ndarray, target: int, alpha: float, gamma: float) -> float:
    p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    return float(-alpha * (1 - p[target]) ** gamma * np.log(p[target]))


@pytest.mark.parametrize("shape", [(6,), (2, 3, 4)])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_softmax_focal_is_the_formula(shape: tuple[int, ...], gamma: float) -> None:
    generator = torch.Generator().manual_seed(0)
    n, *rest = shape
    logits = torch.randn(n, 5, *rest, generator=generator) * 3
    target = torch.randint(0, 5, shape, generator=generator)
    alpha = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    found = softmax_focal_loss(logits, target, alpha, gamma)
    flat = logits.movedim(1, -1).reshape(-1, 5).double().numpy()
    expected = [softmax_focal_in_numpy(row, int(t), float(alpha[t]), gamma) for row, t in zip(flat, target.flatten())]
    np.testing.assert_allclose(found.flatten().numpy(), expected, rtol=2e-5, atol=1e-7)


def test_softmax_focal_without_focus_is_cross_entropy_also_with_ignored_targets() -> None:
    logits = torch.linspace(-4, 4, 24).view(4, 6)
    target = torch.tensor([0, -100, 5, 2])
    for reduction in ("none", "mean", "sum"):
        found = softmax_focal_loss(logits, target, gamma=0, reduction=reduction)
        torch.testing.assert_close(found, F.cross_entropy(logits, target, reduction=reduction))
    nothing = softmax_focal_loss(logits, torch.full((4,), 7), ignore_index=7, reduction="mean")
    assert nothing.item() == 0  # all ignored: no 0 / 0


def test_ignored_targets_have_no_gradient_whatever_their_logits() -> None:
    logits = torch.tensor([[1.0, 2.0], [torch.inf, torch.nan]]).nan_to_num(1e4).requires_grad_()
    softmax_focal_loss(logits, torch.tensor([0, -100]), reduction="sum").backward()
    assert logits.grad is not None
    assert logits.grad[0].abs().min() > 0
    assert not logits.grad[1].any()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_softmax_focal_stays_finite(gamma: float) -> None:
    x = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [100.0, 0, 0], [0, 0, 0]], requires_grad=True)
    for label in range(3):
        (slope,) = torch.autograd.grad(softmax_focal_loss(x, torch.full((4,), label), gamma=gamma).sum(), x)
        assert slope.isfinite().all()


def test_gradients_of_softmax_focal_in_float64() -> None:
    x = (torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 2).requires_grad_()
    target = torch.tensor([0, 1, 2, 3, -100, 1])
    assert torch.autograd.gradcheck(lambda x: softmax_focal_loss(x, target, torch.tensor([0.1, 0.2, 0.3, 0.4]), 1.5), x)


def test_the_modules_are_the_functions() -> None:
    logits, targets = torch.linspace(-3, 3, 12).view(4, 3), torch.eye(4, 3)
    torch.testing.assert_close(FocalLoss(0.4, 1.5)(logits, targets), sigmoid_focal_loss(logits, targets, 0.4, 1.5, "mean"))
    weights, labels = torch.tensor([1.0, 2, 3]), torch.tensor([0, 1, 2, -1])
    module = SoftmaxFocalLoss(weights, 1.0, ignore_index=-1, reduction="sum")
    expected = softmax_focal_loss(logits, labels, weights, 1.0, ignore_index=-1, reduction="sum")
    torch.testing.assert_close(module(logits, labels), expected)
    assert module.to(torch.float64).alpha.dtype == torch.float64  # moves with the module


# --- the sum that training uses


def rows_and_labels(rows: int = 700, classes: int = 7) -> tuple[Tensor, Tensor]:
    """Logits of every size, with some rows of a class, some background (-1) and some that do not count (-2)."""
    torch.manual_seed(0)
    return 6 * torch.randn(rows, classes), torch.randint(-2, classes, (rows,))


def plain_sum(logits: Tensor, labels: Tensor, alpha: float, gamma: float) -> Tensor:
    """The same by the plain function: one-hot targets of the rows that count."""
    counted = labels != -2
    targets = F.one_hot(labels.clamp(min=0), logits.shape[1]) * (labels >= 0)[:, None]
    return sigmoid_focal_loss(logits[counted], targets[counted], alpha, gamma, reduction="sum")


@pytest.mark.parametrize("chunk", [7, 100, 10**6])  # a row at a time, uneven parts, all at once
@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.6, 0.5), (0.25, 0.0), (-1.0, 3.0)])
def test_focal_loss_sum_equals_the_plain_loss(alpha: float, gamma: float, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classes, "CHUNK", chunk)
    logits, labels = rows_and_labels()
    ours, plain = (logits.clone().requires_grad_() for _ in range(2))
    found, expected = focal_loss_sum(ours, labels, alpha, gamma), plain_sum(plain, labels, alpha, gamma)
    (3 * found).backward()
    (3 * expected).backward()
    assert ours.grad is not None and plain.grad is not None
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-4, atol=1e-6)
    assert not ours.grad[labels == -2].any() and ours.grad[labels != -2].all(dim=1).any()


def test_focal_loss_sum_follows_the_float64_formula() -> None:
    logits, labels = rows_and_labels()
    ours, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    focal_loss_sum(ours, labels).backward()
    p = exact.sigmoid()
    positive = F.one_hot(labels.clamp(min=0), logits.shape[1]).bool() & (labels >= 0)[:, None]
    terms = torch.where(positive, -0.25 * (1 - p) ** 2 * F.logsigmoid(exact), -0.75 * p**2 * F.logsigmoid(-exact))
    terms[labels != -2].sum().backward()
    assert ours.grad is not None and exact.grad is not None
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("labels", [[-2, -2], [-1, -1], [0, 2]])
def test_focal_loss_sum_of_one_kind_of_rows(labels: list[int]) -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0], [2.0, 0.0, 0.0]], requires_grad=True)
    found = focal_loss_sum(logits, torch.tensor(labels))
    assert found.item() == pytest.approx(plain_sum(logits, torch.tensor(labels), 0.25, 2.0).item(), rel=1e-6)
    found.backward()
    assert logits.grad is not None and bool(logits.grad.any()) == (labels != [-2, -2])


def test_focal_loss_sum_of_nothing() -> None:
    logits = torch.zeros(0, 3, requires_grad=True)
    focal_loss_sum(logits, torch.zeros(0, dtype=torch.int64)).backward()
    assert logits.grad is not None and logits.grad.shape == (0, 3)


def test_focal_loss_sum_hides_nan_only_where_it_does_not_count() -> None:
    logits = torch.tensor([[float("nan")], [1.0]], requires_grad=True)
    found = focal_loss_sum(logits, torch.tensor([-2, -1]))
    found.backward()
    assert found.isfinite() and logits.grad is not None and logits.grad.isfinite().all()
    assert focal_loss_sum(logits.detach(), torch.tensor([-1, -1])).isnan()


def test_focal_loss_sum_of_half_precision_is_computed_in_float32() -> None:
    logits, labels = rows_and_labels()
    half = logits.bfloat16().requires_grad_()
    found = focal_loss_sum(half, labels)
    found.backward()
    assert half.grad is not None and half.grad.dtype == torch.bfloat16
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(plain_sum(half.detach().float(), labels, 0.25, 2.0).item(), rel=1e-5)


def test_focal_loss_sum_keeps_slopes_of_float16_that_are_scaled_later() -> None:
    """Without its scale the slope at -8 is 8e-11; float16 ends at 6e-8, and below 6e-5 loses digits."""
    logits = torch.tensor([[-5.0], [-8.0]], dtype=torch.float16, requires_grad=True)
    (2**20 * focal_loss_sum(logits, torch.tensor([-1, -1]))).backward()
    _, derivative = focal_in_float64(logits.detach(), torch.zeros(2, 1), 0.25, 2)
    assert logits.grad is not None and logits.grad.dtype == torch.float16
    torch.testing.assert_close(logits.grad.double(), 2**20 * derivative, rtol=2**-9, atol=0)  # float16 has 11 bits


def test_focal_loss_sum_says_that_its_gradient_is_gone() -> None:
    logits, labels = rows_and_labels()
    found = focal_loss_sum(logits.requires_grad_(), labels)
    found.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="for one backward pass only"):
        found.backward()
