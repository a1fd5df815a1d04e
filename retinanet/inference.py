"""Batches to detections: the one road that validation, evaluation and prediction share."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from retinanet.criterion import LossSums, RetinaNetLoss
from retinanet.precision import autocast
from retinanet.structures import Batch, Detections


def detect_batches(
    model: nn.Module,
    batches: Iterable[Batch],
    postprocess: Callable[..., list[Detections]],  # (model's output, image_sizes, original_sizes)
    *,
    device: torch.device,
    precision: str = "fp32",
    criterion: RetinaNetLoss | None = None,
) -> Iterator[tuple[Batch, list[Detections], LossSums | None]]:
    """Detections of each image in pixels of its original, on the CPU; with `criterion` also the losses, from the same
    forward. The model's mode is restored at the end."""
    was_training = model.training
    model.eval()
    try:
        for loaded in batches:
            batch = loaded.to(device)
            with torch.inference_mode():
                with autocast(precision, device):
                    predictions = model(batch.images, batch.image_sizes)
                losses = criterion.sums(predictions, batch.targets) if criterion is not None else None
                detections = postprocess(predictions, batch.image_sizes, batch.original_sizes)
                detections = [found.cpu() for found in detections]
            yield batch, detections, losses  # outside: inference mode must not reach the caller's code
    finally:
        model.train(was_training)
