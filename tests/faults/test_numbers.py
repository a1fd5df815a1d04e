"""Losses that are no numbers."""

import math
from collections.abc import Callable

import pytest
import torch

from faults.child import Fault
from faults.runs import STEPS, Run

pytestmark = pytest.mark.slow


def test_a_step_that_is_not_finite_is_skipped_named_and_kept(make_run: Callable[..., Run]) -> None:
    run = make_run()
    ended = run.start(Fault("poison", step=4))
    assert ended.code == 0, ended.log
    (line,) = ended.lines("warning", "step 4 is not finite and is skipped: loss_cls nan")
    last = run.load()
    assert (last.training or {})["step"] == STEPS
    assert all(value.isfinite().all() for value in [*last.model.values(), *(last.ema or {}).values()])

    (file,) = run.folder.glob("bad_step_*.pt")  # what is needed to look into it
    kept = torch.load(file, weights_only=True)
    assert kept["step"] == 4
    assert math.isnan(kept["loss_cls"])
    (share,) = kept["shares"]  # of the one rank
    assert share["images"].dtype == torch.uint8
    assert len(share["images"]) == len(share["targets"]) == len(share["file_names"]) == 2
    assert all(name in line for name in share["file_names"])


def test_a_row_of_them_ends_the_run_with_the_story(make_run: Callable[..., Run]) -> None:
    run = make_run()
    ended = run.start(Fault("poison", step=5, steps=99), options=("train.max_bad_steps=3",))
    assert ended.code in (1, 2), ended.log
    assert len(ended.lines("is not finite and is skipped")) == 4
    (line,) = ended.lines("error: ")
    assert "4 steps in a row were not finite" in line
    assert ".png" in line
    assert "train.learning_rate" in line
    assert 1 <= len(list(run.folder.glob("bad_step_*.pt"))) <= 3
    assert (run.load().training or {})["step"] <= 8


def test_a_learning_rate_that_explodes_ends_so_too(make_run: Callable[..., Run]) -> None:
    ended = make_run().start(options=("train.learning_rate=1e30", "train.optimizer=sgd", "train.max_bad_steps=2"))
    assert ended.code in (1, 2), ended.log
    assert "3 steps in a row were not finite" in ended.lines("error: ")[0]
