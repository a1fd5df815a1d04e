"""Image files that are slow, vanish or rot while a run reads them."""

import os
from pathlib import Path

import pytest
from conftest import draw_coco

from faults.child import Fault
from faults.runs import Run, assert_same_run, write_config

pytestmark = pytest.mark.slow
MORE_EPOCHS = "train.max_steps=30"  # six: whatever is read ahead, an image that is gone after the first step is missed


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """On images of its own: tmp_path/train/0.png ... 9.png."""
    return Run(write_config(tmp_path, draw_coco(tmp_path, n=10), workers=2), tmp_path / "run")


def test_slow_files_change_nothing(make_run: type[Run], whole: Run) -> None:
    run = make_run()
    assert run.start(Fault("slow", delay=0.1)).code == 0
    assert_same_run(run, whole)


def test_files_that_go_bad_are_named_once_and_stood_in_for(run: Run, tmp_path: Path) -> None:
    gone, garbled, pipe = (tmp_path / "train" / f"{n}.png" for n in (2, 5, 7))
    pipe.unlink()
    os.mkfifo(pipe)  # nobody writes to it: who opens it waits for ever
    ended = run.start(
        Fault("delete", path=str(gone), step=0), Fault("garble", path=str(garbled), step=0), options=(MORE_EPOCHS,)
    )
    assert ended.code == 0, ended.log
    for file in (gone, garbled, pipe):
        assert len(ended.lines("stands in for", str(file))) == 1, ended.log
    assert (run.load().training or {})["step"] == 30


def test_too_many_bad_files_end_the_run_in_one_line(run: Run, tmp_path: Path) -> None:
    bad = [tmp_path / "train" / f"{n}.png" for n in range(5)]  # of ten
    ended = run.start(*(Fault("garble", path=str(file), step=1) for file in bad), options=(MORE_EPOCHS,))
    assert ended.code == 2, ended.log
    (line,) = ended.lines("error: ")
    assert "images are unreadable, more than data.max_corrupt_share" in line
    assert any(str(file) in line for file in bad)
