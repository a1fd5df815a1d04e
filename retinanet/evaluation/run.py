"""A model, or a file of results, against a data set: detect on every rank's share, evaluate on rank 0."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from retinanet.config import InputConfig
from retinanet.criterion import RetinaNetLoss
from retinanet.data.annotations import Annotations
from retinanet.data.loader import evaluation_loader
from retinanet.data.transforms import Resize
from retinanet.data.unbroken import unbroken
from retinanet.distributed import gather_to_main, is_main, rank, say, sum_over_ranks, world_size
from retinanet.errors import UserError
from retinanet.evaluation.coco import Engine, choose_evaluator, evaluate_rows, metrics_table
from retinanet.inference import detect_batches, prepare
from retinanet.postprocess import Postprocessor
from retinanet.results import COLUMNS, entry_rows, read_entries, to_rows, write_detections, write_json
from retinanet.structures import Category, Detections, Target, shortened


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
    category_ids: list[int] | None = None,
    engine: Engine = "auto",
) -> Evaluation:
    """COCO metrics of `model` on `annotations`, classes mapped by name; with `criterion` also the losses.

    `category_ids` are those of `map_categories`; None asks it, which says what it finds. Unreadable images are named and
    have no detections. All ranks must call this.
    """
    choose_evaluator(engine)  # one that is not there is found before the work, not after it
    ids = map_categories(postprocess.categories, annotations) if category_ids is None else category_ids
    label_of = torch.tensor([ids.index(c.id) if c.id in ids else -1 for c in annotations.categories])  # the model's labels
    load = partial(
        evaluation_loader,
        annotations,
        Resize(input.short_edge, input.long_edge, input.size_rounding),
        batch_size,
        workers,
        rank=rank(),
        world_size=world_size(),
        pin=device.type == "cuda",
        reduced=input.reduced_decode,
    )
    loader = load()
    index_of = {int(image_id): n for n, image_id in enumerate(annotations.image_ids)}
    rows, faults = [np.empty((0, COLUMNS))], list[str]()
    samples: list[tuple[int, Detections]] = []
    sums = torch.zeros(3, device=device)
    whole = unbroken(lambda done: load(first=done) if done else loader)
    batches = (replace(batch, targets=[_with_labels(t, label_of) for t in batch.targets]) for batch in whole)
    fast = prepare(model, precision)
    answers = detect_batches(fast, batches, postprocess, device=device, criterion=criterion)
    progress = tqdm(answers, "evaluate", len(loader), leave=False, disable=not is_main(), unit="batch")
    for batch, found, batch_losses in progress:
        if batch_losses is not None:
            sums += torch.stack(list(batch_losses))
        for target, detections, readable in zip(batch.targets, found, batch.readable, strict=True):
            if readable:
                rows.append(to_rows(target.image_id, detections, ids))
            if len(samples) < num_samples:
                samples.append((index_of[target.image_id], detections))
        faults += batch.faults
    sum_over_ranks(sums)
    gathered = gather_to_main((np.concatenate(rows), faults))
    unread = [fault for _, part in gathered for fault in part]
    if unread and len(unread) == len(annotations):
        raise UserError(f"none of the {len(unread)} images of {annotations.source} can be read; the first: {unread[0]}")
    for fault in unread:
        say(f"warning: evaluated as an image without detections: {fault}")
    all_rows = np.concatenate([part for part, _ in gathered]) if gathered else rows[0]
    metrics = evaluate_rows(all_rows, annotations, engine=engine) if is_main() else {}
    loss_cls, loss_box, _ = (sums / sums[2].clamp(min=1)).tolist()
    losses = {"loss_cls": loss_cls, "loss_box": loss_box} if criterion is not None else {}
    return Evaluation(metrics, all_rows, losses, samples)


def write_evaluation(metrics: dict[str, Any], rows: np.ndarray, annotations: Annotations, folder: Path) -> None:
    """Prints the table and writes `metrics.json` and `detections.json` into `folder`."""
    print(metrics_table(metrics))
    file_names = {int(image_id): annotations.file_names[n] for n, image_id in enumerate(annotations.image_ids)}
    write_detections(folder / "detections.json", rows, file_names, {c.id: c.name for c in annotations.categories})
    write_json(folder / "metrics.json", metrics)
    print(f"written: {folder / 'metrics.json'} and {folder / 'detections.json'}")


def _with_labels(target: Target, label_of: Tensor) -> Target:
    """The data set's labels as the model's; what the model does not know is neither object nor background to its losses."""
    labels = label_of[target.labels]
    known = labels >= 0
    ignored = torch.cat([target.ignore_boxes, target.boxes[~known]])
    return Target(target.boxes[known], labels[known], ignored, target.image_id)


def map_categories(categories: Sequence[Category], annotations: Annotations) -> list[int]:
    """For each label of the model the data set's category id, by name; -1 where the data set has no such class.

    Says which ids differ and what does not match; raises `UserError` when nothing does.
    """
    ids = _ids_by_name(categories, annotations, "the model")
    missing = sorted({category.name for category in annotations.categories} - {category.name for category in categories})
    if missing:
        say(f"note: the model does not know {', '.join(missing)}: their boxes cannot be found")
    return ids


def read_results(path: Path, annotations: Annotations) -> np.ndarray:
    """Rows [D, 7] of a results file with the ids of `annotations`.

    Entries that name their class and image, as those of detections.json do, go by these names, whatever their ids; what
    that changes is said. Raises `UserError` naming file and entry.
    """
    entries = read_entries(path)
    rows = entry_rows(entries, path)
    names = [entry.get("category_name") for entry in entries]
    named = sorted({Category(int(row[6]), name) for row, name in zip(rows, names) if isinstance(name, str)})
    if named:
        id_of = dict(zip(named, _ids_by_name(named, annotations, str(path)), strict=True))
        rows[:, 6] = [id_of.get(Category(int(row[6]), name), row[6]) for row, name in zip(rows, names)]
    _match_images(entries, rows, annotations, path)
    return rows[rows[:, 6] != -1]


def _match_images(entries: list[Any], rows: np.ndarray, annotations: Annotations, path: Path) -> None:
    """Sets the image ids of `rows` whose entry names its file. Folders do not count, so file names must differ."""
    id_of = {PurePath(annotations.file_names[n]).name: int(i) for n, i in enumerate(annotations.image_ids)}
    if len(id_of) < len(annotations):
        return
    other = set()
    for n, entry in enumerate(entries):
        if isinstance(entry.get("file_name"), str):
            name = PurePath(entry["file_name"]).name
            if name not in id_of:
                raise UserError(f"{path}: entry {n} is of {name}, which {annotations.source} does not have")
            if id_of[name] != rows[n, 0]:
                other.add(name)
                rows[n, 0] = id_of[name]
    if other:
        say(f"note: {path} numbers {len(other)} images otherwise than {annotations.source}: matched by file name")


def _ids_by_name(categories: Sequence[Category], annotations: Annotations, whose: str) -> list[int]:
    id_of = {category.name: category.id for category in annotations.categories}
    ids = [id_of.get(category.name, -1) for category in categories]
    unknown = [c.name for c in categories if c.name not in id_of]
    if len(unknown) == len(categories):
        theirs = shortened(list(id_of))
        raise UserError(f"none of the classes of {whose} ({shortened(unknown)}) is in {annotations.source} ({theirs})")
    if unknown:
        say(f"note: {annotations.source} has no class {', '.join(unknown)}: such detections are left out")
    other = [f"{c.name} {n} instead of {c.id}" for c, n in zip(categories, ids, strict=True) if n not in (-1, c.id)]
    if other:
        say(f"note: {annotations.source} numbers classes otherwise than {whose}: matched by name ({shortened(other)})")
    return ids
