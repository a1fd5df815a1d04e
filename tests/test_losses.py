"""What every loss promises: its reductions, its gradient, float32 whatever comes in, and finite values."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from test_box_losses import random_boxes
from torch import Tensor

from retinanet import losses
from retinanet.criterion import OF_BOXES, OF_DELTAS

Loss = Callable[..., Tensor]


ON_CLASSES: dict[str, Loss] = {
    "ce": losses.sigmoid_cross_entropy_loss,
    "balanced": partial(losses.sigmoid_cross_entropy_loss, alpha=0.75),
    **{f"focal {gamma}": partial(losses.sigmoid_focal_loss, gamma=gamma) for gamma in (0.0, 0.5, 1.0, 2.0, 5.0)},
}


LOSSES = ON_CLASSES | OF_DELTAS | OF_BOXES


def example(name: str, dtype: torch.dtype = torch.float32) -> tuple[Loss, Tensor, Tensor]:
    """A loss, and 12 inputs and targets of the kind it takes."""
    if name in OF_BOXES:
        return LOSSES[name], random_boxes(12, 5, dtype), random_boxes(12, 6, dtype)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, generator=generator, dtype=dtype) * 2
    return LOSSES[name], x, (torch.rand(12, generator=generator) > 0.5).to(dtype)


@pytest.mark.parametrize("name", LOSSES)
def test_reductions(name: str) -> None:
    loss, x, y = example(name)
    each = loss(x, y)
    assert each.shape == (12,)
    torch.testing.assert_close(loss(x, y, reduction="sum"), each.sum())
    torch.testing.assert_close(loss(x, y, reduction="mean"), each.mean())
    with pytest.raises(ValueError, match="'none', 'mean' or 'sum', got 'average'"):
        loss(x, y, reduction="average")


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_reductions_of_nothing_are_zero_with_a_gradient(name: str, reduction: str) -> None:
    loss, x, y = example(name)
    leaf = x[:0].requires_grad_()
    total = loss(leaf, y[:0], reduction=reduction)
    total.backward()
    assert total.item() == 0  # torch's own mean would be NaN
    assert leaf.grad is not None and leaf.grad.shape == leaf.shape


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_computed_in_float32_whatever_comes_in_and_inside_autocast(name: str, dtype: torch.dtype) -> None:
    loss, x, y = example(name)
    expected = loss(x.to(dtype).float(), y)
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found = loss(x.to(dtype), y)
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("ciou", "focal_eiou")])
def test_gradients_in_float64(name: str) -> None:
    # not those with factors that the gradient leaves out: tests/test_box_losses.py has theirs
    loss, x, y = example(name, torch.float64)
    assert torch.autograd.gradcheck(lambda x: loss(x, y), x.requires_grad_(), eps=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", ON_CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_classification_losses_stay_finite(name: str, dtype: torch.dtype) -> None:
    x = torch.tensor([-1e4, -100, -20, 0, 20, 100, 1e4], dtype=dtype).repeat(2).requires_grad_()
    loss = LOSSES[name](x, torch.tensor([0.0] * 7 + [1.0] * 7))
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite().all() and x.grad is not None and x.grad.isfinite().all()
