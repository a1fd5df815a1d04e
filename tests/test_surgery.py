"""Fine-tuning from trained weights: class rows go by name and to the bit, and what does not fit is said in one line."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from torch import Tensor, nn

from retinanet.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from retinanet.config import Config, parse_config, save_config
from retinanet.errors import UserError
from retinanet.model import RetinaNet, build_model
from retinanet.run_setup import initial_model
from retinanet.structures import Category

MakeCoco = Callable[..., dict[str, str]]
ANCHORS = 2  # in a cell of the small detector below: one scale, two ratios
FINAL = ("cls_subnet.final.weight", "cls_subnet.final.bias")
PRIOR_LOGIT = -1.3862944  # ln(0.2 / 0.8)


def config_of(**sections: Any) -> Config:
    """A small detector; `sections` go over it, key by key."""
    raw: dict[str, Any] = {
        "model": {
            "backbone": "resnet18",
            "backbone_weights": "none",
            "norm": "frozen",
            "fpn_channels": 32,
            "head_convs": 1,
            "prior": 0.2,
            "anchors": {"sizes": [16, 32, 64, 128, 256], "scales": [1.0], "ratios": [1.0, 2.0]},
        }
    }
    for name, keys in sections.items():
        raw[name] = {**raw.get(name, {}), **keys}
    return parse_config(raw)


def named(*names: str) -> tuple[Category, ...]:
    return tuple(Category(10 + n, name) for n, name in enumerate(names))


def donor_of(names: Sequence[str], *, ema: bool = False, seed: int = 7, **sections: Any) -> Checkpoint:
    """A detector of which every tensor is random, the class output's rows among them."""
    config = config_of(**sections)
    config.model.num_classes = len(names)
    torch.manual_seed(seed)

    def state() -> dict[str, Tensor]:
        model = build_model(config.model, config.input)
        for value in model.parameters():
            nn.init.normal_(value)
        return {key: value.clone() for key, value in model.state_dict().items()}

    return Checkpoint(config, named(*names), state(), ema=state() if ema else None)


def start(tmp_path: Path, donor: Checkpoint, names: Sequence[str], config: Config | None = None) -> RetinaNet:
    """What a run begins with whose data has the classes `names`."""
    file = tmp_path / "donor.pt"
    save_checkpoint(file, donor)
    config = config or config_of()
    config.model.num_classes = len(names)
    config.train.init_from = str(file)
    torch.manual_seed(0)
    return initial_model(config, None, named(*names))


def rows(tensor: Tensor, label: int, classes: int) -> Tensor:
    """The rows of a class, one for each anchor: a * K + c, written out."""
    return torch.stack([tensor[anchor * classes + label] for anchor in range(ANCHORS)])


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_two_kept_in_another_order_one_new_one_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    donor = donor_of(["cat", "dog", "emu"])
    model = start(tmp_path, donor, ["dog", "fox", "cat"])
    for key, value in model.state_dict().items():
        if key not in FINAL:
            assert torch.equal(value, donor.model[key]), key
    for key in FINAL:
        ours, theirs = model.state_dict()[key], donor.model[key]
        assert torch.equal(rows(ours, 0, 3), rows(theirs, 1, 3))  # dog
        assert torch.equal(rows(ours, 2, 3), rows(theirs, 0, 3))  # cat
    fox = rows(model.state_dict()[FINAL[1]], 1, 3)
    torch.testing.assert_close(fox, torch.full((ANCHORS,), PRIOR_LOGIT), rtol=0, atol=1e-6)
    weight = rows(model.state_dict()[FINAL[0]], 1, 3)
    assert 0.008 < float(weight.std()) < 0.012 and abs(float(weight.mean())) < 0.002  # normal, 0.01, as a Subnet begins
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"{tmp_path / 'donor.pt'}: weights, classes matched by name",
        "  kept                 2  dog, cat",
        "  new, at the prior    1  fox",
        "  dropped              1  emu",
    ]


