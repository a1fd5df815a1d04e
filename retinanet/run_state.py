"""Where a run lives on disk, and what else than weights it needs to go on as if it had never stopped."""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retinanet.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from retinanet.config import Config
from retinanet.distributed import is_main, rank, say, share_from_main
from retinanet.errors import UserError

RETRY_MINUTES = 1.0  # until a save that failed is tried again


def output_dir(config: Config) -> Path:
    if config.output_dir is None:
        raise UserError("output_dir is not set")
    return Path(config.output_dir)


def _names() -> Iterator[str]:
    """Of a run's checkpoints, the newest first, without end."""
    yield from ("last.pt", "previous.pt")
    yield from (f"previous-{n}.pt" for n in count(2))


def _present(folder: Path) -> list[Path]:
    most = 2 + len(list(folder.glob("previous-*.pt")))
    return [folder / name for name in islice(_names(), most) if (folder / name).exists()]


def find_checkpoint(folder: Path, resume: bool) -> Checkpoint | None:
    """The newest checkpoint in `folder` that can be read; None for a fresh start. All ranks must call this.

    What cannot be read gets out of its way, as last.damaged, so that it never takes the place of a good one.
    """
    files, best = _present(folder), folder / "best.pt"
    if (files or best.exists()) and not resume:
        raise UserError(f"{folder} holds a run already: add --resume to go on with it, or name another output_dir=...")
    found, damaged = None, list[Path]()
    for file in files:
        try:
            found = load_checkpoint(file)
        except UserError as error:
            say(f"warning: {error}; trying the one before")
            damaged.append(file)
            continue
        if found.training is not None:
            say(f"resuming from {file}, step {found.training['step']}")
            break
    step = found.training["step"] if found is not None and found.training is not None else None
    if share_from_main(step) != step:
        raise UserError(f"rank {rank()} does not find what rank 0 finds in {folder}: all machines must share this folder")
    if step is None and damaged:
        raise UserError(f"none of the checkpoints in {folder} can be read: mend them, or name another output_dir=...")
    if step is None and resume:
        say(f"nothing to resume in {folder}: starting afresh")
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
        if step is None and best.exists():  # of a run whose last.pt is gone: it may be all that is left of it
            kept = next(file for n in count(1) if not (file := folder / f"best.earlier-{n}.pt").exists())
            say(f"{best} of an earlier run is kept as {best.replace(kept).name}")
        for file in damaged:
            with suppress(OSError):  # a folder that cannot be written to is said at the first save
                file.replace(file.with_suffix(".damaged"))
    return found if step is not None else None


class RunFiles:
    """The checkpoints of a run, on rank 0: last.pt and `keep` - 1 before it, saved every `minutes` at least."""

    def __init__(self, folder: Path, keep: int, minutes: float | None, saved_step: int | None) -> None:
        self.folder, self.keep, self.minutes = folder, keep, minutes
        self.saved_step = saved_step  # that of last.pt
        self.failures: dict[Path, str] = {}  # of the last attempt at each file
        self._wait(minutes)

    def is_due(self) -> bool:
        return self._next is not None and time.monotonic() >= self._next

    def save(self, checkpoint: Checkpoint) -> None:
        """Writes last.pt. A disk that is full, or another such failure, is a warning and tried again soon."""
        assert checkpoint.training is not None
        step, last = checkpoint.training["step"], self.folder / "last.pt"
        make_way = self._rotate if step != self.saved_step else None
        if self.write(last, checkpoint, make_way):
            self.saved_step = step
            self._wait(self.minutes)
        else:
            kept = "none is saved yet" if self.saved_step is None else f"that of step {self.saved_step} is kept"
            say(f"{kept}, training goes on, and saving is tried again in {RETRY_MINUTES:g} min")
            self._wait(RETRY_MINUTES)

    def write(self, file: Path, checkpoint: Checkpoint, make_way: Callable[[], None] | None = None) -> bool:
        """False if it failed, which is a warning."""
        try:
            save_checkpoint(file, checkpoint, make_way)
        except OSError as error:
            self.failures[file] = f"{file} could not be written ({error.strerror or error})"
            say(f"warning: {self.failures[file]}")
            return False
        self.failures.pop(file, None)
        return True

    def _wait(self, minutes: float | None) -> None:
        self._next = time.monotonic() + 60 * minutes if minutes is not None else None

    def _rotate(self) -> None:
        files = [self.folder / name for name in islice(_names(), self.keep)]
        for surplus in set(_present(self.folder)) - set(files):
            surplus.unlink()
        for older, newer in zip(files[:0:-1], files[-2::-1], strict=True):
            if newer.exists():
                newer.replace(older)


def random_state() -> dict[str, Any]:
    """Of all generators of this rank that something could draw from; the samples depend on none (see `data.loader`)."""
    numpy: Any = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (numpy[0], numpy[1].tolist(), *numpy[2:]),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(states: list[dict[str, Any]], seed: tuple[int, int]) -> None:
    """This rank's state of those of all ranks, else one from `seed`: where there were fewer ranks, and at the start."""
    if rank() >= len(states):
        ours = [int(n) for n in np.random.SeedSequence([*seed, rank()]).generate_state(3)]
        random.seed(ours[0])
        np.random.seed(ours[1])
        torch.manual_seed(ours[2])
        return
    state = states[rank()]
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
