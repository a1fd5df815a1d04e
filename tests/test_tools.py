"""The command lines: what they write and where, what they say, and one clear line for a user's mistake."""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run, mistake
from PIL import Image
from torch import nn

from retinanet.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from retinanet.config import parse_config
from retinanet.errors import UserError, command_line
from retinanet.evaluation.coco import NAMES
from retinanet.model import build_model
from retinanet.structures import Category

TOOLS = Path(__file__).parent.parent / "tools"
CATEGORIES = (Category(3, "red"), Category(7, "green"))  # those of `make_coco`
DETECTION_KEYS = ["image_id", "file_name", "category_id", "category_name", "bbox", "score"]


@pytest.fixture
def run(run_tool: Run) -> Run:
    return run_tool


@pytest.fixture
def weights(tmp_path: Path, make_coco: Callable[..., dict[str, str]]) -> Path:
    """The checkpoint of a tiny detector with random weights in a run's folder. Its config names the data in val/.

    The classifier's weights are large and its bias low, so that scores spread from 0.02 to above 0.5.
    """
    data = make_coco("val", n=4)
    config = parse_config(
        {
            "model": {
                "num_classes": 2,
                "backbone": "resnet18",
                "backbone_weights": "none",
                "norm": "batch",
                "fpn_channels": 32,
                "head_convs": 1,
                "anchors": {"sizes": [24, 40, 64, 128, 256], "scales": [1.0]},
            },
            "input": {"short_edge": 64, "long_edge": 96},
            "data": {"train": data, "val": data, "workers": 0},
            "output_dir": str(tmp_path / "run"),
        }
    )
    torch.manual_seed(0)
    model = build_model(config.model, config.input)
    nn.init.normal_(model.cls_subnet.final.weight, std=1.0)
    nn.init.constant_(model.cls_subnet.final.bias, -6.0)  # type: ignore[arg-type]
    file = tmp_path / "run" / "best.pt"
    save_checkpoint(file, Checkpoint(config, CATEGORIES, model.state_dict(), thresholds={"red": 0.1, "green": 0.3}))
    return file


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("tool", ["train", "evaluate", "predict"])
def test_help_shows_examples_and_imports_no_torch(tool: str, tmp_path: Path) -> None:
    """In a process of its own, because torch is loaded in this one."""
    program = (
        "import runpy, sys\n"
        f"sys.argv = [{str(TOOLS / f'{tool}.py')!r}, '--help']\n"
        "try:\n"
        "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally:\n"
        "    heavy = {'torch', 'torchvision', 'numpy', 'albumentations', 'cv2'} & set(sys.modules)\n"
        "    print('HEAVY', sorted(heavy))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert "HEAVY []" in done.stdout
    assert f"examples:\n  python tools/{tool}.py" in done.stdout


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [("train", []), ("predict", []), ("predict", ["a.jpg", "--wieghts", "a.pt"]), ("evaluate", ["--wieghts", "a.pt"])],
)
def test_wrong_usage_shows_the_usage(run: Run, tool: str, arguments: list[str]) -> None:
    outcome = run(tool, *arguments)
    assert outcome.code == 2
    assert outcome.err.startswith("usage: ") and "Traceback" not in outcome.err


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("evaluate", [], "give either --weights or --detections"),
        ("evaluate", ["a.yaml"], "give either --weights or --detections"),
        ("evaluate", ["--weights", "a.pt", "--detections", "b.json"], "give either --weights or --detections"),
        ("evaluate", ["a.yaml", "b.yaml", "--weights", "a.pt"], "one config at most, got a.yaml, b.yaml"),
        ("evaluate", ["--detections", "b.json"], "--detections needs --annotations"),
        (
            "evaluate",
            ["--detections", "b.json", "--annotations", "c.json", "x.y=1"],
            "takes no CONFIG and no settings, got x.y=1",
        ),
        ("evaluate", ["--detections", "b.json", "--annotations", "c.json"], "annotation file c.json does not exist"),
        ("evaluate", ["--weights", "a.pt", "--annotations", "c.json"], "--annotations goes with --detections"),
        ("evaluate", ["--weights", "a.pt"], "weights a.pt do not exist"),
        ("evaluate", ["--weights", "a.pt", "--device", "gpu"], "there is no device 'gpu'"),
        ("evaluate", ["--weights", "."], "weights . are a folder"),
        ("predict", ["a.jpg", "--weights", "a.pt"], "a.jpg: no such image"),
        ("predict", ["nothing/*.jpg", "--weights", "a.pt"], "nothing/*.jpg: no such image"),
        ("predict", [".", "--weights", "a.pt"], ".: no such image, and no folder or glob with images"),
        ("train", ["none.yaml"], "config none.yaml does not exist"),
        ("train", ["empty.yaml", "train.batchsize=8"], "unknown key 'train.batchsize'. Did you mean 'batch_size'"),
        ("train", ["empty.yaml", "batch"], "'batch': expected key.sub=value"),
        ("train", ["empty.yaml", "train.batch_size=many"], "train.batch_size"),
        ("train", ["empty.yaml"], "data.train is not set"),
        ("train", ["empty.yaml", "--device", "cuda:99"], "device cuda:99 is not there"),
    ],
)
def test_a_users_mistake_is_one_line(run: Run, tmp_path: Path, tool: str, arguments: list[str], message: str) -> None:
    (tmp_path / "empty.yaml").write_text("")
    assert message in mistake(run(tool, *arguments))