def test_the_number_of_classes_may_grow_and_shrink(tmp_path: Path) -> None:
    """Rows are counted in the donor's classes there and in the data's here: 2 to 5, and 5 to 1."""
    few, many = donor_of(["a", "b"]), donor_of(["v", "w", "a", "x", "y"])
    grown = start(tmp_path, few, ["x", "y", "z", "b", "a"]).state_dict()
    shrunk = start(tmp_path, many, ["y"]).state_dict()
    for key in FINAL:
        assert torch.equal(rows(grown[key], 3, 5), rows(few.model[key], 1, 2))
        assert torch.equal(rows(grown[key], 4, 5), rows(few.model[key], 0, 2))
        assert torch.equal(rows(shrunk[key], 0, 1), rows(many.model[key], 4, 5))
        assert shrunk[key].shape[0] == ANCHORS


def test_no_name_in_common_starts_the_class_output_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    donor = donor_of(["cat", "dog"])
    model = start(tmp_path, donor, ["Cat", "fish"])  # names are compared as they are
    bias = model.state_dict()[FINAL[1]]
    torch.testing.assert_close(bias, torch.full((ANCHORS * 2,), PRIOR_LOGIT), rtol=0, atol=1e-6)
    assert torch.equal(model.state_dict()["box_subnet.final.weight"], donor.model["box_subnet.final.weight"])
    printed = capsys.readouterr().out
    assert "kept                 0\n" in printed and "dropped              2  cat, dog" in printed


def test_the_same_classes_in_another_order_and_under_other_ids(tmp_path: Path) -> None:
    donor = donor_of(["a", "b", "c"])
    model = start(tmp_path, donor, ["c", "a", "b"])
    for key in FINAL:
        for here, there in ((0, 2), (1, 0), (2, 1)):
            assert torch.equal(rows(model.state_dict()[key], here, 3), rows(donor.model[key], there, 3))


def test_many_names_are_shortened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start(tmp_path, donor_of([f"old{n}" for n in range(12)]), ["x"])
    dropped = next(line for line in capsys.readouterr().out.splitlines() if "dropped" in line)
    assert dropped == "  dropped             12  old0, old1, old2, old3, old4, old5, old6, old7, ..."


