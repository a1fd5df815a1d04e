"""Every loss that is offered: published numbers, independent formulas, torchvision, gradients, extremes."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import ops

from retinanet.losses import (
    FocalLoss,
    SoftmaxFocalLoss,
    ciou_loss,
    diou_loss,
    eiou_loss,
    focal_eiou_loss,
    focal_l1_loss,
    giou_loss,
    iou_loss,
    l1_loss,
    sigmoid_cross_entropy_loss,
    sigmoid_focal_loss,
    smooth_l1_loss,
    softmax_focal_loss,
)

Loss = Callable[..., Tensor]
BOXES: dict[str, Loss] = {
    "iou": iou_loss,
    "giou": giou_loss,
    "diou": diou_loss,
    "ciou": ciou_loss,
    "eiou": eiou_loss,
    "focal_eiou": focal_eiou_loss,
}
DELTAS: dict[str, Loss] = {"l1": l1_loss, "smooth_l1": smooth_l1_loss, "focal_l1": focal_l1_loss}


def random_boxes(count: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator, dtype=dtype) * 60
    return torch.cat([corner, corner + 5 + torch.rand(count, 2, generator=generator, dtype=dtype) * 60], dim=1)


# --- classification: the numbers everybody quotes


def logit(p: float) -> Tensor:
    return torch.tensor([math.log(p / (1 - p))], dtype=torch.float64)


def test_cross_entropy_by_hand() -> None:
    logits, targets = torch.tensor([2.0, -1, 3, -2]), torch.tensor([1.0, 0, 1, 0])
    # ln(1 + e^-2), ln(1 + e^-1), ln(1 + e^-3), ln(1 + e^-2)
    expected = torch.tensor([0.1269280, 0.3132617, 0.0485874, 0.1269280])
    torch.testing.assert_close(sigmoid_cross_entropy_loss(logits, targets), expected, rtol=0, atol=2e-7)
    assert sigmoid_focal_loss(logits, targets, reduction="mean").item() == pytest.approx(0.004706109, abs=5e-9)


@pytest.mark.parametrize(
    ("p", "target", "cross_entropy", "balanced", "focal"),
    [
        (0.95, 1.0, 0.0512933, 0.0128233, 3.20583e-5),  # easy: CE / focal = 1600
        (0.05, 0.0, 0.0512933, 0.0384700, 9.61749e-5),
        (0.05, 1.0, 2.9957323, 0.7489331, 0.6759121),  # misclassified: 4.4
        (0.95, 0.0, 2.9957323, 2.2467992, 2.0277363),
        (0.99, 1.0, 0.0100503, 0.0025126, 2.51259e-7),  # very easy: 40,000
        (0.01, 0.0, 0.0100503, 0.0075378, 7.53776e-7),
    ],
)
def test_how_much_examples_weigh(p: float, target: float, cross_entropy: float, balanced: float, focal: float) -> None:
    x, t = logit(p), torch.tensor([target])
    assert sigmoid_cross_entropy_loss(x, t).item() == pytest.approx(cross_entropy, rel=5e-6)
    assert sigmoid_cross_entropy_loss(x, t, alpha=0.25).item() == pytest.approx(balanced, rel=1e-5)
    assert sigmoid_focal_loss(x, t).item() == pytest.approx(focal, rel=3e-6)


def test_what_the_focal_factor_divides_by() -> None:
    """(1 - p_t)^2 is 1 / 977 at p_t 0.968 and 0.64 at p_t 0.2."""
    for p, factor in ((0.968, 0.032**2), (0.2, 0.64)):
        ratio = sigmoid_focal_loss(logit(p), torch.ones(1), alpha=-1) / sigmoid_cross_entropy_loss(logit(p), torch.ones(1))
        assert ratio.item() == pytest.approx(factor, rel=1e-6)


# --- softmax focal loss


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


def test_the_modules_are_the_functions() -> None:
    logits, targets = torch.linspace(-3, 3, 12).view(4, 3), torch.eye(4, 3)
    torch.testing.assert_close(FocalLoss(0.4, 1.5)(logits, targets), sigmoid_focal_loss(logits, targets, 0.4, 1.5, "mean"))
    weights, labels = torch.tensor([1.0, 2, 3]), torch.tensor([0, 1, 2, -1])
    module = SoftmaxFocalLoss(weights, 1.0, ignore_index=-1, reduction="sum")
    expected = softmax_focal_loss(logits, labels, weights, 1.0, ignore_index=-1, reduction="sum")
    torch.testing.assert_close(module(logits, labels), expected)
    assert module.to(torch.float64).alpha.dtype == torch.float64  # moves with the module


# --- box losses


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("giou", ops.generalized_box_iou_loss), ("diou", ops.distance_box_iou_loss), ("ciou", ops.complete_box_iou_loss)],
)
def test_as_in_torchvision(name: str, theirs: Loss) -> None:
    boxes, targets = random_boxes(200, 0), random_boxes(200, 1)
    mine, other = (boxes.clone().requires_grad_() for _ in range(2))
    torch.testing.assert_close(BOXES[name](mine, targets), theirs(other, targets), rtol=1e-5, atol=1e-6)
    BOXES[name](mine, targets).sum().backward()
    theirs(other, targets).sum().backward()
    torch.testing.assert_close(mine.grad, other.grad, rtol=1e-3, atol=1e-6)


def iou_family_in_numpy(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """One pair, straight from the papers' definitions."""
    width, height = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    (wa, ha), (wb, hb) = ((box[2] - box[0], box[3] - box[1]) for box in (a, b))
    union = wa * ha + wb * hb - width * height
    iou = width * height / union
    cw, ch = (max(a[i + 2], b[i + 2]) - min(a[i], b[i]) for i in (0, 1))
    rho2 = sum(((a[i] + a[i + 2]) / 2 - (b[i] + b[i + 2]) / 2) ** 2 for i in (0, 1))
    diou = 1 - iou + rho2 / (cw**2 + ch**2)
    v = 4 / math.pi**2 * (math.atan(wb / hb) - math.atan(wa / ha)) ** 2
    eiou = diou + (wa - wb) ** 2 / cw**2 + (ha - hb) ** 2 / ch**2
    return {
        "iou": 1 - iou,
        "giou": 1 - iou + (cw * ch - union) / (cw * ch),
        "diou": diou,
        "ciou": diou + (v * v / (1 - iou + v) if v else 0.0),
        "eiou": eiou,
        "focal_eiou": iou**0.5 * eiou,
    }


