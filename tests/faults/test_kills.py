"""Kills: what is resumed ends as if nothing had happened, whenever and whatever was killed."""

import random
import shutil
from collections.abc import Callable

import pytest

from faults.child import Fault
from faults.runs import KILLED, STEPS, Run, assert_same_run
from faults.seeds import seeds

pytestmark = pytest.mark.slow
MakeRun = Callable[..., Run]


def random_kill(rng: random.Random, run: Run) -> Fault:
    """In a step and up to 0.2 s after it: in a later step, a save, a validation. Or at one of the first 20 touches of a file
    in the run's folder, between the files of a save or up to 20 ms later: in the middle of writing one."""
    if rng.random() < 0.5:
        return Fault("kill", step=rng.randrange(STEPS), delay=rng.choice([0.0, rng.uniform(0, 0.2)]))
    return Fault("kill", file=rng.randrange(20), folder=str(run.folder), delay=rng.choice([0.0, rng.uniform(0, 0.02)]))


def kill_and_finish(run: Run, seed: int) -> None:
    """Killed at least once, then resumed until it is finished."""
    rng = random.Random(seed)
    while (code := run.start(random_kill(rng, run)).code) == 0:  # a delayed kill came after the end
        shutil.rmtree(run.folder)
    assert code == KILLED
    for _ in range(rng.randrange(2)):
        assert run.start(random_kill(rng, run)).code in (0, KILLED)
    run.finish()


@seeds(short=3, long=50)
def test_a_killed_run_ends_as_if_nothing_had_happened(make_run: MakeRun, whole: Run, seed: int) -> None:
    run = make_run()
    kill_and_finish(run, seed)
    assert_same_run(run, whole)


@seeds(short=1, long=10)
def test_two_ranks_killed_together_end_as_if_nothing_had_happened(make_run: MakeRun, whole_of_two: Run, seed: int) -> None:
    run = make_run(ranks=2)
    kill_and_finish(run, 1000 + seed)
    assert_same_run(run, whole_of_two)


def test_a_killed_rank_is_replaced_by_torchrun(make_run: MakeRun, whole_of_two: Run) -> None:
    run = make_run(ranks=2)
    ended = run.start(Fault("kill_rank", step=5, rank=1), resume=False, restarts=2)  # a restart resumes unasked
    assert ended.code == 0, ended.log
    assert ended.lines("resuming from")
    assert_same_run(run, whole_of_two)


def test_the_other_rank_does_not_wait_for_a_killed_one(make_run: MakeRun, whole_of_two: Run) -> None:
    run = make_run(ranks=2)
    assert run.start(Fault("kill_rank", step=5, rank=1)).code == 1  # torchrun's
    run.finish()
    assert_same_run(run, whole_of_two)


def test_killed_loaders_are_started_anew(make_run: MakeRun, whole: Run) -> None:
    run = make_run()
    ended = run.start(Fault("kill_loader", step=3), Fault("kill_loader", step=8))
    assert ended.code == 0, ended.log
    assert_same_run(run, whole)


@pytest.mark.parametrize(("action", "code"), [("terminate", 75), ("interrupt", 130)])
def test_a_run_asked_to_stop_saves_and_goes_on(make_run: MakeRun, whole: Run, action: str, code: int) -> None:
    run = make_run()
    ended = run.start(Fault(action, step=4))
    assert ended.code == code, ended.log
    assert ended.lines("--resume goes on")
    assert (run.load().training or {})["step"] in (5, 6)  # seen in that step or in the next
    run.finish()
    assert_same_run(run, whole)


def test_a_run_asked_twice_stops_at_once(make_run: MakeRun, whole: Run) -> None:
    run = make_run()
    ended = run.start(Fault("terminate", step=4), Fault("terminate", step=4))
    assert ended.code not in (0, KILLED), ended.log
    assert (run.load().training or {})["step"] == 4  # the save before
    run.finish()
    assert_same_run(run, whole)
