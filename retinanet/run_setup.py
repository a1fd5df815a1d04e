"""From a config to what the loop needs: data, length, starting weights."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from retinanet.backbone import IMAGENET, is_backbone_file
from retinanet.checkpoint import Checkpoint
from retinanet.config import Config, differences
from retinanet.coverage import LOW_QUALITY, NOT_TRAINED, REACHED, UNREACHED, anchor_coverage
from retinanet.data.annotations import Annotations
from retinanet.data.formats import load_dataset
from retinanet.data.splits import split_images
from retinanet.distributed import is_main, main_first, say, share_from_main, world_size
from retinanet.errors import UserError
from retinanet.model import RetinaNet, build_model
from retinanet.structures import Category
from retinanet.surgery import adopt_settings, follow_normalisation, transplant
from retinanet.weights.zoo import load_weights

VALIDATIONS = 20  # at most so many in a run, unless the config asks for more
SHOWN_IMAGES, EPOCHS = 8000, (12, 100)  # a run's length, where the config gives none
POOR, POOR_CLASS, FEW = 0.95, 0.5, 10  # shares of all boxes, and of those of a class with so many, that are worth other anchors


def load_splits(config: Config, *names: str) -> list[Annotations | None]:
    """The data sets `data.train`, `data.val` or `data.test`; None for one that is not set.

    Without `data.val` a share `data.val_share` of the training images, stratified by class, is held out for it.
    """
    data = config.data
    parts: dict[str, Annotations | None] = {}
    if data.train is not None and data.val is None and data.val_share is not None and names != ("test",):
        whole = load_dataset(data.train)
        images = split_images(whole, {"train": 1 - data.val_share, "val": data.val_share}, config.seed)
        parts = {name: whole.select(some) for name, some in images.items()}
        say(f"data.val is not set: {len(images['val'])} of {len(whole)} training images are held out for it (data.val_share)")
    for name in [name for name in names if name not in parts]:
        chosen = getattr(data, name)
        parts[name] = load_dataset(chosen) if chosen is not None else None
    return [parts[name] for name in names]


def load_data(config: Config) -> tuple[Annotations, Annotations | None]:
    """Training and validation data; settles `model.num_classes`."""
    annotations, validation = load_splits(config, "train", "val")
    if annotations is None:
        raise UserError("data.train is not set: give data.train.path=..., the folder or file of a data set")
    if config.data.drop_empty:
        annotations = annotations.select(np.flatnonzero(annotations.has_boxes()))
    if not annotations.has_boxes().any():
        raise UserError(f"{annotations.source} has no boxes to learn from")
    found = len(annotations.categories)
    if config.model.num_classes not in (None, found):
        raise UserError(f"model.num_classes is {config.model.num_classes}, but {annotations.source} has {found} classes")
    config.model.num_classes = found
    if validation is not None:
        trained, measured = ({data.path(index) for index in range(len(data))} for data in (annotations, validation))
        if common := trained & measured:
            say(f"warning: {len(common)} of {len(validation)} validation images are trained on: AP says nothing of new ones")
    if validation is None and config.train.patience is not None:
        raise UserError("train.patience watches the AP on data.val: set data.val.path=..., or train.patience=null")
    return annotations, validation


def run_length(config: Config, num_images: int) -> tuple[int, int]:
    """Optimizer steps of the run, and steps between validations, if an epoch shows `num_images`.

    Where neither is given, `train.epochs` are as many as show `SHOWN_IMAGES`, within the bounds of `EPOCHS`: 1,000 steps
    of 8 images are about what new classes need, and a small data set is known by heart after 100 passes.
    """
    settings = config.train
    if settings.batch_size < world_size() or settings.accumulate_steps > math.ceil(settings.batch_size / world_size()):
        raise UserError(
            f"train.batch_size {settings.batch_size} cannot be shared by {world_size()} process(es) in "
            f"{settings.accumulate_steps} accumulated part(s) each: that would leave some without an image"
        )
    if settings.epochs is not None and settings.max_steps is not None:
        raise UserError("set at most one of train.epochs and train.max_steps")
    steps_per_epoch = math.ceil(num_images / settings.batch_size)
    epochs = settings.epochs
    if epochs is None and settings.max_steps is None:
        epochs = min(max(SHOWN_IMAGES / num_images, EPOCHS[0]), EPOCHS[1])
        say(f"length: {epochs:.1f} epochs of {num_images} images (neither train.epochs nor train.max_steps is set)")
    total = settings.max_steps or max(1, round((epochs or 0) * steps_per_epoch))
    return total, settings.validate_every_steps or max(steps_per_epoch, math.ceil(total / VALIDATIONS))


def initial_model(
    config: Config, checkpoint: Checkpoint | None, categories: tuple[Category, ...], annotations: Annotations | None = None
) -> RetinaNet:
    """Weights from, in this order: the run's own checkpoint, `train.init_from`, the backbone's, chance.

    Mean and standard deviation are taken from the first two, and `config.input` with them; with `train.adopt_model` the
    settings of the model too. With `annotations` the reach of the anchors is told, or mended (`train.fit_anchors`).
    """
    donor = _donor(config, checkpoint)
    if checkpoint is not None and (config.train.adopt_model or config.train.fit_anchors):
        asked = config.model_copy(deep=True)
        _take_over(config, checkpoint.config.model_copy(deep=True))
        if changes := [f"{key} {there}, not {here}" for key, (here, there) in differences(asked, config).items()]:
            say(f"note: as was decided when this run started: {'; '.join(changes)}")
    elif donor is not None and config.train.adopt_model:
        for key, (there, here) in adopt_settings(config, donor.config).items():
            say(f"note: {key} is {there} as {config.train.init_from} was trained, not {here}")
    if annotations is not None:
        fresh = checkpoint is None and (donor is None or config.train.init_part == "backbone")
        _take_over(config, share_from_main(_fitted(config, annotations, fresh) if is_main() else None))
    if checkpoint is not None:
        if checkpoint.categories != categories:
            raise UserError("the classes of the data are not those of the run to resume; name another output_dir=...")
        model = replace(checkpoint, config=config, ema=None).build()
    else:
        model = build_model(config.model, config.input, trained_backbone=donor is None)
        if donor is not None:
            transplant(model, config, categories, donor, str(config.train.init_from))
    follow_normalisation(config, model)
    return model


def _donor(config: Config, checkpoint: Checkpoint | None) -> Checkpoint | None:
    """The detector that `train.init_from` names, for a run that does not go on from its own `checkpoint`. A backbone's
    weights that it names become `model.backbone_weights`."""
    init_from = config.train.init_from
    if init_from is not None and (init_from in IMAGENET or is_backbone_file(init_from)):
        config.model.backbone_weights = init_from
    elif init_from is not None and checkpoint is None:
        return main_first(lambda: load_weights(init_from))
    return None


def _take_over(config: Config, decided: Config) -> None:
    """What weights and anchors may decide."""
    config.model, config.input = decided.model, decided.input
    config.augment.short_edges = decided.augment.short_edges


def _fitted(config: Config, annotations: Annotations, fresh: bool) -> Config:
    """Says how many boxes the anchors reach. With `train.fit_anchors` and heads that start `fresh` returns the config with
    anchors, and if need be an image size, that follow from the data; heads trained for other anchors would begin again."""
    suggestion = None
    if fresh and config.train.fit_anchors:
        from retinanet.anchor_search import suggest

        suggestion = suggest(annotations, config.model, config.input, config.loss, seed=config.seed, progress=True)
        coverage = suggestion.before
    else:
        coverage = anchor_coverage(annotations, config.model, config.input, config.loss, progress=True)
    reached, low, none = (coverage.share(kind) for kind in (REACHED, LOW_QUALITY, UNREACHED))
    say(
        f"anchors: {reached:.1%} of the boxes have one of IoU {config.loss.foreground_iou:g} or more, {low:.1%} learn by a "
        f"worse one, {none:.1%} not at all" + (" (by IoU: ATSS chooses otherwise)" if config.loss.matcher == "atss" else "")
    )
    boxes = np.bincount(annotations.labels[coverage.kind != NOT_TRAINED])
    hits = np.bincount(annotations.labels[coverage.kind == REACHED], minlength=len(boxes))
    poor = reached < POOR or bool((hits < POOR_CLASS * boxes)[boxes >= FEW].any())
    if poor:
        say(coverage.table(annotations))
    if suggestion is not None and suggestion.changed:
        fitted = suggestion.apply(config)
        changes = ", ".join(f"{key} {there}" for key, (_, there) in differences(config, fitted).items())
        say(f"{suggestion.reason}; taken over, as train.fit_anchors says: {changes}")
        return fitted
    if poor and suggestion is None:
        but = "train.fit_anchors takes them over" if fresh else "the heads, trained for the present ones, would begin again"
        say(f"note: tools/suggest_anchors.py looks for anchors that reach more; {but}")
    return config


def wrap_model(model: RetinaNet, config: Config, device: torch.device) -> Any:
    """The model as the loop calls it: compiled if asked, and in DDP when there are other ranks."""
    wrapped: nn.Module = torch.compile(model) if config.train.compile else model  # type: ignore[assignment]
    if world_size() == 1:
        return wrapped
    if config.model.norm == "sync" and device.type == "cpu":
        raise UserError("model.norm sync works between GPUs only: with several processes on a CPU use frozen or group")
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(wrapped, device_ids=[device.index] if device.type == "cuda" else None)
