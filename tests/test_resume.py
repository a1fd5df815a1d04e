"""A run that is stopped, killed or starved goes on as if nothing had happened, and says what did."""

import errno
import gc
import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_training import _assert_same, _config, _run_tool, _weights

from retinanet import run_state
from retinanet.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from retinanet.config import Config, save_config
from retinanet.criterion import RetinaNetLoss
from retinanet.data.loader import TrainSampler
from retinanet.data.unbroken import LIVES, unbroken
from retinanet.errors import RunError, UserError
from retinanet.failures import LostRanksError, explained
from retinanet.interrupts import Interrupts
from retinanet.run_state import RunFiles, find_checkpoint, random_state, set_random_state
from retinanet.structures import Batch, Target
from retinanet.training import Trainer, train
from retinanet.validation import Validation

MakeCoco = Callable[..., dict[str, str]]
Said = pytest.CaptureFixture[str]


@contextmanager
def signalled(owner: type, method: str, when: Callable[[Any], bool], number: int) -> Iterator[None]:
    """Inside, this process gets a signal whenever `method` is called and `when` says so."""
    original = getattr(owner, method)

    def wrapped(self: Any, *args: Any) -> Any:
        if when(self):
            os.kill(os.getpid(), number)
        return original(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, method, wrapped)
        yield


def training_of(file: Path) -> dict[str, Any]:
    training = load_checkpoint(file).training
    assert training is not None
    return training


def test_sigterm_in_a_validation_leaves_at_once_and_the_validation_is_made_up(make_coco: MakeCoco, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    data, options = make_coco(), {"validate_every_steps": 3, "max_steps": 5, "log_every_steps": 1}
    train(_config(data, tmp_path / "whole", **options))
    config, interrupts = _config(data, tmp_path / "run", **options), Interrupts()
    with signalled(Validation, "measure", lambda _: True, signal.SIGTERM):
        assert train(config, interrupts=interrupts) is False
    assert interrupts.exit_code == 75
    state = training_of(tmp_path / "run" / "last.pt")
    assert state["step"] == 3 and state["validation_due"] and not (tmp_path / "run" / "metrics.json").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert train(config, resume=True) is True
    _assert_same(_weights(tmp_path / "whole" / "last.pt"), _weights(tmp_path / "run" / "last.pt"))
    assert (tmp_path / "whole" / "metrics.json").read_text() == (tmp_path / "run" / "metrics.json").read_text()
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert [event.step for event in events.Scalars("val/AP")] == [3, 5]
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5]


def test_a_validation_that_an_interrupt_pre_empted_is_made_up(make_coco: MakeCoco, tmp_path: Path) -> None:
    config = _config(make_coco(), tmp_path / "run", max_steps=2, validate_every_steps=2)
    interrupts = Interrupts()
    with signalled(Trainer, "_train_step", lambda self: self.step == 1, signal.SIGINT):  # in the last step of all
        assert train(config, interrupts=interrupts) is False
    assert interrupts.exit_code == 130
    assert not (tmp_path / "run" / "best.pt").exists()
    assert train(config, resume=True) is True
    assert (tmp_path / "run" / "best.pt").exists()
    assert not training_of(tmp_path / "run" / "last.pt")["validation_due"]


def test_all_random_states_are_those_of_a_run_that_was_never_stopped(make_coco: MakeCoco, tmp_path: Path) -> None:
    data = make_coco()
    configs = [_config(data, tmp_path / name, max_steps=3, save_every_steps=1, validate_every_steps=1) for name in "ab"]
    for config in configs:
        config.data.workers = 1
    train(configs[0])
    with signalled(Trainer, "_train_step", lambda self: self.step == 1, signal.SIGINT):
        train(configs[1])
    train(configs[1], resume=True)
    (one,), (other,) = (training_of(tmp_path / name / "last.pt")["random_states"] for name in "ab")
    assert one["python"] == other["python"] and one["numpy"] == other["numpy"] and torch.equal(one["torch"], other["torch"])


def test_random_states_come_back_and_new_ranks_get_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), float(torch.rand(()))

    saved = random_state()
    first = draw()
    draw()
    set_random_state([saved], (0, 5))
    assert draw() == first
    drawn = []
    for rank in (1, 2, 1):
        monkeypatch.setattr(run_state, "rank", lambda rank=rank: rank)
        set_random_state([saved], (0, 5))
        drawn.append(draw())
    assert drawn[0] == drawn[2] != drawn[1] and drawn[0] != first


