"""Fine-tuning that needs two paths: what follows from the data and from the weights, when it ends, and what is said."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import REPOSITORY, SMALL, power_cut
from torch import Tensor

from retinanet.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, save_thresholds
from retinanet.config import Config, load_config, parse_config
from retinanet.errors import UserError
from retinanet.evaluation.run import Evaluation
from retinanet.model import build_model
from retinanet.run_setup import load_data, load_splits, run_length
from retinanet.structures import Category
from retinanet.training import Trainer, train
from retinanet.validation import Validation
from retinanet.weights import zoo

MakeCoco = Callable[..., dict[str, str]]
Said = pytest.CaptureFixture[str]
ANCHORS = {"sizes": [16, 32, 64, 128, 256]}  # for `make_coco`'s boxes, of 20 to 31 pixels at 64 x 96


def config_of(data: dict[str, str], out: Path, /, **sections: dict[str, Any]) -> Config:
    raw: dict[str, dict[str, Any]] = {
        "model": {**SMALL, "freeze_stages": 5, "anchors": ANCHORS},
        "input": {"short_edge": 64, "long_edge": 96},
        "data": {"train": data, "val": data, "workers": 0},
        "train": {"batch_size": 4, "max_steps": 6, "precision": "fp32", "optimizer": "adamw", "learning_rate": 1e-3},
    }
    merged = {name: {**raw.get(name, {}), **sections.get(name, {})} for name in raw | sections}
    return parse_config({**merged, "output_dir": str(out), "seed": 3})


def detector(file: Path, *names: str, **model: Any) -> Checkpoint:
    """A small detector with random weights, whose settings are not those of `config_of`, saved as `file`."""
    config = parse_config(
        {"model": {**SMALL, "fpn_channels": 64, "norm": "frozen", "head_convs": 2, "anchors": ANCHORS, **model}}
    )
    config.model.num_classes = len(names)
    torch.manual_seed(1)
    state = build_model(config.model, config.input).state_dict()
    checkpoint = Checkpoint(config, tuple(Category(10 + n, name) for n, name in enumerate(names)), state)
    save_checkpoint(file, checkpoint)
    return checkpoint


def start(config: Config) -> Trainer:
    return Trainer(config, None, torch.device("cpu"))


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]), key


# ------------------------------------------------------------------------------------------------- length of the run


@pytest.mark.parametrize(
    ("images", "epochs", "steps"),
    [
        (205, 8000 / 205, 1015),  # 39.02 epochs of ceil(205 / 8) = 26 steps: 1014.6
        (20, 100, 300),  # 400 epochs would show 8,000 images: 100 epochs of 3 steps
        (1000, 12, 1500),  # 8 epochs would: 12 of 125 steps
        (100_000, 12, 150_000),
        (1, 100, 100),
    ],
)
def test_length_follows_from_the_number_of_images(capsys: Said, images: int, epochs: float, steps: int) -> None:
    config = parse_config({"train": {"batch_size": 8}})
    assert run_length(config, images)[0] == steps
    assert f"length: {epochs:.1f} epochs of {images} images" in capsys.readouterr().out


def test_a_length_that_is_given_holds(capsys: Said) -> None:
    assert run_length(parse_config({"train": {"batch_size": 8, "epochs": 2}}), 205)[0] == 52
    assert run_length(parse_config({"train": {"batch_size": 8, "max_steps": 7}}), 205)[0] == 7
    assert capsys.readouterr().out == ""


# --------------------------------------------------------------------------------------------------- early stopping


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float | None]], None]:
    """A function that sets the AP of the following validations, one after the other."""

    measure = Validation.measure

    def plan(values: list[float | None]) -> None:
        left = iter(values)

        def planted(self: Validation, *arguments: Any) -> Evaluation:
            result = measure(self, *arguments)
            result.metrics["AP"] = next(left)
            return result

        monkeypatch.setattr(Validation, "measure", planted)

    return plan


def patient(data: dict[str, str], out: Path, **settings: Any) -> Config:
    return config_of(data, out, train={"batch_size": 2, "max_steps": 6, "validate_every_steps": 1, "patience": 2, **settings})


def test_patience_counts_validations_in_a_row_without_a_better_ap(
    make_coco: MakeCoco, tmp_path: Path, planned: Callable[..., None], capsys: Said
) -> None:
    """.1, then .1 is no better (1), .2 is (0), .2 (1), None counts as 0 (2): the end, after 5 of 6 steps."""
    planned([0.1, 0.1, 0.2, 0.2, None])
    config = patient(make_coco(n=2), tmp_path / "run")
    assert train(config) is True
    out = capsys.readouterr().out
    assert "no better AP in 2 validations in a row (train.patience): stopped at step 5" in out
    assert "finished: 5 steps" in out and "best validation AP 20.0" in out
    state = load_checkpoint(tmp_path / "run" / "last.pt").training
    assert state is not None and (state["step"], state["stale"], state["best_ap"]) == (5, 2, 0.2)

    assert train(config, resume=True) is True
    assert "this run is finished (5 steps)" in capsys.readouterr().out
    planned([0.1])
    assert train(patient(config.data.train.model_dump(), tmp_path / "run", patience=4), resume=True) is True  # type: ignore[union-attr]
    assert "finished: 6 steps" in capsys.readouterr().out  # more patience goes on


def test_without_patience_a_run_goes_to_its_end(make_coco: MakeCoco, tmp_path: Path, planned: Callable[..., None]) -> None:
    planned([0.5, 0.0, 0.0, 0.0])
    train(patient(make_coco(n=2), tmp_path / "run", max_steps=4, patience=None))
    state = load_checkpoint(tmp_path / "run" / "last.pt").training
    assert state is not None and (state["step"], state["stale"]) == (4, 3)


def test_patience_without_validation_data_is_refused(make_coco: MakeCoco, tmp_path: Path) -> None:
    config = config_of(make_coco(), tmp_path / "run", train={"patience": 2})
    config.data.val = None
    with pytest.raises(UserError, match=r"train\.patience watches the AP on data\.val: set data\.val\.path"):
        start(config)


def test_checkpoints_of_before_there_was_patience_go_on(make_coco: MakeCoco, tmp_path: Path) -> None:
    data = make_coco(n=2)
    train(config_of(data, tmp_path / "run", train={"batch_size": 2, "max_steps": 1}))
    old = load_checkpoint(tmp_path / "run" / "last.pt")
    assert old.training is not None
    del old.training["stale"]
    save_checkpoint(tmp_path / "run" / "last.pt", old)
    assert train(config_of(data, tmp_path / "run", train={"batch_size": 2, "max_steps": 2}), resume=True) is True


@pytest.mark.slow
def test_with_repeats_and_patience_a_resumed_run_is_bitwise_the_same(
    make_coco: MakeCoco, tmp_path: Path, planned: Callable[..., None], capsys: Said
) -> None:
    """8 images, of which one alone has the class green: sqrt(0.5 / (1 / 8)) = 2 times. 9 images are 3 steps an epoch."""
    data, val = make_coco(n=8), make_coco("val", n=1)
    file = Path(data["annotations"])
    content = json.loads(file.read_text())
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] == 3 or a["image_id"] == 12]
    file.write_text(json.dumps(content))

    def config(out: str) -> Config:
        made = patient(data, tmp_path / out, batch_size=4, max_steps=8, ema_decay=0.9)
        made.data.repeat_threshold, made.data.val = 0.5, made.data.val.model_copy(update=val)  # type: ignore[union-attr]
        return made

    plan: list[float | None] = [0.3, 0.1, 0.4, 0.2, 0.4]  # stale at steps 4 and 5
    planned(plan)
    train(config("whole"))
    assert "repeats: an epoch shows 9 images, 1 with rare classes up to 2.0 times" in capsys.readouterr().out
    planned(plan)
    with power_cut(after=4):
        train(config("broken"))
    planned(plan[4:])
    train(config("broken"), resume=True)
    whole, broken = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "broken"))
    assert whole.training is not None and broken.training is not None
    assert whole.training["step"] == broken.training["step"] == 5 and whole.training["stale"] == broken.training["stale"] == 2
    assert_same(whole.model, broken.model)
    assert whole.ema is not None and broken.ema is not None
    assert_same(whole.ema, broken.ema)


# ------------------------------------------------------------------------------------------------- where it starts from


def test_the_models_settings_come_with_the_weights(make_coco: MakeCoco, tmp_path: Path, capsys: Said) -> None:
    donor = detector(tmp_path / "donor.pt", "green", "blue")
    data = make_coco(n=2)
    settings = {"init_from": str(tmp_path / "donor.pt"), "adopt_model": True, "max_steps": 1, "batch_size": 2}
    config = config_of(data, tmp_path / "run", train=settings)
    config.model.prior = 0.02  # where a new class starts: no setting of the weights
    train(config)
    model = load_checkpoint(tmp_path / "run" / "best.pt").config.model
    assert (model.fpn_channels, model.norm, model.head_convs) == (64, "frozen", 2)
    assert (model.prior, model.freeze_stages, model.num_classes) == (0.02, 5, 2)
    out = capsys.readouterr().out
    assert f"note: model.head_convs is 2 as {tmp_path / 'donor.pt'} was trained, not 1" in out
    assert "kept                 1  green\n" in out and donor.config.model.num_classes == 2

    (tmp_path / "donor.pt").unlink()  # a run that goes on needs it no more, and keeps what it decided
    again = config_of(data, tmp_path / "run", train={**settings, "max_steps": 2})
    assert train(again, resume=True) is True
    assert again.model.head_convs == 2
    assert "note: as was decided when this run started: " in (out := capsys.readouterr().out)
    assert "model.head_convs 2, not 1" in out


def test_of_the_backbone_alone_only_its_settings_come(make_coco: MakeCoco, tmp_path: Path) -> None:
    detector(tmp_path / "donor.pt", "a", norm_eps=1e-3)
    settings = {"init_from": str(tmp_path / "donor.pt"), "adopt_model": True, "init_part": "backbone"}
    config = config_of(make_coco(n=2), tmp_path / "run", train=settings)
    start(config)
    assert (config.model.norm, config.model.norm_eps) == ("frozen", 1e-3)
    assert (config.model.fpn_channels, config.model.head_convs) == (32, 1)


def test_finetune_yaml_starts_from_the_zoo(
    make_coco: MakeCoco, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    """As a user calls it, with one path; in the zoo's place in the cache lies a smaller detector."""
    monkeypatch.setenv("RETINANET_CACHE", str(tmp_path / "cache"))
    donor = detector(tmp_path / "cache" / f"retinanet_resnet50_fpn_v2.{zoo.CONVERSION}.pt", "green", "person")
    data = make_coco(n=10)
    given = [f"data.train.{key}={value}" for key, value in data.items()]
    given += [f"output_dir={tmp_path / 'run'}", "data.workers=0", "train.precision=fp32", "train.batch_size=4"]
    config = load_config(REPOSITORY / "configs" / "finetune.yaml", given)
    trainer = start(config)
    out = capsys.readouterr().out
    assert "batch 4 instead of 8: learning_rate 0.0002 -> 0.0001" in out
    assert "data.val is not set: 1 of 10 training images are held out for it" in out
    assert "length: 100.0 epochs of 9 images" in out and trainer.total_steps == 300  # 3 steps of 4 an epoch
    assert "kept                 1  green\n  new, at the prior    1  red\n  dropped              1  person\n" in out
    assert "anchors: " in out and config.model.anchors.sizes == ANCHORS["sizes"]  # trained heads keep theirs
    assert [tuple(c) for c in trainer.categories] == [(3, "red"), (7, "green")]
    assert torch.equal(trainer.model.fpn.lateral[0].weight, donor.model["fpn.lateral.0.weight"])


