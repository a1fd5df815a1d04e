"""The zoo's names where a checkpoint's path may stand: Predictor, predict, evaluate, train. Nothing is downloaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from PIL import Image
from torch import nn

from retinanet.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from retinanet.config import parse_config
from retinanet.distributed import main_first
from retinanet.errors import UserError
from retinanet.model import build_model
from retinanet.predictor import Predictor
from retinanet.structures import Category
from retinanet.weights import zoo

CATEGORIES = (Category(3, "red"), Category(7, "green"))  # those of `make_coco`
OTHER = "retinanet_resnet50_fpn"
TINY: dict[str, Any] = {
    "num_classes": 2,
    "backbone": "resnet18",
    "backbone_weights": "none",
    "norm": "batch",
    "fpn_channels": 32,
    "head_convs": 1,
    "anchors": {"sizes": [24, 40, 64, 128, 256], "scales": [1.0]},
}


@pytest.fixture
def run(run_tool: Run) -> Run:
    return run_tool


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The zoo's cache as it is after a download: two tiny detectors under the names of large ones."""
    monkeypatch.setenv("RETINANET_CACHE", str(tmp_path / "cache"))
    config = parse_config({"model": TINY, "input": {"short_edge": 64, "long_edge": 96}})
    for seed, name in enumerate((zoo.DEFAULT, OTHER)):
        torch.manual_seed(seed)
        model = build_model(config.model, config.input)
        nn.init.normal_(model.cls_subnet.final.weight, std=1.0)
        file = tmp_path / "cache" / f"{name}.{zoo.CONVERSION}.pt"
        save_checkpoint(file, Checkpoint(config, CATEGORIES, model.state_dict()))
    return tmp_path / "cache"


@pytest.fixture
def street(tmp_path: Path) -> Path:
    Image.linear_gradient("L").resize((96, 64)).save(tmp_path / "street.jpg")
    return tmp_path / "street.jpg"


def test_predict_without_weights_takes_the_zoos_default_and_says_so(run: Run, street: Path, tmp_path: Path) -> None:
    outcome = run("predict", "street.jpg", "--score", "0.1")
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines()[0] == (
        "no --weights given: retinanet_resnet50_fpn_v2 of the zoo, AP 41.5 on COCO as torchvision says"
    )
    folder = Path("runs") / "retinanet_resnet50_fpn_v2" / "predictions"
    assert f"pictures and detections.json in {folder}" in outcome.out
    found = json.loads((tmp_path / folder / "detections.json").read_text())
    assert found and {entry["category_name"] for entry in found} <= {"red", "green"}
    assert (tmp_path / folder / "street.jpg").exists()


def test_predict_with_a_name_of_the_zoo(run: Run, street: Path, tmp_path: Path) -> None:
    outcome = run("predict", "street.jpg", "--weights", OTHER, "--score", "0.1")
    assert outcome.code == 0 and "no --weights" not in outcome.out
    other = (tmp_path / "runs" / OTHER / "predictions" / "detections.json").read_text()
    assert run("predict", "street.jpg", "--score", "0.1", "--out", "there").code == 0
    assert (tmp_path / "there" / "detections.json").read_text() != other  # two detectors
    assert not (tmp_path / "runs" / zoo.DEFAULT).exists()


def test_a_wrong_name(run: Run, street: Path) -> None:
    for tool, arguments in (("predict", ("street.jpg",)), ("evaluate", ())):
        outcome = run(tool, *arguments, "--weights", "retinanet_resnet50_fpn_v3")
        assert outcome.code == 2 and len(outcome.err.splitlines()) == 1
        assert "neither a file nor in the zoo" in outcome.err and "'retinanet_resnet50_fpn_v2'" in outcome.err
    with pytest.raises(UserError, match="neither a file nor in the zoo"):
        Predictor.load("retinanet_resnet50_fpn_v3")