def test_mistakes_with_weights(run: Run, weights: Path, tmp_path: Path) -> None:
    line = mistake(run("evaluate", "--weights", weights, "evaluation.splt=test"))
    assert "unknown key 'evaluation.splt'. Did you mean 'split'" in line
    assert "data.test is not set" in mistake(run("evaluate", "--weights", weights, "evaluation.split=test"))
    line = mistake(run("evaluate", "--weights", weights, "model.fpn_channels=64"))
    assert "weights do not fit the model of its config" in line
    line = mistake(run("evaluate", "--weights", weights, "input.mean=[0,0,0]"))
    assert "input.mean and input.std are part of the weights" in line  # as buffers, which would win without a word
    (tmp_path / "file").write_text("")
    assert "file: File exists" in mistake(run("evaluate", "--weights", weights, "--out", tmp_path / "file"))
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    assert "file: File exists" in mistake(run("predict", "a.png", "--weights", weights, "--out", tmp_path / "file"))
    assert "0..1" in mistake(run("predict", "a.png", "--weights", weights, "--score", 50))
    assert "batch size" in mistake(run("predict", "a.png", "--weights", weights, "--batch-size", 0))
    (tmp_path / "page.pt").write_text("<html>")
    assert "page.pt are not a checkpoint" in mistake(run("predict", "a.png", "--weights", "page.pt"))


