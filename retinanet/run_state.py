"""Where a run lives on disk, and what else than weights it needs to go on as if it had never stopped."""

from pathlib import Path
from typing import Any

import torch

from retinanet.checkpoint import Checkpoint, load_checkpoint
from retinanet.config import Config
from retinanet.distributed import say
from retinanet.errors import UserError


def output_dir(config: Config) -> Path:
    if config.output_dir is None:
        raise UserError("output_dir is not set")
    return Path(config.output_dir)


def find_checkpoint(folder: Path, resume: bool) -> Checkpoint | None:
    """The newest checkpoint in `folder` that can be read; None for a fresh start."""
    files = [folder / name for name in ("last.pt", "previous.pt")]
    if not resume:
        if files[0].exists() or files[1].exists():
            raise UserError(f"{folder} holds a run already: add --resume to go on with it, or name another output_dir=...")
        folder.mkdir(parents=True, exist_ok=True)
        return None
    for file in files:
        if not file.exists():
            continue
        try:
            checkpoint = load_checkpoint(file)
        except UserError as error:
            say(f"warning: {error}; trying the one before")
            continue
        if checkpoint.training is not None:
            say(f"resuming from {file}, step {checkpoint.training['step']}")
            return checkpoint
    say(f"nothing to resume in {folder}: starting afresh")
    folder.mkdir(parents=True, exist_ok=True)
    return None


def random_state() -> dict[str, Any]:
    """Torch's generators: nothing else that a run draws from outlives a step (see `data.loader`)."""
    return {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
