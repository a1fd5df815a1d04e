"""Ctrl-C and SIGTERM: a step is finished and saved first, and the exit code says how to go on."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self

from retinanet.distributed import is_main

INTERRUPTED, PREEMPTED = 130, 75  # 128 + SIGINT, as shells have it; EX_TEMPFAIL, "try again", on which schedulers can requeue
ECHO = 2.0  # seconds: torchrun passes on a signal that its scheduler may have sent to all of its processes as well


class Interrupts:
    """While inside, the first signal is obeyed at once, as a `KeyboardInterrupt`, or if `patient` noted in `asked`, for the
    loop to stop after its step. A second one ends the process."""

    def __init__(self) -> None:
        self.asked: int | None = None
        self.patient = False
        self._since = 0.0

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        return PREEMPTED if self.asked == signal.SIGTERM else INTERRUPTED

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Not patient inside: nothing is lost there that could not be made up."""
        self.patient = False
        try:
            if self.asked is not None:
                raise KeyboardInterrupt
            yield
        finally:
            self.patient = True

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None:
            if "TORCHELASTIC_RUN_ID" in os.environ and time.monotonic() - self._since < ECHO:
                return
            os._exit(128 + number)
        self.asked, self._since = number, time.monotonic()
        if not self.patient:
            raise KeyboardInterrupt
        if is_main():  # written without `print`, which may be what was interrupted
            os.write(2, b"\nstopping after this step (once more to stop at once) ...\n")
