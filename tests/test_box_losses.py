"""Losses of boxes and of their deltas: hand-computed numbers, the papers' formulas in numpy, torchvision, and the extremes."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import ops

from retinanet.criterion import OF_BOXES as BOXES
from retinanet.losses import (
    ciou_loss,
    diou_loss,
    eiou_loss,
    focal_eiou_loss,
    focal_l1_loss,
    giou_loss,
    iou_loss,
    l1_loss,
    smooth_l1_loss,
)

Loss = Callable[..., Tensor]


def random_boxes(count: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator, dtype=dtype) * 60
    return torch.cat([corner, corner + 5 + torch.rand(count, 2, generator=generator, dtype=dtype) * 60], dim=1)


# --- the IoU family


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


def test_iou_losses_by_hand() -> None:
    """[0 0 4 4] and [2 0 6 4]: intersection 8, union 24, hull 6 x 4, centres 2 apart, diagonal^2 52, equal sides."""
    a, b = torch.tensor([[0.0, 0, 4, 4]]), torch.tensor([[2.0, 0, 6, 4]])
    expected = {"iou": 2 / 3, "giou": 2 / 3, "diou": 2 / 3 + 4 / 52, "ciou": 2 / 3 + 4 / 52, "eiou": 2 / 3 + 4 / 52}
    expected["focal_eiou"] = (1 / 3) ** 0.5 * expected["eiou"]
    for name, loss in BOXES.items():
        assert loss(a, b).item() == pytest.approx(expected[name], rel=1e-6), name


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


def pairs_of_boxes() -> tuple[Tensor, Tensor]:
    """Overlapping, disjoint, and (the last 20) degenerate ones."""
    generator = torch.Generator().manual_seed(0)
    corner, size = torch.rand(2, 120, 2, generator=generator) * 50, torch.rand(2, 120, 2, generator=generator) * 40 + 1
    size[0, 100:110, 0] = 0
    size[:, 110:, 1] = 0
    boxes = torch.cat([corner, corner + size], dim=-1)
    return boxes[0], boxes[1]


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_giou_equals_torchvision_on_degenerate_boxes_too(reduction: str) -> None:
    boxes, targets = pairs_of_boxes()
    loss = giou_loss(boxes, targets, reduction)
    torch.testing.assert_close(loss, ops.generalized_box_iou_loss(boxes, targets, reduction), rtol=1e-6, atol=1e-6)
    disjoint = giou_loss(boxes, targets) > 1
    assert disjoint.any() and not disjoint.all()


def test_giou_gradient_equals_torchvision_in_float64() -> None:
    boxes, targets = pairs_of_boxes()
    ours, theirs = boxes[:100].clone().requires_grad_(), boxes[:100].double().requires_grad_()
    giou_loss(ours, targets[:100]).sum().backward()
    ops.generalized_box_iou_loss(theirs, targets[:100].double()).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad.float(), rtol=1e-4, atol=1e-6)


def test_giou_gradient_is_finite_on_degenerate_and_on_equal_boxes() -> None:
    boxes, targets = pairs_of_boxes()
    for box, target in ((boxes[100:], targets[100:]), (boxes, boxes), (boxes * 0, boxes * 0), (boxes * 1e4, targets)):
        leaf = box.clone().requires_grad_()
        giou_loss(leaf, target).sum().backward()
        assert leaf.grad.isfinite().all()


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


def test_disjoint_boxes_are_pulled_together() -> None:
    box = torch.tensor([[0.0, 0, 1, 1]], requires_grad=True)
    giou_loss(box, torch.tensor([[2.0, 0, 3, 1]])).sum().backward()
    # the right edge x2 must grow: the union, 1 + x2, does, and the hull, 3, does not
    # loss = 2 - (1 + x2) / 3: slope -1/3
    assert box.grad[0, 2].item() == pytest.approx(-1 / 3, abs=1e-6)


def test_which_losses_pull_boxes_together_that_do_not_touch() -> None:
    """IoU and, as published, Focal-EIoU do not: 0 / flat there."""
    for name, loss in BOXES.items():
        boxes = torch.tensor([[0.0, 0, 2, 2]], requires_grad=True)
        loss(boxes, torch.tensor([[10.0, 0, 12, 2]])).sum().backward()
        assert boxes.grad is not None
        pulls = bool((boxes.grad[0, [0, 2]] < 0).any())  # a step against the gradient goes to the right
        assert pulls == (name not in ("iou", "focal_eiou")), name


# --- losses of deltas


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
