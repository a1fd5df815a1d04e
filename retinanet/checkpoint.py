"""Checkpoints: tensors and plain data only, loadable with `weights_only=True`, written so that a crash cannot tear one."""

import os
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retinanet.config import Config, parse_config
from retinanet.errors import UserError
from retinanet.model import RetinaNet, build_model
from retinanet.structures import Category

FORMAT = 1


@dataclass
class Checkpoint:
    """A detector on disk. `training` (optimizer, position, RNG) is only in those that a run can be resumed from."""

    config: Config
    categories: tuple[Category, ...]
    model: dict[str, Tensor]
    ema: dict[str, Tensor] | None = None
    thresholds: dict[str, float] = field(default_factory=dict)  # best-F1 score by class name
    training: dict[str, Any] | None = None

    def build(self) -> RetinaNet:
        """The detector for inference: with the averaged weights where there are any, in eval mode."""
        model = build_model(self.config.model, self.config.input, trained_backbone=False)
        model.load_state_dict(self.ema or self.model)
        return model.eval()


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Writes to a temporary file, flushes it to the disk, then renames it to `path`."""
    content = {
        "format": FORMAT,
        "config": checkpoint.config.model_dump(mode="json"),
        "categories": [{"id": c.id, "name": c.name} for c in checkpoint.categories],
        "model": checkpoint.model,
        "ema": checkpoint.ema,
        "thresholds": checkpoint.thresholds,
        "training": checkpoint.training,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a checkpoint onto the CPU; executes nothing. Raises `UserError` in one line when it is none or is damaged."""
    path = Path(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"weights {path} do not exist") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"weights {path} cannot be read, torn or not a checkpoint: {reason}") from None
    if not isinstance(content, dict) or not {"format", "config", "categories", "model"} <= set(content):
        raise UserError(f"{path} is not a checkpoint of this project")
    if content["format"] > FORMAT:
        raise UserError(f"{path} was written by a newer version of this project (format {content['format']})")
    return Checkpoint(
        config=parse_config(content["config"], where=f"config in {path}"),
        categories=tuple(Category(c["id"], c["name"]) for c in content["categories"]),
        model=content["model"],
        ema=content["ema"],
        thresholds=content["thresholds"],
        training=content["training"],
    )
