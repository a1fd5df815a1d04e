"""How many loading processes there are, how far they run ahead, and what they may fill of memory with that."""

import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from retinanet.distributed import say

MOST_WORKERS, MOST_AHEAD = 8, 4
PATIENCE = 600  # seconds for a batch, after which the run ends instead of hanging
SHARED_MEMORY = Path("/dev/shm")  # through it batches come from the processes; in Docker it has 64 MB
MEMORY, CONTAINER = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
LIMITS = [("max", "current"), ("limit_in_bytes", "usage_in_bytes")]  # of a container's memory, in cgroup v2 and v1


class Loading(NamedTuple):
    workers: int
    ahead: int  # batches that each has ready before they are asked for


def choose_workers(asked: int | None, world_size: int) -> int:
    """Loading processes for this rank: as asked, else the cores that its share of the machine has, at most 8."""
    if asked is not None:
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_WORKERS, cores // local_ranks(world_size)))


def local_ranks(world_size: int = 1) -> int:
    """Ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size))


def plan_loading(workers: int, batch_bytes: int) -> Loading:
    """`workers` processes with up to four batches ahead each. Where that is too much for the memory that is left, fewer
    ahead; where one each is too much, fewer processes or none, which is said."""
    room, story = min(_rooms(), default=(0, ""))
    if not workers or not story:
        return Loading(workers, MOST_AHEAD)
    fits = max(0, room // local_ranks() // batch_bytes - 1)  # one is at work
    if fits < workers:
        size = f"{batch_bytes / 1e6:.3g} MB"
        say(f"note: {fits} loading process(es), not {workers}: a batch takes up to {size}, {story}")
    return Loading(min(fits, workers), max(1, min(MOST_AHEAD, fits // workers)))


def _rooms() -> Iterator[tuple[int, str]]:
    """Bytes for batches that wait, and why no more: half of /dev/shm is left to the validation's, memory has other uses."""
    if SHARED_MEMORY.is_dir():
        free = shutil.disk_usage(SHARED_MEMORY).free
        yield free // 2, f"{SHARED_MEMORY} has {free / 1e6:.3g} MB left: enlarge it (docker run --shm-size=8g, or --ipc=host)"
    if (left := available_memory()) is not None:
        yield left // 4, f"memory has {left / 1e6:.3g} MB left: lower the batch size or the size of pictures"


def available_memory() -> int | None:
    """Bytes that this process may still take, by the machine and by its container's limit; None where it is no Linux."""
    if not MEMORY.exists():
        return None
    left = [1024 * _number("MemAvailable:", MEMORY.read_text())]
    for (limit, used), folder in zip(LIMITS, (CONTAINER, CONTAINER / "memory")):
        if (folder / f"memory.{limit}").exists():
            allowed, taken, parts = ((folder / f"memory.{name}").read_text().strip() for name in (limit, used, "stat"))
            cached = _number("inactive_file", parts) + _number("active_file", parts)  # of the disk: given back when needed
            left += [int(allowed) - int(taken) + cached] if allowed != "max" else []
    return max(0, min(left))


def _number(name: str, text: str) -> int:
    """Of the line that begins with `name`, in v1 with that of the whole group (total_)."""
    found = re.findall(rf"^(?:total_)?{name}\s+(\d+)", text, re.MULTILINE)
    return int(found[-1]) if found else 0


def quiet_worker(_: int) -> None:
    """A worker keeps to one core, since OpenCV's threads would fight for the others, and leaves Ctrl-C to the main process."""
    import cv2

    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
