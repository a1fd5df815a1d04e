"""Batches to detections: the one road that validation, evaluation and prediction share."""

import copy
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from retinanet.backbone import FrozenBatchNorm2d
from retinanet.criterion import LossSums, RetinaNetLoss
from retinanet.model import RetinaNet
from retinanet.precision import DTYPES
from retinanet.structures import Batch, Detections


def prepare(model: nn.Module, precision: str = "fp32", *, compile: bool = False) -> nn.Module:
    """A copy of `model` that only infers: norms folded into the convolutions before them (exact but for rounding), these
    in `precision`, laid out channels last. `compile` pays on a GPU and for many pictures; the first of each size wait.

    What is no `RetinaNet`, such as an ONNX file's network, is returned as it is.
    """
    if not isinstance(model, RetinaNet):
        return model
    fast = copy.deepcopy(model, {id(weight): weight for weight in model.parameters()}).eval()  # those are copied below
    _fold_norms(fast)
    for module in fast.modules():
        for name, weight in list(module.named_parameters(recurse=False)):  # not mean, std, anchors: a bf16 number has 8 bits
            layout = torch.channels_last if weight.ndim == 4 else torch.contiguous_format
            value = weight.detach().to(DTYPES[precision], copy=True, memory_format=layout)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
    return torch.compile(fast) if compile else fast  # type: ignore[return-value]


def _fold_norms(model: nn.Module) -> None:
    for parent in list(model.modules()):
        for (_, conv), (second, norm) in pairwise(list(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, FrozenBatchNorm2d | nn.modules.batchnorm._BatchNorm):
                statistics: Any = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
                conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)
                setattr(parent, second, nn.Identity())


def detect_batches(
    model: nn.Module,
    batches: Iterable[Batch],
    postprocess: Callable[..., list[Detections]],  # (model's output, image_sizes, original_sizes)
    *,
    device: torch.device,
    criterion: RetinaNetLoss | None = None,
) -> Iterator[tuple[Batch, list[Detections], LossSums | None]]:
    """Detections of each image in pixels of its original, on the CPU; with `criterion` also the losses, from the same
    forward. `model` is one that `prepare` gave."""
    for loaded in batches:
        batch = loaded.to(device)
        with torch.inference_mode():
            predictions = model(batch.images, batch.image_sizes)
            losses = criterion.sums(predictions, batch.targets) if criterion is not None else None
            detections = postprocess(predictions, batch.image_sizes, batch.original_sizes)
            detections = [found.cpu() for found in detections]
        yield batch, detections, losses  # outside: inference mode must not reach the caller's code
