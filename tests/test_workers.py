"""retinanet/data/workers.py: loading processes and what they hold ready, by the memory that is left."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from retinanet.data import workers
from retinanet.data.workers import Loading, available_memory, choose_workers, plan_loading

MB = 1_000_000
Memory = Callable[..., None]


class Disk(NamedTuple):
    free: int


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Memory:
    """A function that sets what is free: of /dev/shm (None: there is none) and in all (None: unknown), in MB."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)

    def free(shared: float | None, total: float | None) -> None:
        monkeypatch.setattr(workers, "SHARED_MEMORY", tmp_path if shared is not None else tmp_path / "none")
        monkeypatch.setattr(workers.shutil, "disk_usage", lambda _: Disk(int((shared or 0) * MB)))
        monkeypatch.setattr(workers, "available_memory", lambda: None if total is None else int(total * MB))

    return free


@pytest.mark.parametrize(
    ("shared", "total", "batch", "loading"),
    [
        (8000, 64000, 50, Loading(8, 4)),  # 8 * 4 * 50 = 1600 of the 4000 allowed
        (1800, 64000, 50, Loading(8, 2)),  # 900 / 50 = 18 batches, one of them in use: 17 / 8 = 2 each
        (900, 64000, 50, Loading(8, 1)),  # 9, one in use: 1 each
        (8000, 1800, 50, Loading(8, 1)),  # a quarter of memory is 450: 9
        (None, 64000, 50, Loading(8, 4)),  # no Linux
        (None, None, 50, Loading(8, 4)),
        (64, 64000, 0.1, Loading(8, 4)),  # Docker's 64 MB are enough for small pictures
    ],
)
def test_as_many_batches_ahead_as_fit(
    memory: Memory,
    capsys: pytest.CaptureFixture[str],
    shared: float | None,
    total: float | None,
    batch: float,
    loading: Loading,
) -> None:
    memory(shared, total)
    assert plan_loading(8, int(batch * MB)) == loading
    assert capsys.readouterr().out == ""


def test_too_little_shared_memory_means_fewer_processes_and_says_so(
    memory: Memory, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    memory(64, 64000)
    assert plan_loading(8, 10 * MB) == Loading(2, 1)  # 32 / 10 = 3 batches, one of them in use
    assert capsys.readouterr().out == (
        f"note: 2 loading process(es), not 8: a batch takes up to 10 MB, {tmp_path} has 64 MB left: "
        "enlarge it (docker run --shm-size=8g, or --ipc=host)\n"
    )
    assert plan_loading(2, 50 * MB).workers == 0  # loaded by the training process: slow, but it runs
    assert capsys.readouterr().out.startswith("note: 0 loading process(es), not 2: ")


def test_too_little_memory_means_fewer_processes(memory: Memory, capsys: pytest.CaptureFixture[str]) -> None:
    memory(8000, 400)
    assert plan_loading(8, 20 * MB) == Loading(4, 1)  # 100 / 20 = 5
    assert "a batch takes up to 20 MB, memory has 400 MB left: lower the batch size" in capsys.readouterr().out


def test_ranks_share_what_there_is(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    memory(3600, 64000)
    assert plan_loading(8, 50 * MB) == Loading(8, 4)  # 36 batches
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert plan_loading(8, 50 * MB) == Loading(8, 2)  # 18 batches for each


def test_no_processes_stay_none(memory: Memory, capsys: pytest.CaptureFixture[str]) -> None:
    memory(1, 1)
    assert plan_loading(0, 50 * MB).workers == 0
    assert capsys.readouterr().out == ""


def test_choose_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    assert choose_workers(0, 1) == 0 and choose_workers(3, 1) == 3  # as asked
    assert choose_workers(None, 1) == 8  # at most
    assert choose_workers(None, 4) == 3
    assert choose_workers(None, 100) == 1  # at least
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # 16 ranks on 8 machines
    assert choose_workers(None, 16) == 6


# ------------------------------------------------------------------------------------------------- available memory

OWN = "anon 500\ninactive_file 70\nactive_file 30\n"
STAT = OWN + "total_inactive_file 300\ntotal_active_file 200\n"


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({}, 1_024_000),  # the machine alone counts
        ({"memory.max": "max\n", "memory.current": "900", "memory.stat": STAT}, 1_024_000),  # a container without a limit
        ({"memory.max": "1000\n", "memory.current": "900\n", "memory.stat": OWN}, 200),  # 100 + 70 + 30
        ({"memory.max": "9000000", "memory.current": "900", "memory.stat": STAT}, 1_024_000),  # more than there is
        ({"memory.max": "1000", "memory.current": "1200", "memory.stat": ""}, 0),
        (
            {
                "memory/memory.limit_in_bytes": "1000",
                "memory/memory.usage_in_bytes": "900",
                "memory/memory.stat": STAT,
            },
            600,  # cgroup v1 tells its own part, 70 + 30, and the whole group's, 300 + 200
        ),
    ],
)
def test_available_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, str], left: int) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       24684084 kB\nMemFree:  77 kB\nMemAvailable:   1000 kB\n")
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(workers, "MEMORY", meminfo)
    monkeypatch.setattr(workers, "CONTAINER", tmp_path)
    assert available_memory() == left
    monkeypatch.setattr(workers, "MEMORY", tmp_path / "none")
    assert available_memory() is None


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="reads /proc")
def test_available_memory_here() -> None:
    """This process has memory left, and no more than the machine has."""
    left = available_memory()
    assert left is not None and 0 < left <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