@pytest.fixture
def make_checkpoint(make_coco: MakeCoco, tmp_path: Path) -> Callable[[int], Checkpoint]:
    config = _config(make_coco(n=2), tmp_path / "run")
    return lambda step: Checkpoint(config, (), {"weight": torch.full((1000,), float(step))}, training={"step": step})


def test_so_many_checkpoints_are_kept(make_checkpoint: Callable[[int], Checkpoint], tmp_path: Path) -> None:
    files = RunFiles(tmp_path, keep=3, minutes=None, saved_step=None)
    for step in (1, 2, 3, 4, 4):  # the second of a step, after its validation, replaces the first
        files.save(make_checkpoint(step))
    kept = {file.name: training_of(file)["step"] for file in tmp_path.glob("*.pt")}
    assert kept == {"last.pt": 4, "previous.pt": 3, "previous-2.pt": 2}
    RunFiles(tmp_path, keep=2, minutes=None, saved_step=4).save(make_checkpoint(5))
    assert {file.name for file in tmp_path.glob("*.pt")} == {"last.pt", "previous.pt"}


def test_a_damaged_file_never_takes_the_place_of_a_good_one(
    make_checkpoint: Callable[[int], Checkpoint], tmp_path: Path, capsys: Said
) -> None:
    files = RunFiles(tmp_path, keep=3, minutes=None, saved_step=None)
    for step in (1, 2, 3):
        files.save(make_checkpoint(step))
    for name in ("last.pt", "previous.pt"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-100])
    found = find_checkpoint(tmp_path, resume=True)
    assert found is not None and found.training == {"step": 1}
    assert "previous-2.pt, step 1" in capsys.readouterr().out
    assert {file.name for file in tmp_path.iterdir()} >= {"last.damaged", "previous.damaged", "previous-2.pt"}
    (tmp_path / "previous-2.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"none of the checkpoints in .* can be read"):
        find_checkpoint(tmp_path, resume=True)  # and not a start from nothing, over it


def test_every_flip_and_every_cut_is_found_or_harmless(make_checkpoint: Callable[[int], Checkpoint], tmp_path: Path) -> None:
    file = tmp_path / "last.pt"
    save_checkpoint(file, make_checkpoint(3))
    good, rng, found = file.read_bytes(), np.random.default_rng(0), 0
    for trial in range(150):
        content = bytearray(good)
        start = int(rng.integers(len(good)))
        if trial % 5 == 0:
            content = content[:start]
        else:
            content[start] ^= 1 << int(rng.integers(8))
        file.write_bytes(content)
        try:
            again = load_checkpoint(file)
        except UserError:
            found += 1
        else:
            assert torch.equal(again.model["weight"], torch.full((1000,), 3.0)) and again.training == {"step": 3}
    assert found > 145  # all but what breaks the seal off


def test_a_failed_save_is_told_tried_again_and_at_the_end_an_error(
    make_coco: MakeCoco, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    config = _config(make_coco(), tmp_path / "run", max_steps=4, save_every_steps=1)
    config.data.val = None
    save = save_checkpoint

    def full(file: Path, checkpoint: Checkpoint, *rest: Any) -> None:
        if file.name == "last.pt" and (checkpoint.training or {})["step"] > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(file, checkpoint, *rest)

    monkeypatch.setattr(run_state, "save_checkpoint", full)
    with pytest.raises(RunError, match=r"last\.pt could not be written \(No space left on device\)") as caught:
        train(config)
    assert caught.value.exit_code == 1 and "\n" not in str(caught.value)
    printed = capsys.readouterr().out
    assert printed.count("warning: ") == 3 and "that of step 1 is kept" in printed  # steps 2, 3 and 4
    assert training_of(tmp_path / "run" / "last.pt")["step"] == 1
    monkeypatch.undo()
    assert train(config, resume=True) is True


def test_when_a_save_is_due(make_checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(run_state.time, "monotonic", lambda: now[0])
    files = RunFiles(tmp_path, keep=2, minutes=15, saved_step=None)
    due = []
    for now[0] in (100 + 15 * 60 - 1, 100 + 15 * 60):
        due.append(files.is_due())
    assert due == [False, True]
    files.save(make_checkpoint(1))
    assert not files.is_due()
    monkeypatch.setattr(run_state, "save_checkpoint", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    files.save(make_checkpoint(2))
    now[0] += 60
    assert files.is_due()  # a minute after the failure, not fifteen
    assert not RunFiles(tmp_path, keep=2, minutes=None, saved_step=None).is_due()


def test_no_step_is_lost_to_a_full_disk_of_curves_or_metrics(
    make_coco: MakeCoco, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("retinanet.telemetry._open_tensorboard", full)
    monkeypatch.setattr("retinanet.validation.write_json", full)
    assert train(_config(make_coco(), tmp_path / "run", max_steps=2, log_every_steps=1)) is True
    printed = capsys.readouterr().out
    assert printed.count("TensorBoard's file") == 1 and "metrics.json could not be written (No space left" in printed


def test_steps_that_are_not_finite_are_kept_for_a_look(
    make_coco: MakeCoco, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first step on: the schedule's complaint that no optimizer step came before it would be an error here."""
    sums = RetinaNetLoss.sums
    monkeypatch.setattr(RetinaNetLoss, "sums", lambda *given: (s := sums(*given))._replace(loss_cls=s.loss_cls * torch.nan))
    with pytest.raises(RunError, match="5 steps in a row") as caught:
        train(_config(make_coco(), tmp_path / "run", max_steps=9, max_bad_steps=4))
    assert caught.value.exit_code == 1
    files = sorted(file.name for file in (tmp_path / "run").glob("bad_step_*"))
    assert files == ["bad_step_0.pt", "bad_step_1.pt", "bad_step_2.pt"]
    kept = torch.load(tmp_path / "run" / files[1], weights_only=True)
    (share,) = kept["shares"]
    assert kept["step"] == 1 and np.isnan(kept["loss_cls"]) and kept["config"]["seed"] == 3
    assert share["images"].dtype == torch.uint8 and len(share["images"]) == len(share["file_names"]) == 4
    assert all(target["boxes"].shape == (2, 4) for target in share["targets"])


@pytest.mark.parametrize(("size", "parts", "expected"), [(8, 3, [2, 3, 3]), (4, 4, [1] * 4), (2, 5, [1, 1]), (3, 1, [3])])
def test_parts_of_a_batch_are_as_even_as_may_be(size: int, parts: int, expected: list[int]) -> None:
    target = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    sizes = torch.zeros(size, 2)
    batch = Batch(torch.arange(size).view(-1, 1, 1, 1), sizes, sizes, [target] * size, [str(n) for n in range(size)])
    cut = batch.split(parts)
    assert [len(part.targets) for part in cut] == expected
    assert torch.equal(torch.cat([part.images for part in cut]), batch.images)


@pytest.mark.parametrize(
    ("batch", "ranks", "shares"), [(8, 3, [3, 3, 2]), (5, 4, [2, 1, 1, 1]), (4, 4, [1] * 4), (6, 2, [3, 3])]
)
def test_ranks_share_every_global_batch(batch: int, ranks: int, shares: list[int]) -> None:
    def batches(rank: int, of: int) -> list[list[tuple[int, ...]]]:
        return list(TrainSampler(20, batch, seed=1, start_step=2, total_steps=6, rank=rank, world_size=of))

    parts = [batches(rank, ranks) for rank in range(ranks)]
    for step, whole in enumerate(batches(0, 1)):
        mine = [part[step] for part in parts]
        assert sorted(map(len, mine), reverse=True) == shares and [key for part in mine for key in part] == whole


class Numbers(torch.utils.data.Dataset[int]):
    """0, 1, 2 ...; the process that is to give a number of `deadly` is killed, if it has not happened to it before."""

    def __init__(self, folder: Path, deadly: tuple[int, ...] = (), always: bool = False) -> None:
        self.folder, self.deadly, self.always = folder, deadly, always

    def __len__(self) -> int:
        return 12

    def __getitem__(self, n: int) -> int:
        mark = self.folder / str(n)
        if n in self.deadly and (self.always or not mark.exists()):
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return n


def test_a_killed_loading_process_is_replaced_and_nothing_is_lost(tmp_path: Path, capsys: Said) -> None:
    def loader(done: int) -> torch.utils.data.DataLoader[int]:
        return torch.utils.data.DataLoader(Numbers(tmp_path, (3, 7)), batch_size=None, sampler=range(done, 12), num_workers=1)

    assert list(unbroken(loader)) == list(range(12))
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and all("ended by SIGKILL" in line and "begins anew" in line for line in said)
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL


def test_loading_processes_that_keep_dying_end_the_run(tmp_path: Path) -> None:
    def loader(done: int) -> torch.utils.data.DataLoader[int]:
        data = Numbers(tmp_path, (2,), always=True)
        return torch.utils.data.DataLoader(data, batch_size=None, sampler=range(done, 12), num_workers=1)

    got = []
    with pytest.raises(RunError, match=r"loading processes keep dying, the last: .* SIGKILL"):
        got.extend(unbroken(loader))
    assert LIVES == 3


def test_a_mistake_in_a_loading_process_is_still_itself() -> None:
    class Faulty(Numbers):
        def __getitem__(self, n: int) -> int:
            raise UserError("this picture")

    data = Faulty(Path())
    with pytest.raises(UserError, match="this picture"):
        list(unbroken(lambda done: torch.utils.data.DataLoader(data, batch_size=None, num_workers=1)))
    assert list(unbroken(lambda done: [])) == []


def test_failures_of_torch_are_one_line_each(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config()

    def line_of(error: BaseException, kind: type[UserError]) -> str:
        with pytest.raises(kind) as caught, explained(config):
            raise error
        assert type(caught.value) is kind and "\n" not in str(caught.value)
        return str(caught.value)

    for error in (
        torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ):
        line = line_of(error, UserError)
        assert "train.accumulate_steps 1 -> 2" in line and "train.batch_size 16 -> 8" in line
        assert "input.short_edge 800 -> 640 (36% less)" in line  # 1 - 0.8 ** 2
        assert "train.precision auto -> bf16" in line and "model.freeze_stages 2 -> 3" in line
    assert "stuck" in line_of(RuntimeError("DataLoader timed out after 600 seconds"), RunError)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    closed = "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:41234"
    assert line_of(RuntimeError(closed), LostRanksError).startswith("rank 1 on ")
    late = RuntimeError("gloo/...: Timed out waiting 1800000ms for recv")
    assert "waited for the other ranks in vain" in line_of(late, LostRanksError)
    with pytest.raises(RuntimeError, match="ours"), explained(config):
        raise RuntimeError("ours")


def test_nothing_grows_with_the_steps(make_coco: MakeCoco, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(make_coco(), tmp_path / "run", max_steps=75, log_every_steps=5)
    config.data.val = None
    step, counts = Trainer._train_step, []

    def counted(self: Trainer, batch: Batch) -> dict[str, float]:
        if self.step in (54, 74):  # past the window of 50 that the shown speed is averaged over
            gc.collect()
            counts.append(len(gc.get_objects()))
        return step(self, batch)

    monkeypatch.setattr(Trainer, "_train_step", counted)
    train(config)
    assert counts[1] - counts[0] < 20  # not one object a step


@pytest.mark.slow
def test_the_loss_does_not_depend_on_how_a_batch_is_shared(make_coco: MakeCoco, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    data, file, curves = make_coco(n=16, size=(64, 64)), tmp_path / "config.yaml", {}
    config = _config(data, tmp_path, batch_size=8, max_steps=30, log_every_steps=1, optimizer="sgd", learning_rate=3e-4)
    # At a rate of 1e-3 weights moved by 1e-7 change the loss by 3e-4 within 20 steps: there rounding could not be told apart.
    config.model.freeze_stages, config.data.val = 0, None
    save_config(config, file)
    for ranks, parts in ((1, 1), (2, 1), (4, 1), (1, 4), (3, 2)):  # the last: 3 + 3 + 2 images, in parts of 1 and 2
        out = tmp_path / f"{ranks}x{parts}"
        done = _run_tool("tools/train.py", str(file), f"output_dir={out}", f"train.accumulate_steps={parts}", ranks=ranks)
        assert done.returncode == 0, done.stderr
        events = EventAccumulator(str(out))
        events.Reload()
        curves[out.name] = [event.value for event in events.Scalars("train/loss")]
    for name, curve in curves.items():
        assert curve == pytest.approx(curves["1x1"], abs=1e-4), name
    assert len(curves["1x1"]) == 30 and curves["1x1"][-1] < curves["1x1"][0]
