"""From a config to what the loop needs: data, length, starting weights."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from retinanet.backbone import IMAGENET
from retinanet.checkpoint import Checkpoint
from retinanet.config import Config
from retinanet.data.annotations import Annotations
from retinanet.data.formats import load_dataset
from retinanet.distributed import main_first, world_size
from retinanet.errors import UserError
from retinanet.model import RetinaNet, build_model
from retinanet.structures import Category
from retinanet.surgery import follow_normalisation, transplant
from retinanet.weights.zoo import load_weights

VALIDATIONS = 20  # at most so many in a run, unless the config asks for more


def load_data(config: Config) -> tuple[Annotations, Annotations | None]:
    """Training and validation data; settles `model.num_classes`."""
    if config.data.train is None:
        raise UserError("data.train is not set: it needs 'path' and 'annotations'")
    annotations = load_dataset(config.data.train)
    if config.data.drop_empty:
        annotations = annotations.select(np.flatnonzero(annotations.has_boxes()))
    if not annotations.has_boxes().any():
        raise UserError(f"{annotations.source} has no boxes to learn from")
    found = len(annotations.categories)
    if config.model.num_classes not in (None, found):
        raise UserError(f"model.num_classes is {config.model.num_classes}, but {annotations.source} has {found} classes")
    config.model.num_classes = found
    validation = load_dataset(config.data.val) if config.data.val is not None else None
    return annotations, validation


def run_length(config: Config, num_images: int) -> tuple[int, int]:
    """Optimizer steps of the run, and steps between validations."""
    settings = config.train
    share = settings.batch_size // world_size()
    if share * world_size() != settings.batch_size or share % settings.accumulate_steps:
        raise UserError(
            f"train.batch_size {settings.batch_size} cannot be shared by {world_size()} process(es) in "
            f"{settings.accumulate_steps} accumulated part(s) each"
        )
    if (settings.epochs is None) == (settings.max_steps is None):
        raise UserError("set exactly one of train.epochs and train.max_steps")
    steps_per_epoch = math.ceil(num_images / settings.batch_size)
    total = settings.max_steps or max(1, round((settings.epochs or 0) * steps_per_epoch))
    return total, settings.validate_every_steps or max(steps_per_epoch, math.ceil(total / VALIDATIONS))


def initial_model(config: Config, checkpoint: Checkpoint | None, categories: tuple[Category, ...]) -> RetinaNet:
    """Weights from, in this order: the run's own checkpoint, `train.init_from`, the backbone's, chance.

    Mean and standard deviation are taken from the first two, and `config.input` with them.
    """
    init_from = config.train.init_from
    if init_from in IMAGENET:
        config.model.backbone_weights, init_from = init_from, None
    model = build_model(config.model, config.input, trained_backbone=checkpoint is None and init_from is None)
    if checkpoint is not None:
        if checkpoint.categories != categories:
            raise UserError("the classes of the data are not those of the run to resume; name another output_dir=...")
        _load_strictly(model, checkpoint.model)
    elif init_from is not None:
        transplant(model, config, categories, main_first(lambda: load_weights(init_from)), init_from)
    follow_normalisation(config, model)
    return model


def _load_strictly(model: RetinaNet, state: dict[str, Tensor]) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise UserError(f"the checkpoint's weights do not fit this config's model: {first}") from None


def wrap_model(model: RetinaNet, config: Config, device: torch.device) -> Any:
    """The model as the loop calls it: compiled if asked, and in DDP when there are other ranks."""
    wrapped: nn.Module = torch.compile(model) if config.train.compile else model  # type: ignore[assignment]
    if world_size() == 1:
        return wrapped
    if config.model.norm == "sync" and device.type == "cpu":
        raise UserError("model.norm sync works between GPUs only: with several processes on a CPU use frozen or group")
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(wrapped, device_ids=[device.index] if device.type == "cuda" else None)