def test_predictor_load_takes_a_name(street: Path, cache: Path) -> None:
    by_name = Predictor.load(OTHER, device="cpu", score_threshold=0.1, precision="fp32")
    by_path = Predictor.load(cache / f"{OTHER}.{zoo.CONVERSION}.pt", device="cpu", score_threshold=0.1, precision="fp32")
    one, two = by_name(street), by_path(street)
    assert len(one) > 0 and torch.equal(one.boxes, two.boxes)


def test_evaluate_with_a_name_of_the_zoo(run: Run, tmp_path: Path, make_coco: Callable[..., dict[str, str]]) -> None:
    data = make_coco("val", n=4)
    settings = [f"data.val.{key}={value}" for key, value in data.items()] + ["data.workers=0"]
    outcome = run("evaluate", "--weights", OTHER, *settings)
    assert outcome.code == 0, outcome.err
    folder = tmp_path / "runs" / OTHER
    assert json.loads((folder / "evaluation" / "metrics.json").read_text())["images"] == 4
    assert not (folder / "metrics.json").exists()  # it is no run
    assert "\nnote: " in outcome.out and f"{OTHER} on {data['annotations']}" in outcome.out
    assert run("evaluate", "--weights", OTHER, *settings, "--out", "there").code == 0
    assert (tmp_path / "there" / "metrics.json").read_bytes() == (folder / "evaluation" / "metrics.json").read_bytes()
    line = run("evaluate", "--weights", OTHER).err
    assert "data.val is not set: name a CONFIG" in line


def test_train_from_a_name_of_the_zoo(run: Run, tmp_path: Path, make_coco: Callable[..., dict[str, str]], cache: Path) -> None:
    data = make_coco("train", n=4)
    text = (tmp_path / "train.json").read_text().replace('"green"', '"blue"')
    (tmp_path / "train.json").write_text(text)
    (tmp_path / "tiny.yaml").write_text(
        f"data: {{train: {{path: {data['path']}, annotations: {data['annotations']}}}, workers: 0}}\n"
        "model: {backbone: resnet18, norm: batch, fpn_channels: 32, head_convs: 1, prior: 0.1, "
        "anchors: {sizes: [24, 40, 64, 128, 256], scales: [1.0]}}\n"
        "input: {short_edge: 64, long_edge: 96}\n"
        f"train: {{batch_size: 2, max_steps: 1, learning_rate: 1.0e-30, precision: fp32, init_from: {OTHER}}}\n"
    )
    outcome = run("train", "tiny.yaml", "--device", "cpu")
    assert outcome.code == 0, outcome.err
    assert f"{OTHER}: weights, classes matched by name\n  kept                 1  red\n" in outcome.out
    ours = load_checkpoint(tmp_path / "runs" / "tiny" / "best.pt").model["cls_subnet.final.bias"]
    theirs = load_checkpoint(cache / f"{OTHER}.{zoo.CONVERSION}.pt").model["cls_subnet.final.bias"]
    anchors = 3  # in a cell: one scale, three ratios
    for anchor in range(anchors):
        assert ours[2 * anchor] == theirs[2 * anchor]
        assert ours[2 * anchor + 1] == pytest.approx(-2.1972246)  # ln(0.1 / 0.9)
    assert run("train", "tiny.yaml", "train.init_from=retinanet_resnet50", "output_dir=x").err.startswith("error: weights 'ret")


def test_the_main_process_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that one of many downloads, and the others find what it left. Here rank 1 of 2, then rank 0, then one process."""
    told: list[str] = []

    def act() -> str:
        told.append("act")
        return "done"

    monkeypatch.setattr("retinanet.distributed.share_from_main", lambda _: told.append("meet"))
    for rank, expected in ((1, ["meet", "act"]), (0, ["act", "meet"])):
        monkeypatch.setattr("retinanet.distributed.rank", lambda rank=rank: rank)
        told.clear()
        assert main_first(act) == "done" and told == expected
