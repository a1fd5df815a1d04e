"""What a run tells people: a progress bar with the time left, and TensorBoard."""

import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

WINDOW = 50  # steps that the shown speed and loss are averaged over


class Telemetry:
    """Progress bar and TensorBoard of rank 0; on other ranks everything is a no-op."""

    def __init__(self, folder: Path, *, enabled: bool, start_step: int, total_steps: int, batch_size: int) -> None:
        self.enabled, self.batch_size = enabled, batch_size
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.waits: deque[float] = deque(maxlen=WINDOW)  # seconds that the step waited for its batch
        self.durations: deque[float] = deque(maxlen=WINDOW)  # seconds of the step, waiting included
        self.writer: Any = None
        if enabled:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder), purge_step=start_step + 1)  # what the checkpoint does not know is redone
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
        if self.writer is not None:
            for name, value in values.items():
                if value is not None:
                    self.writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        if self.writer is not None:
            self.writer.add_image(name, image, step, dataformats="HWC")

    def say(self, message: str) -> None:
        """Prints above the bar, once for all ranks."""
        if self.enabled:
            self.bar.write(message, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        self.bar.close()
        if self.writer is not None:
            self.writer.close()