@pytest.mark.parametrize("name", BOXES)
def test_iou_losses_are_their_formulas(name: str) -> None:
    boxes, targets = random_boxes(100, 2, torch.float64), random_boxes(100, 3, torch.float64)
    expected = [iou_family_in_numpy(a, b)[name] for a, b in zip(boxes.numpy(), targets.numpy())]
    np.testing.assert_allclose(BOXES[name](boxes, targets).numpy(), expected, rtol=1e-6)


def test_iou_losses_by_hand() -> None:
    """[0 0 4 4] and [2 0 6 4]: intersection 8, union 24, hull 6 x 4, centres 2 apart, diagonal^2 52, equal sides."""
    a, b = torch.tensor([[0.0, 0, 4, 4]]), torch.tensor([[2.0, 0, 6, 4]])
    expected = {"iou": 2 / 3, "giou": 2 / 3, "diou": 2 / 3 + 4 / 52, "ciou": 2 / 3 + 4 / 52, "eiou": 2 / 3 + 4 / 52}
    expected["focal_eiou"] = (1 / 3) ** 0.5 * expected["eiou"]
    for name, loss in BOXES.items():
        assert loss(a, b).item() == pytest.approx(expected[name], rel=1e-6), name


@pytest.mark.parametrize("name", BOXES)
@pytest.mark.parametrize(
    "pair",
    [
        ([0.0, 0, 0, 0], [0.0, 0, 0, 0]),  # points
        ([5.0, 5, 5, 9], [1.0, 1, 3, 3]),  # a line
        ([0.0, 0, 4, 4], [0.0, 0, 4, 4]),  # the same
        ([0.0, 0, 1, 1], [1e4, 1e4, 1e4 + 1, 1e4 + 1]),  # far apart
        ([4.0, 4, 1, 1], [0.0, 0, 4, 4]),  # corners exchanged
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_iou_losses_stay_finite(name: str, pair: tuple[list[float], list[float]], dtype: torch.dtype) -> None:
    boxes, targets = torch.tensor([pair[0]], dtype=dtype, requires_grad=True), torch.tensor([pair[1]], dtype=dtype)
    loss = BOXES[name](boxes, targets)
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert boxes.grad is not None and boxes.grad.isfinite().all() and loss.isfinite().all() and (loss >= -1e-6).all()


def test_which_losses_pull_boxes_together_that_do_not_touch() -> None:
    """IoU and, as published, Focal-EIoU do not: 0 / flat there."""
    for name, loss in BOXES.items():
        boxes = torch.tensor([[0.0, 0, 2, 2]], requires_grad=True)
        loss(boxes, torch.tensor([[10.0, 0, 12, 2]])).sum().backward()
        assert boxes.grad is not None
        pulls = bool((boxes.grad[0, [0, 2]] < 0).any())  # a step against the gradient goes to the right
        assert pulls == (name not in ("iou", "focal_eiou")), name


# --- losses of deltas


def test_focal_l1_by_hand() -> None:
    """beta 0.8: alpha = 0.8 e = 2.1746; at 1 both parts are alpha (1 - 2 ln 0.8) / 4 = 0.78627."""
    at_1 = 0.8 * math.e * (1 - 2 * math.log(0.8)) / 4
    found = focal_l1_loss(torch.tensor([0.0, 1.0, -1.0, 1.0000001, 3.0]), torch.zeros(5))
    beyond = at_1 - 2 * 0.8 * math.e * math.log(0.8)  # a straight line from there
    torch.testing.assert_close(found, torch.tensor([0.0, at_1, at_1, at_1, beyond]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("beta", [1 / math.e, 0.8, 1.0])
def test_focal_l1_slopes_at_most_1(beta: float) -> None:
    x = torch.linspace(-4, 4, 4001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(focal_l1_loss(x, torch.zeros_like(x), beta).sum(), x)
    assert slope.abs().max().item() == pytest.approx(1, abs=1e-5)  # at 1 / (e beta)
    steepest = abs(x[slope.abs().argmax()].item())
    assert steepest == pytest.approx(1 / (math.e * beta), abs=3e-3) or beta == 1 / math.e  # there it stays 1 beyond 1


def test_focal_l1_refuses_other_betas() -> None:
    with pytest.raises(ValueError, match=r"beta must lie in 1/e\.\.1"):
        focal_l1_loss(torch.zeros(1), torch.zeros(1), beta=0.3)


def test_l1_and_smooth_l1_as_in_torch() -> None:
    a, b = torch.linspace(-3, 3, 50), torch.linspace(2, -1, 50)
    torch.testing.assert_close(l1_loss(a, b), F.l1_loss(a, b, reduction="none"))
    torch.testing.assert_close(smooth_l1_loss(a, b), F.smooth_l1_loss(a, b, reduction="none"))  # beta 1
    torch.testing.assert_close(smooth_l1_loss(a, b, 0.1), F.smooth_l1_loss(a, b, reduction="none", beta=0.1))


# --- all of them

CLASSES: dict[str, Loss] = {
    "ce": sigmoid_cross_entropy_loss,
    "balanced": partial(sigmoid_cross_entropy_loss, alpha=0.75),
    **{f"focal {gamma}": partial(sigmoid_focal_loss, gamma=gamma) for gamma in (0.0, 0.5, 1.0, 2.0, 5.0)},
}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_classification_losses_stay_finite(name: str, dtype: torch.dtype) -> None:
    x = torch.tensor([-1e4, -100, -20, 0, 20, 100, 1e4], dtype=dtype).repeat(2).requires_grad_()
    loss = CLASSES[name](x, torch.tensor([0.0] * 7 + [1.0] * 7))
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite().all() and x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_softmax_focal_stays_finite(gamma: float) -> None:
    x = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [100.0, 0, 0], [0, 0, 0]], requires_grad=True)
    for label in range(3):
        (slope,) = torch.autograd.grad(softmax_focal_loss(x, torch.full((4,), label), gamma=gamma).sum(), x)
        assert slope.isfinite().all()


@pytest.mark.parametrize("name", [*CLASSES, *DELTAS, *(name for name in BOXES if name not in ("ciou", "focal_eiou"))])
def test_gradients_in_float64(name: str) -> None:
    if name in BOXES:
        x, y = random_boxes(12, 5, torch.float64).requires_grad_(), random_boxes(12, 6, torch.float64)
    else:
        generator = torch.Generator().manual_seed(1)
        x = (torch.randn(12, generator=generator, dtype=torch.float64) * 2).requires_grad_()
        y = (torch.rand(12, generator=generator) > 0.5).double()
    loss = (CLASSES | DELTAS | BOXES)[name]
    assert torch.autograd.gradcheck(lambda x: loss(x, y), x, eps=1e-6, atol=1e-5)


def test_gradients_of_softmax_focal_in_float64() -> None:
    x = (torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 2).requires_grad_()
    target = torch.tensor([0, 1, 2, 3, -100, 1])
    assert torch.autograd.gradcheck(lambda x: softmax_focal_loss(x, target, torch.tensor([0.1, 0.2, 0.3, 0.4]), 1.5), x)


@pytest.mark.parametrize(
    ("whole", "parts"),
    [
        (ciou_loss, lambda a, b, iou, v: diou_loss(a, b) + v.detach() / (1 - iou.detach() + v.detach() + 1e-7) * v),
        (focal_eiou_loss, lambda a, b, iou, v: iou.detach() ** 0.5 * eiou_loss(a, b)),
    ],
)
def test_the_factors_of_ciou_and_focal_eiou_are_constants(whole: Loss, parts: Callable[..., Tensor]) -> None:
    """gradcheck cannot see a detached factor: the gradient is held against the same written out."""
    a, b = random_boxes(20, 7, torch.float64).requires_grad_(), random_boxes(20, 8, torch.float64)
    iou = 1 - iou_loss(a, b)
    aspect = [torch.atan((box[:, 2] - box[:, 0]) / (box[:, 3] - box[:, 1])) for box in (a, b)]
    v = 4 / math.pi**2 * (aspect[0] - aspect[1]) ** 2
    (expected,) = torch.autograd.grad(parts(a, b, iou, v).sum(), a)
    (found,) = torch.autograd.grad(whole(a, b).sum(), a)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", [*CLASSES, *DELTAS, *BOXES])
def test_reductions(name: str) -> None:
    loss = (CLASSES | DELTAS | BOXES)[name]
    x, y = (random_boxes(5, 1), random_boxes(5, 2)) if name in BOXES else (torch.linspace(-2, 2, 5), torch.ones(5))
    each = loss(x, y)
    assert each.shape == (5,)
    torch.testing.assert_close(loss(x, y, reduction="sum"), each.sum())
    torch.testing.assert_close(loss(x, y, reduction="mean"), each.mean())
    assert loss(x[:0], y[:0], reduction="mean").item() == 0  # of nothing, not NaN
    with pytest.raises(ValueError, match="reduction must be"):
        loss(x, y, reduction="average")


@pytest.mark.parametrize("name", [*CLASSES, *DELTAS, *BOXES])
def test_float32_inside_autocast(name: str) -> None:
    loss = (CLASSES | DELTAS | BOXES)[name]
    x, y = (random_boxes(5, 1), random_boxes(5, 2)) if name in BOXES else (torch.linspace(-2, 2, 5), torch.ones(5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(x, y)
    torch.testing.assert_close(found, loss(x, y), rtol=0, atol=0)
