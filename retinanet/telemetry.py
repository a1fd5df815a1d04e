"""What a run tells people: a progress bar with the time left, and TensorBoard."""

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

WINDOW = 50  # steps that the shown speed and loss are averaged over
SILENCE = 60.0  # seconds without curves after one that could not be written


class Telemetry:
    """Progress bar and TensorBoard of rank 0; on other ranks everything is a no-op."""

    def __init__(
        self, folder: Path, *, enabled: bool, start_step: int, total_steps: int, batch_size: int, redo: bool = False
    ) -> None:
        """With `redo` what was written of `start_step` itself is written again."""
        self.folder, self.enabled, self.batch_size = folder, enabled, batch_size
        self.purge_step: int | None = start_step + (not redo)  # what the checkpoint does not know is done again
        self.silent_until = 0.0
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.waits: deque[float] = deque(maxlen=WINDOW)  # seconds that the step waited for its batch
        self.durations: deque[float] = deque(maxlen=WINDOW)  # seconds of the step, waiting included
        self.writer: Any = None
        self.bar = tqdm(
            initial=start_step,
            total=total_steps,
            desc="train",
            unit="step",
            disable=not enabled,
            mininterval=0.5 if sys.stderr.isatty() else 20,
            smoothing=0.05,
        )
        self.last = time.perf_counter()

    @property
    def speed(self) -> dict[str, float]:
        """Images a second, and the share of time spent waiting for data: near 0 when loading keeps up."""
        seconds = max(sum(self.durations), 1e-9)
        images = self.batch_size * len(self.durations)
        return {"speed/images_per_second": images / seconds, "speed/data_wait_share": sum(self.waits) / seconds}

    def step(self, loss: float, wait: float) -> None:
        now = time.perf_counter()
        self.durations.append(now - self.last)
        self.waits.append(wait)
        self.last = now
        self.losses.append(loss)
        mean = float(np.nanmean(self.losses)) if any(np.isfinite(self.losses)) else float("nan")
        rate, wait_share = self.speed.values()
        self.bar.set_postfix_str(f"loss {mean:.3f}, {rate:.1f} img/s, data wait {wait_share:.0%}", refresh=False)
        self.bar.update()

    def resume_clock(self) -> None:
        """After a pause (validation) that is no training time."""
        self.last = time.perf_counter()

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        for name, value in values.items():
            if value is not None:
                self._write(methodcaller("add_scalar", name, value, step))

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        self._write(methodcaller("add_image", name, image, step, dataformats="HWC"))

    def precision_recall(self, step: int, name: str, hits: np.ndarray, kept: np.ndarray, boxes: int) -> None:
        """A curve of what was right [T] and kept [T] at thresholds evenly from 0 to 1, `boxes` being there to find."""
        precision, recall, negatives = hits / np.maximum(kept, 1), hits / max(boxes, 1), np.zeros_like(hits)
        counts = hits, kept - hits, negatives, boxes - hits, precision, recall
        self._write(methodcaller("add_pr_curve_raw", name, *counts, step, num_thresholds=len(hits)))

    def _write(self, write: Callable[[Any], None]) -> None:
        """A full disk costs curves, not the run: a minute's, then a new file is begun."""
        if not self.enabled or time.monotonic() < self.silent_until:
            return
        try:
            if self.writer is None:
                self.writer, self.purge_step = _open_tensorboard(self.folder, self.purge_step), None
            write(self.writer)
        except OSError as error:
            self.writer, self.silent_until = None, time.monotonic() + SILENCE
            self.say(f"warning: TensorBoard's file in {self.folder} could not be written ({error.strerror})")

    def say(self, message: str) -> None:
        """Prints above the bar, once for all ranks."""
        if self.enabled:
            self.bar.write(message, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        if self.writer is not None:
            self._write(methodcaller("close"))
        self.bar.close()


def _open_tensorboard(folder: Path, purge_step: int | None) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    def quiet(failure: threading.ExceptHookArgs) -> None:
        if not issubclass(failure.exc_type, OSError):  # that of its writing thread is raised again at the next write
            threading.__excepthook__(failure)

    threading.excepthook = quiet
    return SummaryWriter(str(folder), purge_step=purge_step)
