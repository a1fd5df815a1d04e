"""Losses: published and hand-computed numbers, float64 formulas, torchvision, and the extremes."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss
from torchvision.ops import sigmoid_focal_loss as torchvision_focal_loss

from retinanet.losses import classes, focal_loss_sum, giou_loss, l1_loss, sigmoid_focal_loss, smooth_l1_loss

GAMMAS = [0.0, 0.5, 1.0, 2.0, 5.0]


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def focal(p: float, target: float, alpha: float = 0.25, gamma: float = 2.0) -> float:
    """The loss of one anchor that says probability `p`."""
    return sigmoid_focal_loss(torch.tensor([logit(p)]), torch.tensor([target]), alpha, gamma).item()


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


# --- focal loss: numbers


def test_cross_entropy_is_focal_loss_with_gamma_0_and_no_alpha() -> None:
    logits, targets = torch.tensor([2.0, -1, 3, -2]), torch.tensor([1.0, 0, 1, 0])
    loss = sigmoid_focal_loss(logits, targets, alpha=-1, gamma=0)
    # ln(1 + e^-2), ln(1 + e^-1), ln(1 + e^-3), ln(1 + e^-2)
    torch.testing.assert_close(loss, torch.tensor([0.1269280, 0.3132617, 0.0485874, 0.1269280]), rtol=0, atol=2e-7)


def test_mean_of_four() -> None:
    logits, targets = torch.tensor([2.0, -1, 3, -2]), torch.tensor([1.0, 0, 1, 0])
    # .25 (.119203^2 .126928 + .0474259^2 .0485874) + .75 (.268941^2 .313262 + .119203^2 .126928), divided by 4
    assert sigmoid_focal_loss(logits, targets, reduction="mean").item() == pytest.approx(0.004706109, rel=1e-6)


@pytest.mark.parametrize(
    ("p", "target", "cross_entropy", "balanced", "with_focus"),
    [
        (0.95, 1, 0.0512933, 0.0128233, 3.20583e-5),  # -ln .95; .25 of it; .05^2 of that
        (0.05, 0, 0.0512933, 0.0384700, 9.61749e-5),  # .75 of it
        (0.05, 1, 2.9957323, 0.7489331, 0.6759121),  # -ln .05; .95^2
        (0.95, 0, 2.9957323, 2.2467992, 2.0277363),
        (0.99, 1, 0.0100503, 0.0025126, 2.51259e-7),  # -ln .99; .01^2
        (0.01, 0, 0.0100503, 0.0075378, 7.53776e-7),
    ],
)
def test_easy_and_hard_examples(p: float, target: float, cross_entropy: float, balanced: float, with_focus: float) -> None:
    assert focal(p, target, alpha=-1, gamma=0) == pytest.approx(cross_entropy, rel=2e-5)
    assert focal(p, target, gamma=0) == pytest.approx(balanced, rel=2e-5)
    assert focal(p, target) == pytest.approx(with_focus, rel=2e-5)


@pytest.mark.parametrize(
    ("p", "factor"),
    [
        (0.95, 1600),  # 1 / (.25 * .05^2)
        (0.05, 4.432),  # 1 / (.25 * .95^2)
        (0.99, 40_000),  # 1 / (.25 * .01^2)
    ],
)
def test_how_much_a_positive_is_down_weighted(p: float, factor: float) -> None:
    assert focal(p, 1, alpha=-1, gamma=0) / focal(p, 1) == pytest.approx(factor, rel=1e-4)


def test_modulating_factor_of_the_paper() -> None:
    # section 3.2: with gamma 2 an example of p_t .9 has a 100x lower loss, of .968 about 1000x
    for p, factor in ((0.9, 0.01), (0.968, 0.032**2), (0.2, 0.64)):
        assert focal(p, 1, alpha=-1) / focal(p, 1, alpha=-1, gamma=0) == pytest.approx(factor, rel=1e-4)


# --- focal loss: references


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_compute_in_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(30, 4, generator=generator).cumsum(dim=1).to(dtype)
    others = torch.rand(30, 4, generator=generator).cumsum(dim=1)
    for loss in (sigmoid_focal_loss, l1_loss, smooth_l1_loss, giou_loss):
        expected = loss(boxes.float(), others.clamp(0, 1))
        for enabled in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                got = loss(boxes, others.clamp(0, 1))
            assert got.dtype == torch.float32
            assert torch.equal(got, expected)


def test_gradient_reaches_half_precision_inputs() -> None:
    logits = torch.tensor([1.5, -2.5], dtype=torch.bfloat16, requires_grad=True)
    sigmoid_focal_loss(logits, torch.tensor([1.0, 0])).sum().backward()
    _, derivative = focal_in_float64(logits.detach(), torch.tensor([1.0, 0]), 0.25, 2)
    assert logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(logits.grad.double(), derivative, rtol=2**-8, atol=0)  # bfloat16 has 8 bits


# --- L1 and smooth L1


def test_l1_and_smooth_l1_by_hand() -> None:
    input, target = torch.tensor([0.0, 0.5, 1, -3]), torch.tensor([0.0, 0, 0, 1])
    assert l1_loss(input, target).tolist() == [0, 0.5, 1, 4]
    assert smooth_l1_loss(input, target).tolist() == [0, 0.125, 0.5, 3.5]  # x^2 / 2 below 1, x - 1/2 from there
    assert smooth_l1_loss(input, target, beta=0.5).tolist() == [0, 0.25, 0.75, 3.75]  # x - 1/4


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_l1_and_smooth_l1_equal_torch(reduction: str) -> None:
    generator = torch.Generator().manual_seed(0)
    input, target = torch.randn(20, 4, generator=generator), torch.randn(20, 4, generator=generator)
    torch.testing.assert_close(l1_loss(input, target, reduction=reduction), F.l1_loss(input, target, reduction=reduction))
    for beta in (0.0, 0.1, 1.0):
        torch.testing.assert_close(
            smooth_l1_loss(input, target, beta, reduction), F.smooth_l1_loss(input, target, beta=beta, reduction=reduction)
        )


# --- GIoU


@pytest.mark.parametrize(
    ("box", "target", "expected"),
    [
        ([0, 0, 10, 10], [0, 0, 10, 10], 0),
        ([0, 0, 10, 10], [5, 0, 15, 10], 2 / 3),  # IoU 50 / 150; the hull, 150, is the union
        ([0, 0, 10, 10], [5, 5, 15, 15], 1 - 25 / 175 + 50 / 225),  # hull 225, union 175
        ([0, 0, 1, 1], [2, 0, 3, 1], 1 + 1 / 3),  # disjoint: hull 3, union 2
        ([0, 0, 1, 1], [99, 0, 100, 1], 1 + 98 / 100),
        ([0, 0, 10, 10], [2, 5, 8, 5], 1),  # no height, inside: IoU 0, hull is union
        ([4, 4, 4, 4], [4, 4, 4, 4], 1),  # two points: 0 / eps
        ([0, 0, 0, 10], [10, 0, 10, 10], 2),  # two lines, 10 apart: hull 100, union 0
    ],
)
def test_giou_by_hand(box: list[float], target: list[float], expected: float) -> None:
    loss = giou_loss(torch.tensor([box], dtype=torch.float32), torch.tensor([target], dtype=torch.float32))
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def pairs_of_boxes() -> tuple[Tensor, Tensor]:
    """Overlapping, disjoint, and (the last 20) degenerate ones."""
    generator = torch.Generator().manual_seed(0)
    corner, size = torch.rand(2, 120, 2, generator=generator) * 50, torch.rand(2, 120, 2, generator=generator) * 40 + 1
    size[0, 100:110, 0] = 0
    size[:, 110:, 1] = 0
    boxes = torch.cat([corner, corner + size], dim=-1)
    return boxes[0], boxes[1]


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_giou_equals_torchvision(reduction: str) -> None:
    boxes, targets = pairs_of_boxes()
    loss = giou_loss(boxes, targets, reduction)
    torch.testing.assert_close(loss, generalized_box_iou_loss(boxes, targets, reduction), rtol=1e-6, atol=1e-6)
    disjoint = giou_loss(boxes, targets) > 1
    assert disjoint.any() and not disjoint.all()


def test_giou_gradient_equals_torchvision_in_float64() -> None:
    boxes, targets = pairs_of_boxes()
    ours, theirs = boxes[:100].clone().requires_grad_(), boxes[:100].double().requires_grad_()
    giou_loss(ours, targets[:100]).sum().backward()
    generalized_box_iou_loss(theirs, targets[:100].double()).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad.float(), rtol=1e-4, atol=1e-6)


def test_giou_gradient_is_finite_on_degenerate_and_on_equal_boxes() -> None:
    boxes, targets = pairs_of_boxes()
    for box, target in ((boxes[100:], targets[100:]), (boxes, boxes), (boxes * 0, boxes * 0), (boxes * 1e4, targets)):
        leaf = box.clone().requires_grad_()
        giou_loss(leaf, target).sum().backward()
        assert leaf.grad.isfinite().all()


def test_disjoint_boxes_are_pulled_together() -> None:
    box = torch.tensor([[0.0, 0, 1, 1]], requires_grad=True)
    giou_loss(box, torch.tensor([[2.0, 0, 3, 1]])).sum().backward()
    # the right edge x2 must grow: the union, 1 + x2, does, and the hull, 3, does not
    # loss = 2 - (1 + x2) / 3: slope -1/3
    assert box.grad[0, 2].item() == pytest.approx(-1 / 3, abs=1e-6)


# --- reductions

LOSSES = [sigmoid_focal_loss, l1_loss, smooth_l1_loss, giou_loss]


@pytest.mark.parametrize("loss", LOSSES)
def test_reductions(loss: Callable[..., Tensor]) -> None:
    boxes, targets = torch.tensor([[0.0, 0, 2, 2], [1, 1, 3, 4]]), torch.tensor([[0.0, 0, 1, 1], [0, 1, 1, 1]])
    each = loss(boxes, targets)
    assert torch.equal(loss(boxes, targets, reduction="none"), each)
    torch.testing.assert_close(loss(boxes, targets, reduction="sum"), each.sum())
    torch.testing.assert_close(loss(boxes, targets, reduction="mean"), each.sum() / each.numel())
    assert each.shape == ((2,) if loss is giou_loss else (2, 4))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_reductions_of_nothing_are_zero_with_a_gradient(loss: Callable[..., Tensor], reduction: str) -> None:
    empty = torch.zeros(0, 4, requires_grad=True)
    total = loss(empty, torch.zeros(0, 4), reduction=reduction)
    total.backward()
    assert total.item() == 0  # torch's own mean would be NaN
    assert empty.grad.shape == (0, 4)


@pytest.mark.parametrize("loss", LOSSES)
def test_unknown_reduction(loss: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="'none', 'mean' or 'sum', got 'average'"):
        loss(torch.zeros(1, 4), torch.zeros(1, 4), reduction="average")


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
