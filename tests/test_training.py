"""The training loop on small drawn data: what a run leaves behind, how it goes on, and what stops it."""

import json
import lzma
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, SMALL, power_cut
from torch import Tensor

from retinanet.checkpoint import Checkpoint, load_checkpoint
from retinanet.config import Config, parse_config, save_config
from retinanet.criterion import LossSums, RetinaNetLoss
from retinanet.errors import UserError
from retinanet.run_setup import load_data
from retinanet.training import Trainer, train

MakeCoco = Callable[..., dict[str, str]]


def _config(data: dict[str, str], out: Path, **train_settings: Any) -> Config:
    """A small detector in fp32, because these tests compare weights; its backbone is frozen (fast) unless changed."""
    settings = {"batch_size": 4, "max_steps": 6, "precision": "fp32", "optimizer": "adamw", "learning_rate": 1e-3}
    return parse_config(
        {
            "model": {**SMALL, "freeze_stages": 5, "anchors": {"sizes": [16, 32, 64, 128, 256]}},
            "input": {"short_edge": 64, "long_edge": 96},
            "data": {"train": data, "val": data, "workers": 0},
            "train": {**settings, **train_settings},
            "output_dir": str(out),
            "seed": 3,
        }
    )


def _weights(file: Path) -> dict[str, Tensor]:
    return load_checkpoint(file).model


def _assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]), key