def test_a_backbones_state_dict_may_stand_in_init_from(make_coco: MakeCoco, tmp_path: Path) -> None:
    import torchvision

    torch.manual_seed(5)
    state = torchvision.models.resnet18(weights=None).state_dict()
    torch.save(state, tmp_path / "resnet18.pth")
    config = config_of(make_coco(n=2), tmp_path / "run", train={"init_from": str(tmp_path / "resnet18.pth")})
    config.model.norm = "frozen"
    trainer = start(config)
    assert torch.equal(trainer.model.backbone.conv1.weight, state["conv1.weight"])
    assert config.model.backbone_weights == str(tmp_path / "resnet18.pth")


def test_weights_under_the_wrong_key_are_sent_to_the_right_one(make_coco: MakeCoco, tmp_path: Path) -> None:
    detector(tmp_path / "donor.pt", "a")
    torch.save({"head.classification_head.conv.0.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    data = make_coco(n=2)
    for section, key, value, message in (
        ("model", "backbone_weights", tmp_path / "donor.pt", r"whole detector: set train\.init_from=.*donor\.pt"),
        ("model", "backbone_weights", "retinanet_resnet50_fpn_v2", r"does not exist \(a detector.*train\.init_from"),
        (
            "train",
            "init_from",
            tmp_path / "other.pth",
            r"other\.pth are not a checkpoint of this project; tools/convert_weights",
        ),
        ("train", "init_from", "resnet50", "neither a file nor in the zoo"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            start(config_of(data, tmp_path / "run", **{section: {**(SMALL if section == "model" else {}), key: str(value)}}))
        assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------------------------------- anchors

FAR = {"sizes": [256, 512, 1024, 2048, 4096]}  # of 20 to 31 pixels none has an IoU of 0.5 with a side of 256


def test_anchors_that_reach_the_boxes_are_said_in_a_line(make_coco: MakeCoco, tmp_path: Path, capsys: Said) -> None:
    config = config_of(make_coco(n=4), tmp_path / "run", train={"fit_anchors": True})
    start(config)
    assert "anchors: 100.0% of the boxes have one of IoU 0.5 or more, 0.0% learn by a worse one" in capsys.readouterr().out
    assert config.model.anchors.sizes == ANCHORS["sizes"]


def test_anchors_that_do_not_reach_the_boxes_are_reported(make_coco: MakeCoco, tmp_path: Path, capsys: Said) -> None:
    config = config_of(make_coco(n=4), tmp_path / "run", model={**SMALL, "anchors": FAR})
    start(config)
    out = capsys.readouterr().out
    assert "anchors: 0.0% of the boxes have one of IoU 0.5 or more" in out
    assert any(line.split()[:3] == ["red", "4", "0.0%"] for line in out.splitlines())  # the table
    assert "tools/suggest_anchors.py looks for anchors that reach more; train.fit_anchors takes them over" in out
    assert config.model.anchors.sizes == FAR["sizes"]


def test_anchors_are_fitted_where_the_heads_start_fresh(make_coco: MakeCoco, tmp_path: Path, capsys: Said) -> None:
    data = make_coco(n=4)
    settings = {"fit_anchors": True, "max_steps": 1, "batch_size": 2}
    config = config_of(data, tmp_path / "run", model={**SMALL, "anchors": FAR}, train=settings)
    train(config)
    out = capsys.readouterr().out
    assert "taken over, as train.fit_anchors says: model.anchors.sizes [" in out
    assert min(config.model.anchors.sizes) < 40
    assert (
        yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]["anchors"]["sizes"]
        == config.model.anchors.sizes
    )

    again = config_of(data, tmp_path / "run", model={**SMALL, "anchors": FAR}, train={**settings, "max_steps": 2})
    assert train(again, resume=True) is True  # with the run's anchors, found once
    assert again.model.anchors == config.model.anchors and again.input == config.input
    out = capsys.readouterr().out
    assert "taken over" not in out and "note: model.anchors" not in out


def test_trained_heads_keep_their_anchors(make_coco: MakeCoco, tmp_path: Path, capsys: Said) -> None:
    detector(tmp_path / "donor.pt", "red", anchors=FAR)
    settings = {"fit_anchors": True, "adopt_model": True, "init_from": str(tmp_path / "donor.pt")}
    config = config_of(make_coco(n=4), tmp_path / "run", train=settings)
    start(config)
    assert config.model.anchors.sizes == FAR["sizes"]
    assert "the heads, trained for the present ones, would begin again" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------- data and thresholds


def test_validation_data_may_be_held_out(make_coco: MakeCoco, tmp_path: Path) -> None:
    config = config_of(make_coco(n=10), tmp_path / "run", data={"val_share": 0.2, "val": None})
    annotations, validation = load_data(config)
    assert validation is not None and (len(annotations), len(validation)) == (8, 2)
    assert sorted([*annotations.image_ids, *validation.image_ids]) == list(range(10, 20))
    (again,) = load_splits(config, "val")  # what tools/evaluate.py reads
    assert again is not None and again.image_ids.tolist() == validation.image_ids.tolist()
    assert load_splits(config, "test") == [None]
    config.data.val = config.data.train
    assert [len(part) for part in load_data(config) if part is not None] == [10, 10]  # what is set goes before


def test_validation_data_with_other_ids_goes_by_name(make_coco: MakeCoco, tmp_path: Path, capsys: Said) -> None:
    """red 3, green 7 in training; in validation green 1, red 2. It is said once, though there are three validations."""
    data, other = make_coco(n=2), make_coco("other", n=2)
    file = Path(other["annotations"])
    content = json.loads(file.read_text())
    content["categories"] = [{"id": 2, "name": "red"}, {"id": 1, "name": "green"}]
    for entry in content["annotations"]:
        entry["category_id"] = {3: 2, 7: 1}[entry["category_id"]]
    file.write_text(json.dumps(content))

    def metrics(name: str, val: dict[str, str]) -> dict[str, Any]:
        settings = {"batch_size": 2, "max_steps": 3, "validate_every_steps": 1}
        train(config_of(data, tmp_path / name, data={"val": val}, train=settings))
        found: dict[str, Any] = json.loads((tmp_path / name / "metrics.json").read_text())
        return found

    mapped = metrics("mapped", other)
    assert capsys.readouterr().out.count("matched by name (red 2 instead of 3, green 1 instead of 7)") == 1
    plain = metrics("plain", data)
    assert mapped.pop("per_class").items() == plain.pop("per_class").items()
    assert mapped == pytest.approx(plain)  # the same pictures and boxes: the losses too

    content["categories"] = [{"id": 2, "name": "rot"}, {"id": 1, "name": "grün"}]
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"none of the classes of the model \(red, green"):
        metrics("none", other)


def test_thresholds_are_kept_and_nothing_else_is_changed(make_coco: MakeCoco, tmp_path: Path) -> None:
    train(config_of(make_coco(n=2), tmp_path / "run", train={"batch_size": 2, "max_steps": 1, "ema_decay": 0.9}))
    file = tmp_path / "run" / "last.pt"
    before = load_checkpoint(file)
    save_checkpoint(file, Checkpoint(**{**vars(before), "thresholds": {"red": 0.1, "green": 0.2}}))
    assert save_thresholds(file, {"green": 0.75, "blue": 0.5}) == ["green"]  # blue is no class of the detector
    after = load_checkpoint(file)
    assert after.thresholds == {"red": 0.1, "green": 0.75}
    assert (after.config, after.categories) == (before.config, before.categories)
    assert_same(after.model, before.model)
    assert after.ema is not None and before.ema is not None
    assert_same(after.ema, before.ema)
    assert after.training is not None and before.training is not None and after.training.keys() == before.training.keys()
    assert [path.name for path in file.parent.glob(".*")] == []  # no temporary file is left


def test_a_skipped_step_names_the_images_of_all_ranks(
    make_coco: MakeCoco, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    from retinanet.criterion import RetinaNetLoss

    sums, factors = RetinaNetLoss.sums, iter([1.0, float("nan")])
    monkeypatch.setattr(
        RetinaNetLoss, "sums", lambda *given: sums(*given)._replace(loss_cls=sums(*given).loss_cls * next(factors))
    )
    monkeypatch.setattr("retinanet.bad_steps.gather_to_main", lambda names: [names, ["of_another_rank.png"]])
    config = config_of(make_coco(n=2), tmp_path / "run", train={"batch_size": 2, "max_steps": 2})
    config.data.val = None
    train(config)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "is skipped" in line]
    assert sorted(line.partition("images ")[2].split(", ")) == ["0.png", "1.png", "of_another_rank.png"]


def test_repeat_factors_reach_the_loader(make_coco: MakeCoco, tmp_path: Path) -> None:
    config = config_of(make_coco(n=4), tmp_path / "run", data={"repeat_threshold": 1.0})
    trainer = start(config)
    assert trainer.repeats is not None and np.all(trainer.repeats == 1) and trainer.epoch_images == 4  # both classes in all
