"""A disk that is full or will not be written to: the last good checkpoint stays, the run goes on, and says what happened."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.child import Fault
from faults.runs import Ended, Run, assert_same_run, assert_same_weights

pytestmark = pytest.mark.slow
SIZE = "64m"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of `SIZE`."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", disk], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"needs a file system that can be filled: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def assert_saved_nothing_more(run: Run, ended: Ended, step: int, reason: str) -> None:
    """The run went on to its end, and the checkpoint of `step` is what it left; why is said in one line."""
    assert ended.code == 1, ended.log
    assert ended.lines("warning", "last.pt", reason), ended.log
    (line,) = ended.lines("error: ")
    assert "last.pt" in line and reason in line
    assert (run.load().training or {})["step"] == step
    assert not list(run.folder.glob("*.partial"))


def test_a_full_disk(config: Path, small_disk: Path, whole: Run) -> None:
    run = Run(config, small_disk / "run")
    filler = small_disk / "filler"
    # filled again before each of its saves: what the run leaves out must not help it
    ended = run.start(Fault("fill_disk", step=5, steps=99, path=str(filler)))
    assert_saved_nothing_more(run, ended, 4, "No space left on device")
    filler.unlink()
    run.finish()
    assert_same_run(run, whole)


def test_a_disk_that_is_full_for_a_while(config: Path, small_disk: Path, whole: Run) -> None:
    run = Run(config, small_disk / "run")
    filler = str(small_disk / "filler")
    ended = run.start(Fault("fill_disk", step=3, path=filler), Fault("delete", step=7, path=filler))
    assert ended.code == 0, ended.log
    assert ended.lines("warning", "last.pt", "No space left on device"), ended.log
    assert_same_weights(run, whole)  # best.pt is not the same: its disk was full at the first validation


def test_files_that_may_not_grow(tmp_path: Path, config: Path, whole: Run) -> None:
    run = Run(config, tmp_path / "run")
    alone = ("data.workers=0",)  # batches from other processes come in files too, of shared memory
    assert_saved_nothing_more(run, run.start(Fault("small_files_only", step=5), options=alone), 4, "File too large")
    run.finish()
    assert_same_run(run, whole)


def test_a_folder_that_may_not_be_written_to(tmp_path: Path, config: Path, whole: Run) -> None:
    if subprocess.run(["chattr", "+i", tmp_path], capture_output=True, check=False).returncode:
        pytest.skip("needs chattr +i, that is root and a file system that has it")
    subprocess.run(["chattr", "-i", tmp_path], check=True)
    run = Run(config, tmp_path / "run")
    try:
        ended = run.start(Fault("make_immutable", step=5, path=str(run.folder)))
    finally:
        subprocess.run(["chattr", "-i", run.folder], check=True)
    assert_saved_nothing_more(run, ended, 4, "Operation not permitted")
    run.finish()
    assert_same_run(run, whole)
