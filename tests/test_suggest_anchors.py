"""Suggested anchors: on planted boxes whose answer is known, on real ones, and as a config that training reads."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from retinanet import Predictor
from retinanet.anchor_search import Suggestion, suggest
from retinanet.config import DatasetConfig, InputConfig, LossConfig, ModelConfig, load_config, parse_config, save_config
from retinanet.coverage import REACHED
from retinanet.data.annotations import AnnotationRow, Annotations, ImageRow
from retinanet.data.formats import load_dataset
from retinanet.errors import UserError
from retinanet.structures import Category
from retinanet.training import train

SIDE = 256
SAME = InputConfig(short_edge=SIDE, long_edge=SIDE)
TOOL = Path(__file__).parent.parent / "tools" / "suggest_anchors.py"


def planted(*kinds: tuple[int, float, float], side: int = SIDE, seed: int = 0) -> Annotations:
    """`(n, width, height)` boxes of each kind, give or take a tenth, anywhere in square pictures; a class for each kind."""
    rng = np.random.default_rng(seed)
    images = [ImageRow(n, f"{n}.png", side, side) for n in range(20)]
    rows = []
    for label, (n, *size) in enumerate(kinds):
        for _ in range(n):
            w, h = np.array(size) * rng.uniform(0.9, 1.1, 2)
            x, y = rng.uniform(0, side - w), rng.uniform(0, side - h)
            rows.append(AnnotationRow(int(rng.integers(20)), len(rows) + 1, label, [x, y, w, h], w * h, False))
    return Annotations.pack("planted.json", Path(), [Category(n, f"kind{n}") for n in range(len(kinds))], images, rows)


def search(data: Annotations, input: InputConfig = SAME, **model: Any) -> Suggestion:
    return suggest(data, ModelConfig.model_validate(model), input, LossConfig())


def test_standing_boxes_get_standing_anchors() -> None:
    # 12 x 60 and the default's narrow ones, at best: 22.6 x 45.3 has 543 in common, 543 / (720 + 1024 - 543) = 0.45, and
    # 28.5 x 57.0 has 684, 684 / (720 + 1625 - 684) = 0.41
    data = planted((300, 12, 60))
    found = search(data)
    assert found.changed and not found.fits
    assert found.before.share() < 0.5 and found.after.share() > 0.99
    assert min(abs(np.log2(ratio / 5)) for ratio in found.anchors.ratios) < 0.5  # 60 / 12
    assert len(found.anchors.sizes) == 5 and found.input == SAME and found.cost == 1  # nothing dearer than needed
    assert len(found.anchors.ratios) == len(found.anchors.scales) == 3
    assert found.anchors.sizes == [found.anchors.sizes[0] * 2**level for level in range(5)]


def test_what_fits_is_left_alone() -> None:
    # squares of 64 every 16 pixels: at worst off by 8, 56^2 / (2 * 64^2 - 56^2) = 0.62; of 40.3 every 8 likewise
    found = search(planted((200, 64, 64), (100, 40, 36)))
    assert found.fits and not found.changed
    assert found.anchors == ModelConfig().anchors and found.input == SAME and found.after is found.before
    assert found.reason == "the anchors reach 100.0% of the boxes: nothing to suggest"


def test_tiny_boxes_get_a_finer_grid() -> None:
    # 5 x 5 between centres 8 apart: off by up to 4 in x and y, where squares of 5 have 1 of 49 pixels in common
    found = search(planted((300, 5, 5)))
    assert found.before.share() < 0.1 and found.after.share() > 0.97
    # centres must be 8 / 5 of their size nearer, by P2 or by an image of twice the size
    assert len(found.anchors.sizes) == 6 or found.input.short_edge >= 1.5 * SIDE
    assert found.cost > 1


def test_pictures_are_not_blown_up_over_twice_their_own_size() -> None:
    found = search(planted((300, 2.5, 2.5), side=SIDE // 2))  # the same boxes, in pictures that are doubled already
    assert found.input == SAME and len(found.anchors.sizes) == 6


def test_a_larger_image_keeps_its_shape_and_a_detector_with_p2_its_levels() -> None:
    data = planted((300, 2.2, 2.2))
    found = search(data, InputConfig(short_edge=SIDE, long_edge=400), anchors={"sizes": [16, 32, 64, 128, 256, 512]})
    assert len(found.anchors.sizes) == 6 and found.input.short_edge > SIDE
    assert found.input.long_edge == round(400 * found.input.short_edge / SIDE)
    assert found.cost == (found.input.short_edge / SIDE) ** 2  # P2 was there before


def test_a_rare_class_counts() -> None:
    data = planted((4000, 45, 45), (30, 10, 80))  # 0.7 % of the boxes: without it 99 % are reached
    found = search(data)
    rare = data.labels == 1
    assert found.before.share() > 0.99 and (found.before.kind[rare] == REACHED).mean() < 0.5
    assert found.changed and (found.after.kind[rare] == REACHED).mean() > 0.9
    assert found.after.share() > 0.99
    assert found.boxes < 3500  # looked at a sample of the common class


def test_the_same_each_time() -> None:
    data = planted((4000, 14, 40), (50, 60, 20))
    first, again = search(data), search(data)
    assert first.anchors == again.anchors and first.input == again.input and first.boxes == again.boxes
    assert np.array_equal(first.after.kind, again.after.kind)


def test_no_boxes() -> None:
    with pytest.raises(UserError, match=r"^planted\.json has no boxes to fit anchors to$"):
        search(planted((0, 5, 5)))


def test_pictures_of_unknown_size_that_cannot_be_read_have_no_say() -> None:
    data = planted((100, 30, 30))
    data.sizes[:] = 0  # and no file is there; training names them and goes on without
    with pytest.raises(UserError, match=r"^planted\.json has no boxes to fit anchors to$"):
        search(data)
    data.sizes[:10] = SIDE
    found = search(data)
    assert found.fits and 0 < np.isfinite(found.before.areas).sum() < 100  # those of the others


def test_what_cannot_be_reached_is_not_changed_for_nothing() -> None:
    found = search(planted((100, 0.1, 200)))  # thinner than any anchor that is tried
    assert not found.changed and not found.fits
    assert found.after is found.before and found.anchors == ModelConfig().anchors
    assert found.reason.endswith("of the boxes, and none that were tried clearly more")


def test_blood_cells(real_data: Path) -> None:
    root = real_data / "bccd" / "BCCD"
    file = str(root / "ImageSets/Main/train.txt")
    data = load_dataset(DatasetConfig(format="voc", path=str(root), annotations=file))
    assert search(data, InputConfig()).fits  # the default at its own size
    small = search(data, InputConfig(short_edge=160, long_edge=320))  # a quarter of the pictures' size: platelets of 10 pixels
    assert small.before.share() < 0.95 and small.after.share() > 0.99
    platelets = data.labels == 0
    assert (small.before.kind[platelets] == REACHED).mean() < 0.2
    assert (small.after.kind[platelets] == REACHED).mean() > 0.9


@pytest.fixture
def narrow(tmp_path: Path) -> dict[str, str]:
    """A data set of standing boxes on the disk."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "truth.json").write_text(json.dumps(planted((100, 12, 60)).to_coco()))
    return {"path": str(tmp_path / "photos"), "annotations": str(tmp_path / "truth.json")}


