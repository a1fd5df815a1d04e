"""What all losses end and begin with."""

import torch
from torch import Tensor


def precise(*tensors: Tensor) -> list[Tensor]:
    """In float32 at least: a loss in 16 bits would be NaN before long."""
    return [tensor if tensor.dtype == torch.float64 else tensor.float() for tensor in tensors]


def reduce(loss: Tensor, reduction: str) -> Tensor:
    """The mean of nothing is 0, not NaN."""
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean":
        return loss.mean() if loss.numel() else loss.sum()
    raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
