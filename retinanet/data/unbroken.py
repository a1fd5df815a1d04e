"""Batches that go on when a loading process is killed."""

import multiprocessing
import multiprocessing.connection
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import TypeVar

from retinanet.errors import RunError

Item = TypeVar("Item")
LIVES = 3  # loaders made anew in a run
REMEDIES = {
    "SIGBUS": "; shared memory ran out: enlarge /dev/shm (docker run --shm-size=8g, or --ipc=host), or lower data.workers",
    "SIGKILL": "; if the kernel did that for want of memory (dmesg tells), lower data.workers",
}


class WorkerDiedError(BaseException):
    """A loading process ended that should not have. No `Exception`, or torch's loader would make another of it."""


def unbroken(make: Callable[[int], Iterable[Item]]) -> Iterator[Item]:
    """What the loader `make(0)` gives; when one of its processes is killed, goes on with `make(n)`, a loader without the
    first n items. Says so each time, and raises `RunError` after `LIVES` times."""
    done, deaths = 0, 0
    while True:
        others = set(multiprocessing.active_children())
        items = iter(make(done))
        workers = set(multiprocessing.active_children()) - others
        try:
            while True:
                with _watched(workers):
                    try:
                        item = next(items)
                    except StopIteration:
                        return
                yield item
                done += 1
        except WorkerDiedError as death:
            deaths += 1
            if deaths > LIVES:
                raise RunError(f"loading processes keep dying, the last: {death}") from None
            print(f"warning: {death}; loading begins anew at the same place", flush=True)


@contextmanager
def _watched(workers: set[BaseProcess]) -> Iterator[None]:
    """A worker's death is raised inside, and only there: torch raises it from a signal handler wherever the main thread is,
    be it in the middle of a step."""

    def look(*_: object) -> None:
        for worker in workers:
            if worker.exitcode:
                name = signal.Signals(-worker.exitcode).name if worker.exitcode < 0 else f"exit code {worker.exitcode}"
                raise WorkerDiedError(f"loading process {worker.pid} ended by {name}{REMEDIES.get(name, '')}")

    if not workers or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGCHLD, look)
    try:
        look()
        yield
    except Exception:  # perhaps of a half-sent batch
        multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=1)
        look()
        raise
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