def test_a_run_leaves_what_is_promised(make_coco: MakeCoco, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert train(_config(make_coco(), out, ema_decay=0.9, validate_every_steps=3)) is True
    assert {"config.yaml", "best.pt", "last.pt", "previous.pt", "metrics.json"} <= {file.name for file in out.iterdir()}
    assert any(file.name.startswith("events.out.tfevents") for file in out.iterdir())
    best, last = load_checkpoint(out / "best.pt"), load_checkpoint(out / "last.pt")
    assert best.training is None
    assert last.training is not None
    assert last.training["step"] == 6
    assert best.ema is not None
    assert [tuple(category) for category in best.categories] == [(3, "red"), (7, "green")]
    metrics = json.loads((out / "metrics.json").read_text())
    names = {"AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"}
    assert names <= metrics.keys()
    assert set(metrics["per_class"]) == {"red", "green"}
    assert metrics["loss_cls"] > 0  # the validation loss
    printed = capsys.readouterr().out
    assert "8 images (0 without boxes), 16 boxes" in printed
    assert "finished: 6 steps" in printed


def test_a_best_detector_alone_is_not_written_over(
    make_coco: MakeCoco, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Someone kept it and removed the rest, or saved it there by hand."""
    config, best = _config(make_coco(), tmp_path / "run", max_steps=1), tmp_path / "run" / "best.pt"
    best.parent.mkdir()
    best.write_bytes(b"kept")
    with pytest.raises(UserError, match="run holds a run already"):
        train(config)
    assert best.read_bytes() == b"kept"
    train(config, resume=True)
    assert best.with_name("best.earlier-1.pt").read_bytes() == b"kept" and best.stat().st_size > 4
    assert "best.pt of an earlier run is kept as best.earlier-1.pt" in capsys.readouterr().out
    best.with_name("last.pt").unlink()
    size = best.stat().st_size
    train(config, resume=True)
    assert best.with_name("best.earlier-1.pt").read_bytes() == b"kept"
    assert best.with_name("best.earlier-2.pt").stat().st_size == size


def test_validation_on_training_pictures_is_said(
    make_coco: MakeCoco, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _config(make_coco(), tmp_path / "run")
    config.data.val = config.data.train
    load_data(config)
    warning = "warning: 8 of 8 validation images are trained on: AP says nothing of new ones"
    assert capsys.readouterr().out.splitlines().count(warning) == 1
    config.data.val = None
    config.data.val_share = 0.25  # of the same pictures, but others
    load_data(config)
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_going_on_after_a_crash_gives_bitwise_the_same_weights(make_coco: MakeCoco, tmp_path: Path, norm: str) -> None:
    data = make_coco()
    options = {"ema_decay": 0.9, "save_every_steps": 2, "clip_grad_norm": 1.0}

    def config(out: str) -> Config:
        made = _config(data, tmp_path / out, **options)
        made.model.norm = norm  # type: ignore[assignment]
        made.model.freeze_stages = 3  # the last two stages train
        return made

    train(config("whole"))
    with power_cut(after=3):
        train(config("broken"))
    train(config("broken"), resume=True)  # from step 2
    for name in ("last.pt", "best.pt"):
        whole, broken = load_checkpoint(tmp_path / "whole" / name), load_checkpoint(tmp_path / "broken" / name)
        _assert_same(whole.model, broken.model)
        assert whole.ema is not None
        assert broken.ema is not None
        _assert_same(whole.ema, broken.ema)


def test_ctrl_c_finishes_the_step_saves_and_can_go_on(
    make_coco: MakeCoco, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_coco()
    train(_config(data, tmp_path / "whole"))
    step = Trainer._train_step

    def interrupted(self: Trainer, *args: Any) -> Any:
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", interrupted)
        assert train(_config(data, tmp_path / "stopped")) is False
    stopped = load_checkpoint(tmp_path / "stopped" / "last.pt").training
    assert stopped is not None
    assert stopped["step"] in (3, 4)  # asked during the third step: seen in it or in the next
    assert "--resume goes on" in capsys.readouterr().out
    assert train(_config(data, tmp_path / "stopped"), resume=True) is True
    _assert_same(_weights(tmp_path / "whole" / "last.pt"), _weights(tmp_path / "stopped" / "last.pt"))


def test_a_finished_run_is_left_alone(make_coco: MakeCoco, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = _config(make_coco(), tmp_path / "run", max_steps=1)
    train(config)
    before = (tmp_path / "run" / "last.pt").read_bytes()
    assert train(config, resume=True) is True
    assert "this run is finished" in capsys.readouterr().out
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


def test_an_old_run_is_not_overwritten_unasked(make_coco: MakeCoco, tmp_path: Path) -> None:
    config = _config(make_coco(), tmp_path / "run", max_steps=1)
    train(config)
    with pytest.raises(UserError, match=r"--resume .* or name another output_dir"):
        train(config)


def test_a_torn_checkpoint_falls_back_to_the_one_before(
    make_coco: MakeCoco, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = make_coco(), tmp_path / "run"
    train(_config(data, tmp_path / "whole", save_every_steps=2))
    train(_config(data, out, save_every_steps=2))
    last = out / "last.pt"
    last.write_bytes(last.read_bytes()[:1000])
    train(_config(data, out, save_every_steps=2), resume=True)
    printed = capsys.readouterr().out
    assert "last.pt" in printed.split("trying the one before")[0]
    assert "resuming from" in printed
    assert "previous.pt, step 4" in printed
    _assert_same(_weights(tmp_path / "whole" / "last.pt"), _weights(last))


def test_resume_without_a_run_starts_afresh(make_coco: MakeCoco, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(_config(make_coco(), tmp_path / "run", max_steps=1), resume=True)
    assert "nothing to resume" in capsys.readouterr().out


@pytest.mark.parametrize("norm", ["group", "frozen"])
def test_accumulation_gives_the_same_gradient_as_the_whole_batch(make_coco: MakeCoco, tmp_path: Path, norm: str) -> None:
    data = make_coco(size=(64, 64))
    gradients = []
    for parts in (1, 2, 3, 4):  # 3: one, one and two images
        config = _config(data, tmp_path / str(parts), optimizer="sgd", accumulate_steps=parts, learning_rate=1.0)
        config.model.norm = norm  # type: ignore[assignment]
        config.model.freeze_stages = 0
        gradients.append(_first_gradient(config))
    for key, whole in gradients[0].items():
        for parts in gradients[1:]:
            torch.testing.assert_close(parts[key], whole, rtol=1e-4, atol=1e-6, msg=key)


def _first_gradient(config: Config) -> dict[str, Tensor]:
    """What the optimizer is given in the first step: normalised, not clipped."""
    config.train.clip_grad_norm = None
    trainer = Trainer(config, None, torch.device("cpu"))
    seen: dict[str, Tensor] = {}

    def look(optimizer: Any, *_: Any) -> None:
        seen.update({name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None})

    trainer.learner.optimizer.register_step_pre_hook(look)
    trainer._train_step(next(iter(trainer._loader(0))))
    return seen


def test_a_step_that_is_not_finite_leaves_no_trace_and_is_named(
    make_coco: MakeCoco, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sums, seen = RetinaNetLoss.sums, []

    def poisoned(self: RetinaNetLoss, predictions: Any, targets: Any) -> LossSums:
        losses = sums(self, predictions, targets)
        seen.append(1)
        return losses._replace(loss_cls=losses.loss_cls * float("nan")) if len(seen) == 2 else losses

    monkeypatch.setattr(RetinaNetLoss, "sums", poisoned)
    config = _config(make_coco(), tmp_path / "run", max_steps=2, save_every_steps=1, ema_decay=0.9)
    config.data.val = None
    config.model.norm = "batch"
    config.model.freeze_stages = 3
    train(config)
    before, after = load_checkpoint(tmp_path / "run" / "previous.pt"), load_checkpoint(tmp_path / "run" / "last.pt")
    assert after.training is not None
    assert after.training["step"] == 2
    assert all(torch.equal(value, after.model[key]) for key, value in before.model.items() if "num_batches" not in key)
    assert before.ema is not None
    assert after.ema is not None
    _assert_same(before.ema, after.ema)
    printed = capsys.readouterr().out
    assert "step 1 is not finite and is skipped: loss_cls nan" in printed
    assert ".png" in printed  # the images of the batch


def test_a_row_of_steps_that_are_not_finite_ends_the_run(
    make_coco: MakeCoco, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums, seen = RetinaNetLoss.sums, []

    def poisoned(self: RetinaNetLoss, predictions: Any, targets: Any) -> LossSums:
        losses = sums(self, predictions, targets)
        seen.append(1)
        return losses._replace(loss_box=losses.loss_box * float("inf")) if len(seen) > 1 else losses

    monkeypatch.setattr(RetinaNetLoss, "sums", poisoned)
    with pytest.raises(UserError, match="3 steps in a row were not finite"):
        train(_config(make_coco(), tmp_path / "run", max_bad_steps=2))


def test_the_time_limit_ends_a_run_with_a_validation(
    make_coco: MakeCoco, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _config(make_coco(), tmp_path / "run", max_minutes=1e-9)
    assert train(config) is True
    assert load_checkpoint(tmp_path / "run" / "last.pt").training["step"] == 1  # type: ignore[index]
    assert (tmp_path / "run" / "metrics.json").exists()
    assert train(config, resume=True) is True
    assert "this run is finished (1 steps)" in capsys.readouterr().out


def test_unreadable_images_are_named_once_and_too_many_end_the_run(
    make_coco: MakeCoco, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_coco(n=8)
    for n in range(1, 4):
        (Path(data["path"]) / f"{n}.png").write_bytes(b"not a picture")
    train(_config(data, tmp_path / "run"))
    printed = capsys.readouterr().out
    for n in range(1, 4):
        assert printed.count(f"another image stands in for {Path(data['path']) / f'{n}.png'}") == 1
    for n in range(4, 7):
        (Path(data["path"]) / f"{n}.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"images are unreadable, more than data\.max_corrupt_share"):
        train(_config(data, tmp_path / "second"))


def test_what_cannot_be_trained_is_said_in_one_line(make_coco: MakeCoco, tmp_path: Path) -> None:
    data = make_coco()

    def failing(change: Callable[[Config], None], message: str) -> None:
        config = _config(data, tmp_path / "run")
        change(config)
        with pytest.raises(UserError, match=message) as caught:
            train(config)
        assert "\n" not in str(caught.value)

    failing(lambda c: setattr(c.train, "accumulate_steps", 5), "batch_size 4 cannot be shared")
    failing(lambda c: setattr(c.train, "epochs", 1), r"at most one of train\.epochs and train\.max_steps")
    failing(lambda c: setattr(c.model, "num_classes", 3), "num_classes is 3, but .* has 2 classes")
    failing(lambda c: setattr(c.data, "train", None), r"data\.train is not set")
    failing(lambda c: setattr(c.model, "backbone_weights", "nowhere.pth"), r"nowhere\.pth does not exist")
    failing(lambda c: setattr(c.train, "init_from", "nowhere.pt"), r"nowhere\.pt do not exist")


def test_resume_refuses_other_classes(make_coco: MakeCoco, tmp_path: Path) -> None:
    data = make_coco()
    train(_config(data, tmp_path / "run", max_steps=1))
    annotations = Path(data["annotations"])
    annotations.write_text(annotations.read_text().replace('"green"', '"blue"'))
    with pytest.raises(UserError, match="classes of the data are not those of the run"):
        train(_config(data, tmp_path / "run", max_steps=2), resume=True)


def test_init_from_another_label_set_keeps_everything_but_the_last_layer(
    make_coco: MakeCoco, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_coco()
    train(_config(data, tmp_path / "first", max_steps=1))
    first = _weights(tmp_path / "first" / "last.pt")
    annotations = Path(data["annotations"])
    annotations.write_text(annotations.read_text().replace('"green"', '"blue"'))
    config = _config(data, tmp_path / "second", init_from=str(tmp_path / "first" / "best.pt"))
    trainer = Trainer(config, None, torch.device("cpu"))
    assert "kept                 1  red\n" in capsys.readouterr().out
    for key, value in trainer.model.state_dict().items():
        assert torch.equal(value, first[key]) != key.startswith("cls_subnet.final."), key


def test_images_without_boxes_are_trained_on(make_coco: MakeCoco, tmp_path: Path) -> None:
    data = make_coco(n=4)
    annotations = Path(data["annotations"])
    content = json.loads(annotations.read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] == 10]
    annotations.write_text(json.dumps(content))
    train(_config(data, tmp_path / "run", batch_size=1, max_steps=4))  # three steps have no foreground at all
    assert all(value.isfinite().all() for value in _weights(tmp_path / "run" / "last.pt").values())


def test_drop_empty_leaves_them_out(make_coco: MakeCoco, tmp_path: Path) -> None:
    data = make_coco(n=4)
    annotations = Path(data["annotations"])
    content = json.loads(annotations.read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 10]
    annotations.write_text(json.dumps(content))
    config = _config(data, tmp_path / "run")
    config.data.drop_empty = True
    trainer = Trainer(config, None, torch.device("cpu"))
    assert trainer.annotations.image_ids.tolist() == [11, 12, 13]


def test_tensorboard_has_curves_and_pictures_and_no_doubled_steps(make_coco: MakeCoco, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    data, out = make_coco(), tmp_path / "run"
    options = {"log_every_steps": 1, "save_every_steps": 2}
    with power_cut(after=5):
        train(_config(data, out, **options))  # logged up to 5, saved at 4
    time.sleep(1.1)  # event files are named by the second
    train(_config(data, out, **options), resume=True)
    events = EventAccumulator(str(out))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert {"train/learning_rate", "val/AP", "val/loss_cls", "speed/images_per_second"} <= set(events.Tags()["scalars"])
    assert "validation/0" in events.Tags()["images"]


def _run_tool(*arguments: str, ranks: int = 1, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.run(
        [sys.executable, *launcher, *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.mark.slow
def test_killed_three_times_and_resumed_ends_bitwise_the_same(make_coco: MakeCoco, tmp_path: Path) -> None:
    data = make_coco(n=12)
    file = tmp_path / "config.yaml"
    config = _config(data, tmp_path / "whole", max_steps=40, save_every_steps=3, validate_every_steps=10, ema_decay=0.9)
    config.data.workers = 2
    save_config(config, file)
    whole = _run_tool("tools/train.py", str(file))
    assert whole.returncode == 0, whole.stderr

    killed = tmp_path / "killed"
    for step in (5, 13, 26):
        process = subprocess.Popen(
            [sys.executable, "tools/train.py", str(file), f"output_dir={killed}", "--resume"],
            cwd=REPOSITORY,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and _saved_step(killed) < step:
            time.sleep(0.01)
        time.sleep(0.05 * step % 0.3)  # somewhere inside a step, not always just after a save
        process.kill()
        process.wait()
    assert 26 <= _saved_step(killed) < 40
    final = _run_tool("tools/train.py", str(file), f"output_dir={killed}", "--resume")
    assert final.returncode == 0, final.stderr
    a, b = load_checkpoint(tmp_path / "whole" / "last.pt"), load_checkpoint(killed / "last.pt")
    _assert_same(a.model, b.model)
    assert a.ema is not None
    assert b.ema is not None
    _assert_same(a.ema, b.ema)
    assert json.loads((tmp_path / "whole" / "metrics.json").read_text()) == json.loads((killed / "metrics.json").read_text())


def _saved_step(folder: Path) -> int:
    try:
        saved: Checkpoint = load_checkpoint(folder / "last.pt")
    except UserError:
        return -1
    return int((saved.training or {}).get("step", -1))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["every rank has objects", "one rank has none"])
def test_two_ranks_give_the_gradient_and_the_metrics_of_one_process(make_coco: MakeCoco, tmp_path: Path, case: str) -> None:
    data = make_coco(n=5 if "every" in case else 2, size=(64, 64))
    if "none" in case:
        annotations = Path(data["annotations"])
        content = json.loads(annotations.read_text())
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] == 10]
        annotations.write_text(json.dumps(content))
    batch = 4 if "every" in case else 2
    # one step of plain SGD at rate 1 makes the change of the weights the gradient
    config = _config(
        data,
        tmp_path / "one",
        batch_size=batch,
        max_steps=1,
        optimizer="sgd",
        learning_rate=1.0,
        momentum=0.0,
        weight_decay=0.0,
        warmup_steps=0,
        schedule="cosine",
        clip_grad_norm=None,
    )
    config.model.freeze_stages = 0
    file = tmp_path / "config.yaml"
    save_config(config, file)
    for ranks, name in ((1, "one"), (2, "two")):
        done = _run_tool("tools/train.py", str(file), f"output_dir={tmp_path / name}", ranks=ranks)
        assert done.returncode == 0, done.stderr
    one, two = _weights(tmp_path / "one" / "last.pt"), _weights(tmp_path / "two" / "last.pt")
    start = Trainer(config.model_copy(update={"output_dir": str(tmp_path / "x")}), None, torch.device("cpu")).model
    moved = 0.0
    for key, value in start.state_dict().items():
        torch.testing.assert_close(two[key] - value, one[key] - value, rtol=1e-4, atol=1e-5, msg=key)
        moved += float((one[key] - value).abs().sum())
    assert moved > 1.0  # there was a gradient to compare
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    assert metrics[0]["images"] == metrics[1]["images"]
    assert metrics[0]["AP"] == pytest.approx(metrics[1]["AP"], abs=1e-4)

    # evaluation alone, of the same weights on 1 and 2 ranks: every image once, the very same numbers
    weights = str(tmp_path / "one" / "best.pt")
    for ranks in (1, 2):
        arguments = ("tools/evaluate.py", "--weights", weights, "--out", str(tmp_path / f"evaluated{ranks}"))
        done = _run_tool(*arguments, ranks=ranks)
        assert done.returncode == 0, done.stderr
    results = [json.loads((tmp_path / f"evaluated{ranks}" / "detections.json").read_text()) for ranks in (1, 2)]
    key = str
    assert sorted(map(key, results[0])) == sorted(map(key, results[1]))


LEAVES_THE_GROUP = """
import os, sys
from pathlib import Path
import torch
from torch.nn.parallel import DistributedDataParallel
from retinanet.distributed import process_group

def threads():
    return {comm.read_text().strip() for comm in Path("/proc/self/task").glob("*/comm")}

def step():
    DistributedDataParallel(torch.nn.Linear(2, 1))(torch.ones(1, 2)).sum().backward()

with process_group("cpu"):
    step()
    assert any("gloo" in name for name in threads()), threads()  # or the check below would see nothing
left = [name for name in threads() if "gloo" in name]
sys.exit(f"left running: {left}" if left else 0)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="names of threads are read from /proc")
def test_no_thread_of_gloo_outlives_the_group(tmp_path: Path) -> None:
    # one that does may let go of a tensor while the interpreter is taken down, which aborts the process
    script = tmp_path / "leaves.py"
    script.write_text(LEAVES_THE_GROUP)
    done = _run_tool(str(script), ranks=2)
    assert done.returncode == 0, done.stderr


def _real_config(real_data: Path, real_weights: Path, tmp_path: Path, **train_settings: Any) -> Path:
    """coco_mini with the pretrained ResNet-18, as a user would write it."""
    backbone = tmp_path / "resnet18.pth"
    if not backbone.exists():
        backbone.write_bytes(lzma.decompress((real_weights / "resnet18.pth.xz").read_bytes()))
    coco = real_data / "coco_mini"
    raw = {
        "model": {"backbone": "resnet18", "backbone_weights": str(backbone), "fpn_channels": 128, "head_norm": "group"},
        "input": {"short_edge": 256, "long_edge": 448},
        "data": {
            "train": {"path": str(coco / "train2017"), "annotations": str(coco / "annotations/instances_train2017.json")},
            "val": {"path": str(coco / "val2017"), "annotations": str(coco / "annotations/instances_val2017.json")},
        },
        "train": {"optimizer": "adamw", "learning_rate": 5e-4, **train_settings},
        "output_dir": str(tmp_path / "run"),
    }
    file = tmp_path / "real.yaml"
    save_config(parse_config(raw), file)
    return file


@pytest.mark.slow
def test_real_images_train_evaluate_and_predict_without_a_warning(real_data: Path, real_weights: Path, tmp_path: Path) -> None:
    config = str(_real_config(real_data, real_weights, tmp_path, batch_size=4, max_steps=20))
    weights = str(tmp_path / "run" / "best.pt")
    for command in (
        ("tools/train.py", config),
        ("tools/evaluate.py", config, "--weights", weights),
        ("tools/predict.py", str(real_data / "coco_mini" / "val2017"), "--weights", weights, "--score", "0.1"),
    ):
        done = _run_tool("-W", "error::UserWarning", "-W", "error::RuntimeWarning", *command)
        assert done.returncode == 0, done.stderr
        assert "warning" not in (done.stdout + done.stderr).lower()
    assert len(list((tmp_path / "run" / "predictions").glob("*.jpg"))) == 74  # an image each


@pytest.mark.slow
def test_eight_real_images_are_learned_by_heart(real_data: Path, real_weights: Path, tmp_path: Path) -> None:
    truth = json.loads((real_data / "coco_mini/annotations/instances_train2017.json").read_text())
    few = [image for image in truth["images"] if any(a["image_id"] == image["id"] for a in truth["annotations"])][:8]
    ids = {image["id"] for image in few}
    truth["images"], truth["annotations"] = few, [a for a in truth["annotations"] if a["image_id"] in ids]
    annotations = tmp_path / "eight.json"
    annotations.write_text(json.dumps(truth))
    config = _real_config(real_data, real_weights, tmp_path, batch_size=8, max_steps=150, schedule="cosine")
    folder = str(real_data / "coco_mini" / "train2017")
    overrides = [f"data.{split}.{key}={value}" for split in ("train", "val") for key, value in
                 (("path", folder), ("annotations", annotations))]  # fmt: skip
    done = _run_tool("tools/train.py", str(config), *overrides, "augment.transforms=[]", timeout=900)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["AP50"] > 0.9
