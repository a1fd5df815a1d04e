"""Data, the run that nothing happens to, and a folder that is gone after the test."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import draw_coco

from faults.runs import Run, write_config


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Of ten images, on which all runs that leave the data alone train."""
    folder = tmp_path_factory.mktemp("data")
    yield write_config(folder, draw_coco(folder, n=10))
    shutil.rmtree(folder)


@pytest.fixture
def make_run(config: Path, scratch: Path) -> Callable[..., Run]:
    return lambda ranks=1: Run(config, scratch / "run", ranks)


@pytest.fixture(scope="session")
def whole(config: Path) -> Run:
    """A run that nothing happens to."""
    return _undisturbed(Run(config, config.parent / "whole"))


@pytest.fixture(scope="session")
def whole_of_two(config: Path) -> Run:
    return _undisturbed(Run(config, config.parent / "whole_of_two", ranks=2))


def _undisturbed(run: Run) -> Run:
    ended = run.start(resume=False)
    assert ended.code == 0, ended.log
    return run