def test_evaluate_results_of_any_detector(run: Run, real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "evaluation"
    results = tmp_path / "fake.json"
    results.write_bytes((folder / "instances_val2014_fakebbox100_results.json").read_bytes())
    arguments = ["--detections", results, "--annotations", folder / "instances_val2014_100.json"]
    outcome = run("evaluate", *arguments)
    assert outcome.code == 0
    metrics = read(tmp_path / "fake_evaluation" / "metrics.json")  # beside the results
    assert metrics["AP"] == pytest.approx(0.504581, abs=1e-6)  # cocoapi's own number
    assert metrics["AR100"] == pytest.approx(0.595353, abs=1e-6)
    assert outcome.out.splitlines()[0].startswith("AP 50.5  AP50 69.7  AP75 57.3")
    assert run("evaluate", *arguments, "--out", tmp_path / "there").code == 0
    assert read(tmp_path / "there" / "metrics.json") == metrics


def test_results_of_another_data_set(run: Run, weights: Path, tmp_path: Path) -> None:
    entry = {"image_id": 1, "category_id": 3, "bbox": [0, 0, 9, 9], "score": 0.5}  # make_coco's ids begin with 10
    (tmp_path / "r.json").write_text(json.dumps([entry]))
    line = mistake(run("evaluate", "--detections", "r.json", "--annotations", tmp_path / "val.json"))
    assert "image_id 1, which" in line and "are they of this data set?" in line


def test_evaluate_weights(run: Run, weights: Path, tmp_path: Path) -> None:
    outcome = run("evaluate", "--weights", weights)
    assert outcome.code == 0, outcome.err
    folder = weights.parent / "evaluation"
    metrics, detections = read(folder / "metrics.json"), read(folder / "detections.json")
    assert {path.name for path in folder.iterdir()} == {"metrics.json", "detections.json"}
    assert set(NAMES) | {"images", "detections", "evaluator", "per_class"} == set(metrics)
    assert list(metrics["per_class"]) == ["red", "green"]
    assert set(metrics["per_class"]["red"]) == {"AP", "AP50", "AR100", "boxes", "threshold"}
    assert metrics["images"] == 4 and metrics["detections"] == len(detections) > 0
    assert list(detections[0]) == DETECTION_KEYS
    by_id = {entry["image_id"]: entry["file_name"] for entry in detections}
    assert by_id == {10: "0.png", 11: "1.png", 12: "2.png", 13: "3.png"}  # the data set's ids and names
    assert {(entry["category_id"], entry["category_name"]) for entry in detections} == {(3, "red"), (7, "green")}
    assert min(entry["score"] for entry in detections) >= 0.05  # all that COCO's numbers need, not just what is shown
    assert not (weights.parent / "metrics.json").exists()  # no run: it has no config.yaml


def test_evaluate_writes_a_report(run: Run, weights: Path, tmp_path: Path) -> None:
    outcome = run("evaluate", "--weights", weights, "--report", tmp_path / "report")
    assert outcome.code == 0, outcome.err
    figures = read(tmp_path / "report" / "figures.json")
    assert figures["about"]["title"] == str(weights)
    assert [row["value"] for row in figures["summary"]] == [
        read(weights.parent / "evaluation" / "metrics.json")[name] for name in NAMES
    ]
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") == min(96, len(figures["findings"])) > 0
    (tmp_path / "file").touch()
    assert "file: File exists" in mistake(run("evaluate", "--weights", weights, "--report", tmp_path / "file"))


def test_evaluate_keeps_the_thresholds_it_finds(run: Run, weights: Path, tmp_path: Path) -> None:
    before = load_checkpoint(weights)
    assert run("evaluate", "--weights", weights).code == 0
    assert load_checkpoint(weights).thresholds == {"red": 0.1, "green": 0.3}  # unasked nothing is changed
    outcome = run("evaluate", "--weights", weights, "--save-thresholds")
    assert outcome.code == 0 and "best scores of 2 classes kept: red, green" in outcome.out
    found = {name: row["threshold"] for name, row in read(weights.parent / "evaluation" / "metrics.json")["per_class"].items()}
    after = load_checkpoint(weights)
    assert after.thresholds == found != {"red": 0.1, "green": 0.3}
    assert (after.config, after.categories, after.ema, after.training) == (before.config, before.categories, None, None)
    assert all(torch.equal(value, after.model[key]) for key, value in before.model.items())

    assert run("predict", tmp_path / "val", "--weights", weights).code == 0  # which shows what scores at least that
    shown = read(weights.parent / "predictions" / "detections.json")
    assert shown and all(entry["score"] >= found[entry["category_name"]] - 1e-6 for entry in shown)

    assert "needs a checkpoint's file" in mistake(
        run("evaluate", "--weights", "retinanet_resnet50_fpn_v2", "--save-thresholds", "data.val.path=x")
    )
    arguments = ("--detections", "r.json", "--annotations", "t.json", "--save-thresholds")
    assert "--save-thresholds goes with --weights" in mistake(run("evaluate", *arguments))


def test_what_predict_writes_can_be_evaluated(run: Run, weights: Path, tmp_path: Path) -> None:
    """Its images are numbered from 1, those of the data from 10: file names say which is which."""
    assert run("predict", tmp_path / "val", "--weights", weights, "--score", "0.05").code == 0
    arguments = ("--detections", weights.parent / "predictions" / "detections.json", "--annotations", tmp_path / "val.json")
    outcome = run("evaluate", *arguments, "--out", tmp_path / "one")
    assert outcome.code == 0 and "numbers 4 images otherwise than" in outcome.out
    assert run("evaluate", "--weights", weights, "--out", tmp_path / "two").code == 0
    one, two = (read(tmp_path / name / "metrics.json") for name in ("one", "two"))
    assert two["AR100"] > 0
    assert {n: one[n] for n in NAMES} == pytest.approx({n: two[n] for n in NAMES}, abs=1e-3)  # boxes are rounded


def test_a_run_shows_its_latest_evaluation(run: Run, weights: Path, tmp_path: Path) -> None:
    (weights.parent / "config.yaml").write_text("")
    assert run("evaluate", "--weights", weights, "--out", tmp_path / "elsewhere").code == 0
    assert not (weights.parent / "metrics.json").exists() and not (weights.parent / "evaluation").exists()
    assert run("evaluate", "--weights", weights).code == 0
    assert read(weights.parent / "metrics.json") == read(tmp_path / "elsewhere" / "metrics.json")


def test_results_can_be_evaluated_again(run: Run, weights: Path, tmp_path: Path) -> None:
    """detections.json rounds boxes to 1/1000 pixel and scores to 1e-6, which may move a metric a little, not more."""
    assert run("evaluate", "--weights", weights, "--out", tmp_path / "one").code == 0
    arguments = ["--detections", tmp_path / "one" / "detections.json", "--annotations", tmp_path / "val.json"]
    assert run("evaluate", *arguments, "--out", tmp_path / "two").code == 0
    one, two = (read(tmp_path / name / "metrics.json") for name in ("one", "two"))
    assert one["AP50"] > 0 and one["AR100"] > 0  # else all numbers would be equal anyhow
    assert {n: two[n] for n in NAMES} == pytest.approx({n: one[n] for n in NAMES}, abs=1e-3)
    assert two["per_class"]["red"]["boxes"] == one["per_class"]["red"]["boxes"] == 4


def test_what_wins_in_evaluate(run: Run, weights: Path, tmp_path: Path, make_coco: Callable[..., dict[str, str]]) -> None:
    """Weights over CONFIG for input and postprocess, CONFIG over weights for data, key=value over both."""
    other = make_coco("other", n=2, seed=5)
    (tmp_path / "c.yaml").write_text(
        f"data: {{val: {{path: {other['path']}, annotations: {other['annotations']}}}, workers: 0}}\n"
        "input: {short_edge: 128}\npostprocess: {max_detections: 9}\nevaluation: {batch_size: 1}\n"
    )
    outcome = run("evaluate", "c.yaml", "--weights", weights, "--out", tmp_path / "one")
    assert outcome.code == 0, outcome.err
    assert "note: input.short_edge is 64 as the weights say, not 128 as the config does" in outcome.out
    assert "note: postprocess.max_detections is 100 as the weights say, not 9 as the config does" in outcome.out
    assert other["annotations"] in outcome.out
    detections = read(tmp_path / "one" / "detections.json")
    assert {entry["image_id"] for entry in detections} == {10, 11}  # two images only: CONFIG's data
    most = max(sum(entry["image_id"] == n for entry in detections) for n in (10, 11))
    assert most > 9

    outcome = run("evaluate", "c.yaml", "--weights", weights, "postprocess.max_detections=3", "--out", tmp_path / "two")
    assert "note: postprocess.max_detections is 3 instead of 100" in outcome.out
    assert len(read(tmp_path / "two" / "detections.json")) == 6  # 3 in each of 2 images

    outcome = run("evaluate", "--weights", weights, f"data.val.annotations={other['annotations']}", "--out", "three")
    assert f"note: data.val.annotations is {other['annotations']} instead of" in outcome.out
    assert len({entry["image_id"] for entry in read(tmp_path / "three" / "detections.json")}) == 2


def test_evaluate_names_an_unreadable_image(run: Run, weights: Path, tmp_path: Path) -> None:
    (tmp_path / "val" / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    outcome = run("evaluate", "--weights", weights)
    assert outcome.code == 0
    assert "warning: evaluated as an image without detections: " in outcome.out and "2.png" in outcome.out
    assert 12 not in {entry["image_id"] for entry in read(weights.parent / "evaluation" / "detections.json")}


def test_predict_a_folder(run: Run, weights: Path, tmp_path: Path) -> None:
    (tmp_path / "val" / "notes.txt").write_text("no picture")  # is passed over
    outcome = run("predict", "val", "--weights", weights)
    assert outcome.code == 0, outcome.err
    out = weights.parent / "predictions"  # beside the weights
    assert {path.name for path in out.iterdir()} == {"0.jpg", "1.jpg", "2.jpg", "3.jpg", "detections.json"}
    detections = read(out / "detections.json")
    assert list(detections[0]) == DETECTION_KEYS
    by_id = {entry["image_id"]: entry["file_name"] for entry in detections}
    assert by_id == {1: "val/0.png", 2: "val/1.png", 3: "val/2.png", 4: "val/3.png"}  # the order of the input, from 1
    least = {name: min(e["score"] for e in detections if e["category_name"] == name) for name in ("red", "green")}
    assert 0.1 <= least["red"] < 0.3 <= least["green"]  # the checkpoint's own threshold of each class
    for entry in detections:
        x, y, w, h = entry["bbox"]
        with Image.open(tmp_path / entry["file_name"]) as image:
            assert x >= 0 and y >= 0 and x + w <= image.width + 0.01 and y + h <= image.height + 0.01
    assert f"{len(detections)} objects in 4 images" in outcome.out


def test_predict_with_a_score_a_place_and_a_sheet(run: Run, weights: Path, tmp_path: Path) -> None:
    arguments = ["val/*.png", "--weights", weights, "--out", "there", "--sheet", "--batch-size", 3]
    assert run("predict", *arguments, "--score", 0.02).code == 0
    many = read(tmp_path / "there" / "detections.json")
    assert min(entry["score"] for entry in many) < 0.05  # below the postprocessing's own threshold
    assert (tmp_path / "there" / "sheet.jpg").exists()
    assert run("predict", *arguments, "--score", 0.5).code == 0
    few = read(tmp_path / "there" / "detections.json")
    assert all(entry["score"] >= 0.5 for entry in few) and 0 < len(few) < len(many)


def test_predict_keeps_pictures_of_one_name_apart(run: Run, weights: Path, tmp_path: Path) -> None:
    for folder, name in (("a", "x.png"), ("b", "x.png"), ("b", "x_2.png"), ("c", "x.jpg"), ("c", "sheet.png")):
        (tmp_path / folder).mkdir(exist_ok=True)
        Image.new("RGB", (64, 64), "gray").save(tmp_path / folder / name)
    assert run("predict", "a", "b", "c", "a/x.png", "--weights", weights, "--out", "out", "--sheet", "--score", 0).code == 0
    pictures = {path.name for path in (tmp_path / "out").glob("*.jpg")}
    assert pictures == {"x.jpg", "x_2.jpg", "x_2_2.jpg", "x_3.jpg", "sheet.jpg", "sheet_2.jpg"}  # a/x.png given twice: once
    by_id = {entry["image_id"]: entry["file_name"] for entry in read(tmp_path / "out" / "detections.json")}
    assert list(by_id.values()) == ["a/x.png", "b/x.png", "b/x_2.png", "c/sheet.png", "c/x.jpg"]


def test_predict_never_writes_over_its_input(run: Run, weights: Path, tmp_path: Path) -> None:
    photo = tmp_path / "street.jpg"
    Image.new("RGB", (90, 60), "gray").save(photo)
    before = photo.read_bytes()
    assert run("predict", "street.jpg", "--weights", weights, "--out", ".").code == 0
    assert photo.read_bytes() == before
    assert (tmp_path / "street_2.jpg").exists()


def test_predict_names_an_unreadable_image_and_goes_on(run: Run, weights: Path, tmp_path: Path) -> None:
    (tmp_path / "val" / "1.png").write_bytes(b"torn")
    outcome = run("predict", "val", "--weights", weights, "--score", 0)
    assert outcome.code == 1
    assert "warning: left out: val/1.png: " in outcome.out
    assert "1 of 4 inputs could not be read" in outcome.out
    assert {e["image_id"] for e in read(weights.parent / "predictions" / "detections.json")} == {1, 3, 4}
    (tmp_path / "only.jpg").write_bytes(b"torn")
    assert run("predict", "only.jpg", "--weights", weights, "--out", "none").code == 1
    assert read(tmp_path / "none" / "detections.json") == []


def test_predict_takes_any_picture_there_is(run: Run, weights: Path, real_data: Path, tmp_path: Path) -> None:
    """CMYK, grey, 16 bits, palettes, alpha, turned, of several frames; and torn ones, which are named."""
    files = [file for file in (real_data / "awkward").iterdir() if not file.name.startswith("LICENSE")]
    outcome = run("predict", real_data / "awkward", "--weights", weights, "--out", "out", "--score", 0)
    unreadable = [line for line in outcome.out.splitlines() if line.startswith("warning: left out: ")]
    pictures = list((tmp_path / "out").glob("*.jpg"))
    assert outcome.code == 1 and "Traceback" not in outcome.err
    assert len(pictures) + len(unreadable) == len(files)
    for name in ("broken.png", "truncated_jpeg.jpg", "decompression_bomb.gif"):
        assert any(name in line for line in unreadable)
    for name in ("pil_sample_cmyk", "hopper_16bit", "hopper_orientation_6", "p_trns_single", "chi"):
        assert name in {picture.stem for picture in pictures}


def test_predict_without_any_object(run: Run, weights: Path, tmp_path: Path) -> None:
    outcome = run("predict", "val", "--weights", weights, "--score", 1, "--sheet")
    assert outcome.code == 0 and "0 objects in 4 images" in outcome.out
    assert read(weights.parent / "predictions" / "detections.json") == []
    with Image.open(weights.parent / "predictions" / "0.jpg") as image:  # 64 x 96, enlarged to a shorter side of 480
        assert image.size == (720, 480)


def test_predict_agrees_with_evaluate(run: Run, weights: Path, tmp_path: Path) -> None:
    """They share one road: the same boxes and scores for the same pictures, here from 0.05 on."""
    assert run("evaluate", "--weights", weights, "--out", "e", "evaluation.batch_size=1").code == 0
    assert run("predict", "val", "--weights", weights, "--score", 0.05, "--out", "p", "--batch-size", 1).code == 0
    for number in range(4):
        evaluated = [e for e in read(tmp_path / "e" / "detections.json") if e["image_id"] == 10 + number]
        predicted = [e for e in read(tmp_path / "p" / "detections.json") if e["image_id"] == 1 + number]
        assert len(evaluated) == len(predicted) > 0
        for one, other in zip(evaluated, predicted, strict=True):
            assert one["category_id"] == other["category_id"]
            np.testing.assert_allclose([*one["bbox"], one["score"]], [*other["bbox"], other["score"]], atol=1e-2)


def test_a_torchvision_for_another_torch(run: Run, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its import does when pip has replaced one of the two."""
    (tmp_path / "broken" / "torchvision").mkdir(parents=True)
    (tmp_path / "broken" / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "broken")
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    line = mistake(run("predict", "val", "--weights", weights))
    assert f"torch {version('torch')} and torchvision {version('torchvision')} are not built for each other" in line
    assert "operator torchvision::nms does not exist" in line
    assert line.endswith("pip install --upgrade torch torchvision")


def test_another_fault_of_torchvision_keeps_its_traceback(
    run: Run, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken" / "torchvision").mkdir(parents=True)
    (tmp_path / "broken" / "torchvision" / "__init__.py").write_text("raise RuntimeError('something else')\n")
    monkeypatch.syspath_prepend(tmp_path / "broken")
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "argv", ["predict.py", "val", "--weights", str(weights)])
    with pytest.raises(RuntimeError, match="something else"):
        runpy.run_path(str(TOOLS / "predict.py"), run_name="__main__")


def raising(error: BaseException) -> Callable[[], None]:
    def main() -> int:
        raise error

    return command_line(main)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("a.yaml: wrong"), 2, "error: a.yaml: wrong\n"),
        # As a loading process hands it on: with its traceback in the text.
        (
            UserError(
                "Caught UserError in process 0.\nTraceback ...\nretinanet.errors.UserError: a.png: augmentation failed\n"
            ),
            2,
            "error: a.png: augmentation failed\n",
        ),
        (PermissionError(13, "Permission denied", "/out/metrics.json"), 2, "error: /out/metrics.json: Permission denied\n"),
        (OSError(28, "No space left on device"), 2, "error: output: No space left on device\n"),
        (KeyboardInterrupt(), 130, "\ninterrupted\n"),
    ],
)
def test_what_becomes_of_an_error(capsys: pytest.CaptureFixture[str], error: BaseException, code: int, text: str) -> None:
    with pytest.raises(SystemExit) as ended:
        raising(error)()
    assert ended.value.code == code
    assert capsys.readouterr().err == text


@pytest.mark.parametrize("error", [ValueError("ours"), FileNotFoundError(2, "No such file", "x"), OSError("no number")])
def test_our_own_faults_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        raising(error)()


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1), (130, 130)])
def test_the_exit_code_is_what_main_returns(returned: int | None, code: int) -> None:
    with pytest.raises(SystemExit) as ended:
        command_line(lambda: returned)()
    assert ended.value.code == code


def test_a_reader_that_goes_away_is_no_fault(tmp_path: Path) -> None:
    """As in `python tools/evaluate.py ... | head -1`: neither a traceback nor an exit code that speaks of failure."""
    program = (
        "from retinanet.errors import command_line\n"
        "@command_line\n"
        "def main():\n"
        "    for n in range(200_000):\n"
        "        print(n)\n"
        "    return 0\n"
        "main()\n"
    )
    reading, writing = os.pipe()
    with subprocess.Popen([sys.executable, "-c", program], stdout=writing, stderr=subprocess.PIPE, cwd=tmp_path) as process:
        os.close(writing)
        assert os.read(reading, 1) == b"0"
        os.close(reading)
        assert process.stderr is not None
        assert process.stderr.read() == b""
        assert process.wait() == 0


def test_train_writes_a_run_and_refuses_to_overwrite_it(
    run: Run, tmp_path: Path, make_coco: Callable[..., dict[str, str]]
) -> None:
    """One step of a tiny detector. How training itself behaves has tests of its own."""
    data = make_coco("train", n=4)
    (tmp_path / "tiny.yaml").write_text(
        f"data: {{train: {{path: {data['path']}, annotations: {data['annotations']}}}, workers: 0}}\n"
        "model: {backbone: resnet18, backbone_weights: none, norm: batch, freeze_stages: 0, fpn_channels: 32, head_convs: 0}\n"
        "input: {short_edge: 64, long_edge: 96}\n"
        "train: {batch_size: 2, max_steps: 9}\n"
    )
    outcome = run("train", "tiny.yaml", "train.max_steps=1", "--device", "cpu")
    assert outcome.code == 0, outcome.err
    folder = tmp_path / "runs" / "tiny"  # the config's stem
    assert {"config.yaml", "last.pt"} <= {path.name for path in folder.iterdir()}
    line = mistake(run("train", "tiny.yaml", "train.max_steps=1"))
    assert "--resume" in line and "output_dir=" in line
    outcome = run("train", "tiny.yaml", "train.max_steps=1", "--resume")
    assert outcome.code == 0 and "this run is finished" in outcome.out