def start(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(sys.argv[0], run_name="__main__")
    return int(ended.value.code or 0)


def test_the_tool_writes_a_config_that_fits(
    narrow: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given, out = tmp_path / "mine.yaml", tmp_path / "new" / "fitted.yaml"
    content = {"data": {"train": narrow}, "input": {"short_edge": 256, "long_edge": 300}, "train": {"epochs": 3}}
    given.write_text(yaml.safe_dump({**content, "augment": {"short_edges": [128, 256]}}))
    assert start(monkeypatch, given, "model.backbone=resnet18", "--out", out) == 0
    printed = capsys.readouterr().out
    before, after = load_config(given), load_config(out)
    assert "as it is, images 256 x 300:" in printed and "kind0" in printed and f"written: {out}" in printed
    piece = yaml.safe_load(printed[printed.index("\nmodel:") : printed.index("A detector trained")])
    assert piece["model"]["anchors"]["ratios"] == after.model.anchors.ratios != before.model.anchors.ratios
    assert after.model.backbone == "resnet18" and after.train.epochs == 3 and after.data.train == before.data.train
    assert after.output_dir == "runs/fitted"  # its own name's, not that of the config it comes from
    growth = after.input.short_edge / 256
    assert after.augment.short_edges == [round(128 * growth), after.input.short_edge]
    data = load_dataset(DatasetConfig(**narrow))
    assert suggest(data, after.model, after.input, after.loss).fits

    assert after.train.init_part == "all"

    assert start(monkeypatch, given, f"train.init_from={tmp_path / 'donor.pt'}", "--out", tmp_path / "part.yaml") == 0
    assert load_config(tmp_path / "part.yaml").train.init_part == "backbone"  # or the donor's anchors would come back
    capsys.readouterr()

    assert start(monkeypatch, out, "--out", tmp_path / "again.yaml") == 0
    printed = capsys.readouterr().out
    assert f"nothing to suggest; {tmp_path / 'again.yaml'} is not written" in printed
    assert not (tmp_path / "again.yaml").exists()


def test_the_tool_takes_a_data_set(
    narrow: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    annotations = f"data.train.annotations={narrow['annotations']}"
    assert start(monkeypatch, narrow["path"], annotations, "input.short_edge=256", "input.long_edge=256") == 0
    assert "the suggested ones" in capsys.readouterr().out


def test_a_suggested_config_trains_evaluates_and_predicts(make_coco: Callable[..., dict[str, str]], tmp_path: Path) -> None:
    """P2, from the suggestion to the detections."""
    data = make_coco(n=4)
    small = {"backbone": "resnet18", "backbone_weights": "none", "norm": "group", "fpn_channels": 32, "head_convs": 1}
    content = {
        "model": {**small, "freeze_stages": 0, "anchors": {"sizes": [64 * 2**n for n in range(6)]}},
        "input": {"short_edge": 32, "long_edge": 64},
        "data": {"train": data, "val": data, "workers": 0},
        "train": {"max_steps": 2, "batch_size": 2, "precision": "fp32"},
        "output_dir": str(tmp_path / "run"),
    }
    config = parse_config(content)
    found = suggest(load_dataset(DatasetConfig(**data)), config.model, config.input, config.loss)
    assert found.changed and len(found.anchors.sizes) == 6
    save_config(found.apply(config), tmp_path / "fitted.yaml")
    assert train(load_config(tmp_path / "fitted.yaml"), device="cpu")
    predictor = Predictor.load(tmp_path / "run" / "best.pt", device="cpu")
    assert predictor.model.anchor_generator.strides == (4, 8, 16, 32, 64, 128)
    predictor(Path(data["path"]) / "0.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.yaml"], "config none.yaml does not exist"),
        (["empty.yaml"], "empty.yaml names no training data: it needs data.train.path=..."),
        (["empty.yaml", "--out", "empty.yaml"], "--out empty.yaml exists: name another file, nothing is overwritten"),
        (["empty.yaml", "--seed", "-1"], "--seed -1: expected 0 or more"),
        (["nowhere"], "data path nowhere is not a folder"),
    ],
)
def test_mistakes(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.yaml").write_text("seed: 1\n")
    assert start(monkeypatch, *arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"error: {message}")
