"""configs/*.yaml: each loads silently, says how to run it and what to expect, and lists only what it changes."""

import re
from itertools import takewhile
from pathlib import Path

import pytest
import yaml

from retinanet.config import Config, load_config, parse_config
from retinanet.data.transforms import build_augment
from retinanet.optimizer import rate_factor, warmup_length

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(CONFIGS.glob("*.yaml"))
REFERENCE = ("retinanet_r50_1x", "retinanet_r50_3x", "retinanet_r101_3x", "retinanet_r50_strong")
COCO_IMAGES = 118287  # train2017

every_config = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def flatten(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def reference(name: str, *overrides: str) -> Config:
    return load_config(CONFIGS / f"{name}.yaml", list(overrides))


def drops(config: Config, total_steps: int) -> list[int]:
    """The steps at which the rate falls to a tenth, read off the schedule itself."""
    factor = rate_factor(config.train, total_steps)
    candidates = sorted(
        {max(0, round(share * total_steps) + shift) for share in config.train.milestones for shift in range(-2, 3)}
    )
    return [step for step in candidates if step and factor(step) < 0.5 * factor(step - 1)]


def test_all_of_them_are_here():
    assert {*REFERENCE, "finetune", "demo"} <= {path.stem for path in FILES}


@every_config
def test_loads_without_a_note(path, capsys):
    config = load_config(path)
    assert capsys.readouterr() == ("", "")
    assert config.output_dir == f"runs/{path.stem}"


@every_config
def test_head_tells_the_command_and_the_expected_ap(path):
    head = "\n".join(takewhile(lambda line: line.startswith("#"), path.read_text().splitlines()))
    assert f"tools/train.py configs/{path.name}" in head
    assert re.search(r"\bExpected\b.*\bAP\b", head, re.DOTALL)


@pytest.mark.parametrize("name", REFERENCE)
def test_head_of_a_published_recipe_says_whose_figures_they_are(name):
    head = (CONFIGS / f"{name}.yaml").read_text().split("\ndata:")[0]
    assert re.search(r"Expected AP on val2017: [\d.]+, as \w+ publishes .*Not run by us yet\.", head)
    assert "unmeasured" in head


@every_config
def test_length_is_given_once_or_follows_from_the_data(path):
    train = yaml.safe_load(path.read_text())["train"]
    assert ("epochs" in train) + ("max_steps" in train) == (0 if path.stem == "finetune" else 1)


@every_config
def test_augmentation_builds(path):
    config = load_config(path)
    augment = build_augment(config.augment, config.input)
    assert all(edges.short_edge <= edges.long_edge for edges in augment.resizes)


@every_config
def test_lists_only_what_differs_from_the_defaults(path):
    raw = yaml.safe_load(path.read_text())
    parsed, defaults = flatten(parse_config(raw).model_dump()), flatten(Config().model_dump())
    same = [key for key in flatten(raw) if not key.startswith("data.") and parsed[key] == defaults[key]]
    assert not same, f"equal to the defaults: {', '.join(same)}"


@every_config
def test_training_and_validation_data_differ(path):
    data = load_config(path).data
    if path.stem == "finetune":
        assert data.train is None and data.val is None  # to be given
        return
    assert data.train is not None
    assert data.val is not None
    assert data.train.annotations != data.val.annotations


@pytest.mark.parametrize("name", REFERENCE)
def test_published_recipes_train_on_coco(name):
    config = reference(name)
    for split in ("train", "val"):
        dataset = getattr(config.data, split)
        assert dataset.path == f"datasets/coco/{split}2017"
        assert dataset.annotations == f"datasets/coco/annotations/instances_{split}2017.json"
    train = config.train
    assert (train.batch_size, train.warmup_steps, train.warmup_factor) == (16, 1000, 0.001)
    assert (config.input.short_edge, config.input.long_edge) == (800, 1333)
    assert config.augment.transforms == [{"HorizontalFlip": {"p": 0.5}}]
    assert config.augment.short_edges[-1] == 800
    assert set(range(config.augment.short_edges[0], 801, 32)) == set(config.augment.short_edges)
    assert config.model.freeze_stages == 2


@pytest.mark.parametrize(
    ("name", "max_steps", "expected"),
    [
        ("retinanet_r50_1x", 90_000, [60_000, 80_000]),
        ("retinanet_r50_3x", 270_000, [210_000, 250_000]),
        ("retinanet_r101_3x", 270_000, [210_000, 250_000]),
    ],
)
def test_detectron2_schedules(name, max_steps, expected):
    config = reference(name)
    train = config.train
    assert train.max_steps == max_steps
    assert drops(config, max_steps) == expected
    assert warmup_length(train, max_steps) == 1000
    assert (train.optimizer, train.learning_rate, train.momentum, train.weight_decay) == ("sgd", 0.01, 0.9, 1e-4)
    assert (config.model.norm, config.loss.box_loss) == ("frozen", "l1")
    assert config.augment.short_edges[0] == 640


def test_torchvision_schedule():
    config = reference("retinanet_r50_strong")
    steps_per_epoch = -(-COCO_IMAGES // 16)
    total = round(config.train.epochs * steps_per_epoch)
    assert drops(config, total) == [16 * steps_per_epoch, 22 * steps_per_epoch]
    assert config.augment.short_edges[0] == 480


def test_half_the_batch_halves_the_rate_and_doubles_the_steps(capsys):
    config = reference("retinanet_r50_1x", "train.batch_size=8")
    train = config.train
    assert train.learning_rate == 0.005  # 0.01 * 8 / 16
    assert (train.max_steps, train.warmup_steps) == (180_000, 2_000)  # twice 90,000 and 1,000
    assert drops(config, train.max_steps) == [120_000, 160_000]
    note = "batch 8 instead of 16: learning_rate 0.01 -> 0.005, max_steps 90000 -> 180000, warmup_steps 1000 -> 2000\n"
    assert capsys.readouterr().out == note


def test_what_is_given_by_hand_is_not_rescaled(capsys):
    by_hand = ["train.batch_size=8", "train.learning_rate=0.02", "train.max_steps=500", "train.warmup_steps=10"]
    train = reference("retinanet_r50_1x", *by_hand).train
    assert (train.learning_rate, train.max_steps, train.warmup_steps) == (0.02, 500, 10)
    assert capsys.readouterr().out == ""


def test_epochs_are_not_rescaled():
    train = reference("retinanet_r50_strong", "train.batch_size=32").train
    assert (train.epochs, train.max_steps, train.learning_rate, train.warmup_steps) == (26, None, 0.0002, 500)
