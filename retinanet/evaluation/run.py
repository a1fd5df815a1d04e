"""A model against a data set: detect on every rank's share, evaluate on rank 0."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from retinanet.config import InputConfig
from retinanet.criterion import RetinaNetLoss
from retinanet.data.annotations import Annotations
from retinanet.data.loader import evaluation_loader
from retinanet.data.transforms import Resize
from retinanet.distributed import gather_to_main, is_main, rank, say, sum_over_ranks, world_size
from retinanet.errors import UserError
from retinanet.evaluation.coco import evaluate_rows
from retinanet.inference import detect_batches
from retinanet.postprocess import Postprocessor
from retinanet.results import COLUMNS, to_rows
from retinanet.structures import Category, Detections


@dataclass
class Evaluation:
    """What an evaluation found. On ranks other than 0 `metrics` is empty."""

    metrics: dict[str, Any]
    rows: np.ndarray  # [D, 7], see retinanet.results
    losses: dict[str, float]
    samples: list[tuple[int, Detections]]  # (image index, detections) of some images, for pictures


def evaluate_model(
    model: nn.Module,
    annotations: Annotations,
    postprocess: Postprocessor,
    input: InputConfig,
    *,
    device: torch.device,
    precision: str,
    batch_size: int,
    workers: int,
    criterion: RetinaNetLoss | None = None,
    num_samples: int = 0,
) -> Evaluation:
    """COCO metrics of `model` on `annotations`, classes mapped by name; with `criterion` also the losses.

    Unreadable images are named and have no detections. All ranks must call this.
    """
    category_ids = map_categories(postprocess.categories, annotations)
    loader = evaluation_loader(
        annotations,
        Resize(input.short_edge, input.long_edge, input.size_rounding),
        batch_size,
        workers,
        rank=rank(),
        world_size=world_size(),
    )
    index_of = {int(image_id): n for n, image_id in enumerate(annotations.image_ids)}
    rows, faults = [np.empty((0, COLUMNS))], list[str]()
    samples: list[tuple[int, Detections]] = []
    sums = torch.zeros(3, device=device)
    progress = tqdm(total=len(loader), desc="evaluate", unit="batch", leave=False, disable=not is_main())
    for batch, found, batch_losses in detect_batches(
        model, loader, postprocess, device=device, precision=precision, criterion=criterion
    ):
        if batch_losses is not None:
            sums += torch.stack(list(batch_losses))
        for target, detections, readable in zip(batch.targets, found, batch.readable, strict=True):
            if readable:
                rows.append(to_rows(target.image_id, detections, category_ids))
            if len(samples) < num_samples:
                samples.append((index_of[target.image_id], detections))
        faults += batch.faults
        progress.update()
    progress.close()
    sum_over_ranks(sums)
    gathered = gather_to_main((np.concatenate(rows), faults))
    for fault in [fault for _, part in gathered for fault in part]:
        say(f"warning: evaluated as an image without detections: {fault}")
    all_rows = np.concatenate([part for part, _ in gathered]) if gathered else rows[0]
    metrics = evaluate_rows(all_rows, annotations) if is_main() else {}
    loss_cls, loss_box, foreground = sums.tolist()
    normalizer = max(foreground, 1.0)
    losses = {"loss_cls": loss_cls / normalizer, "loss_box": loss_box / normalizer} if criterion is not None else {}
    return Evaluation(metrics, all_rows, losses, samples)


def map_categories(categories: Sequence[Category], annotations: Annotations) -> list[int]:
    """For each label of the model the data set's category id, by name; -1 where the data set has no such class.

    Says what does not match; raises `UserError` when nothing does.
    """
    id_of = {category.name: category.id for category in annotations.categories}
    ids = [id_of.get(category.name, -1) for category in categories]
    unknown = [c.name for c in categories if c.name not in id_of]
    if len(unknown) == len(categories):
        raise UserError(
            f"none of the model's classes ({', '.join(unknown[:5])}, ...) is in {annotations.source} "
            f"({', '.join(list(id_of)[:5])}, ...)"
        )
    if unknown:
        say(f"note: {annotations.source} has no class {', '.join(unknown)}: such detections are left out")
    missing = sorted(set(id_of) - {category.name for category in categories})
    if missing:
        say(f"note: the model does not know {', '.join(missing)}: their boxes cannot be found")
    return ids
