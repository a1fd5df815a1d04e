"""Data, and the run that nothing happens to."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import draw_coco

from faults.runs import Run, write_config


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of ten images, on which all runs that leave the data alone train."""
    folder = tmp_path_factory.mktemp("data")
    return write_config(folder, draw_coco(folder, n=10))


@pytest.fixture
def make_run(config: Path, tmp_path: Path) -> Callable[..., Run]:
    return lambda ranks=1: Run(config, tmp_path / "run", ranks)


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