def test_averaged_weights_are_preferred(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    donor = donor_of(["a"], ema=True)
    model = start(tmp_path, donor, ["a"])
    assert donor.ema is not None
    for key, value in model.state_dict().items():
        assert torch.equal(value, donor.ema[key]), key
    assert not torch.equal(donor.ema[FINAL[0]], donor.model[FINAL[0]])
    assert "averaged weights, classes matched by name" in capsys.readouterr().out


def test_the_backbone_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Into a detector whose every other part has another shape."""
    donor = donor_of(["a", "b"])
    config = config_of(
        model={"fpn_channels": 64, "head_norm": "group", "anchors": {"ratios": [1.0]}},
        train={"init_from": "set below", "init_part": "backbone"},
    )
    model = start(tmp_path, donor, ["a", "c"], config)
    for key, value in model.state_dict().items():
        if key.startswith("backbone."):
            assert torch.equal(value, donor.model[key]), key
    torch.manual_seed(0)
    fresh = build_model(config.model, config.input).state_dict()
    for key, value in model.state_dict().items():
        if not key.startswith("backbone."):
            assert torch.equal(value, fresh[key]), key
    printed = capsys.readouterr().out
    assert "weights of the backbone; pyramid and heads start at random" in printed
    assert "kept" not in printed and "note" not in printed


def test_a_part_of_nothing_is_refused() -> None:
    assert "init_part needs init_from" in refused(lambda: config_of(train={"init_part": "backbone"}))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"fpn_channels": 64},
            "fpn.lateral.0.weight is [64, 128, 1, 1] there, [32, 128, 1, 1] here; take over model.fpn_channels=64 "
            "(train.adopt_model=true does it) or set train.init_part=backbone",
        ),
        ({"head_convs": 2}, "cls_subnet.convs.2.weight is missing here; take over model.head_convs=2 ("),
        ({"head_convs": 0}, "cls_subnet.convs.0.weight is missing there; take over model.head_convs=0 ("),
        (
            {"anchors": {"scales": [1.0], "ratios": [1.0]}},
            # 1 anchor * 1 class there; here there are 2 anchors, of which each would have 1 class
            "cls_subnet.final.weight is [1, 32, 3, 3] there, [2, 32, 3, 3] here; take over "
            "model.anchors.sizes=[32.0,64.0,128.0,256.0,512.0] model.anchors.ratios=[1.0] (train.adopt_model=true",
        ),
        ({"p6_from": "p5"}, "fpn.p6.weight is [32, 32, 3, 3] there, [32, 512, 3, 3] here; take over model.p6_from=p5"),
        ({"backbone": "resnet34"}, "backbone.layer1.2.conv1.weight is missing here; take over model.backbone=resnet34"),
        ({"norm": "group"}, "backbone.bn1.running_mean is missing there; take over model.norm=group"),
    ],
)
def test_another_architecture_is_one_line(tmp_path: Path, model: dict[str, Any], message: str) -> None:
    donor = donor_of(["a"], model=model)
    line = refused(lambda: start(tmp_path, donor, ["a", "b"]))
    assert line.startswith(f"train.init_from {tmp_path / 'donor.pt'} does not fit: ")
    assert message in line


def test_another_backbone_for_the_backbone_alone(tmp_path: Path) -> None:
    donor = donor_of(["a"], model={"backbone": "resnet34", "fpn_channels": 64})
    config = config_of(train={"init_from": "set below", "init_part": "backbone"})
    line = refused(lambda: start(tmp_path, donor, ["a"], config))
    assert line.endswith(
        "layer1.2.conv1.weight is missing here; take over model.backbone=resnet34 (train.adopt_model=true does it)"
    )


def test_tensors_that_no_setting_explains(tmp_path: Path) -> None:
    donor = donor_of(["a"])
    donor.model["box_subnet.final.bias"] = torch.zeros(3)
    config = config_of()
    line = refused(lambda: start(tmp_path, donor, ["a"], config))
    assert "box_subnet.final.bias is [3] there, [8] here; set train.init_part=backbone" in line


@pytest.mark.parametrize(("there", "here"), [("batch", "frozen"), ("frozen", "batch"), ("batch", "sync"), ("sync", "frozen")])
def test_kinds_of_batch_norm_take_each_others_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], there: str, here: str
) -> None:
    """A BatchNorm counts its batches, a frozen one does not: that is no weight."""
    donor = donor_of(["a"], model={"norm": there})
    statistics = "backbone.layer3.0.bn1.running_var"
    donor.model[statistics].fill_(3.0)  # BatchNorm's own start would be 1
    model = start(tmp_path, donor, ["a"], config_of(model={"norm": here}))
    assert torch.equal(model.state_dict()[statistics], donor.model[statistics])
    assert "note" not in capsys.readouterr().out


def test_other_settings_with_the_same_tensors_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    anchors = {"scales": [1.0], "ratios": [1.0, 2.0], "strides": "grid"}
    keys = {"norm_eps": 0.0, "p7_relu": False, "prior": 0.01, "freeze_stages": 0, "anchors": anchors}
    start(tmp_path, donor_of(["a"], model=keys), ["a"])
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    assert sorted(notes[:-1]) == [
        "note: model.anchors.sizes is [16.0, 32.0, 64.0, 128.0, 256.0] here, [32.0, 64.0, 128.0, 256.0, 512.0] where the "
        "weights were trained",
        "note: model.anchors.strides is fixed here, grid where the weights were trained",
        "note: model.norm_eps is 1e-05 here, 0.0 where the weights were trained",
        "note: model.p7_relu is True here, False where the weights were trained",
    ]  # but neither the prior nor what is frozen: they say how to begin and to train, not what the weights mean
    assert notes[-1].startswith("note: in training they adapt to that; to keep what they are used to: ")
    assert set(notes[-1].split(": ", 2)[2].split()) == {
        "model.anchors.sizes=[32.0,64.0,128.0,256.0,512.0]",
        "model.anchors.strides=grid",
        "model.norm_eps=0.0",
        "model.p7_relu=false",
    }


@pytest.mark.parametrize("part", ["all", "backbone"])
def test_weights_keep_their_mean_and_deviation(tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str) -> None:
    """detectron2's do not divide by the deviation; a config of ours that does must not make noise of them."""
    donor = donor_of(["a"], input={"mean": (103.53, 116.28, 123.675), "std": (1.0, 1.0, 1.0)})
    config = config_of(train={"init_from": "set below", "init_part": part})
    model = start(tmp_path, donor, ["a"], config)
    assert model.mean.flatten().tolist() == pytest.approx([103.53, 116.28, 123.675])
    assert model.std.flatten().tolist() == [1, 1, 1]
    assert config.input.mean == (103.53, 116.28, 123.675) and config.input.std == (1, 1, 1)  # what the run will save
    printed = capsys.readouterr().out
    assert "note: input.mean is (103.53, 116.28, 123.675) as the weights say, not (123.675, 116.28, 103.53) as" in printed
    assert "note: input.std is (1.0, 1.0, 1.0) as the weights say, not (58.395, 57.12, 57.375) as the config does" in printed


def test_resuming_keeps_the_weights_mean_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = donor_of(["a"], input={"std": (1.0, 1.0, 1.0)})
    config = config_of()
    config.model.num_classes = 1
    model = initial_model(config, own, own.categories)
    assert model.std.flatten().tolist() == [1, 1, 1] and config.input.std == (1, 1, 1)
    assert "note: input.std is" in capsys.readouterr().out


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_train_one_step_from_a_detector_of_other_classes(make_coco: MakeCoco, tmp_path: Path) -> None:
    """The whole road: from a file, by tools/train.py, into a run that evaluates and goes on; its rate is too small to move."""
    data = make_coco(n=4)  # red and green
    donor = donor_of(["green", "blue"], ema=True, input={"std": (50.0, 50.0, 50.0)})
    save_checkpoint(tmp_path / "donor.pt", donor)
    config = config_of(
        input={"short_edge": 64, "long_edge": 96},
        data={"train": data, "val": data, "workers": 0},
        train={"batch_size": 2, "max_steps": 1, "learning_rate": 1e-30, "precision": "fp32"},
    )
    save_config(config, tmp_path / "config.yaml")
    out = tmp_path / "run"
    command = (
        "tools/train.py",
        str(tmp_path / "config.yaml"),
        f"output_dir={out}",
        "train.init_from=" + str(tmp_path / "donor.pt"),
    )
    done = run_tool(*command)
    assert done.returncode == 0, done.stderr
    assert "  kept                 1  green\n  new, at the prior    1  red\n  dropped              1  blue\n" in done.stdout
    best = load_checkpoint(out / "best.pt")
    assert donor.ema is not None
    for key in FINAL:
        torch.testing.assert_close(rows(best.model[key], 1, 2), rows(donor.ema[key], 0, 2), rtol=1e-5, atol=1e-5)
    assert best.config.input.std == (50.0, 50.0, 50.0) == tuple(best.model["std"].flatten().tolist())
    assert json.loads((out / "metrics.json").read_text())["images"] == 4
    again = run_tool(*command, "train.max_steps=2", "--resume")
    assert again.returncode == 0, again.stderr
    for told in ("new, at the prior", "note: input.std was"):
        assert told not in again.stdout  # its own weights go before init_from's


def test_imagenet_is_the_backbones_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr("retinanet.model.load_backbone_weights", lambda _, name, source: asked.append((name, source)))
    config = parse_config({"model": {"backbone": "resnet18", "num_classes": 1}, "train": {"init_from": "imagenet_v2"}})
    initial_model(config, None, named("cat"))
    assert asked == [("resnet18", "imagenet_v2")]
