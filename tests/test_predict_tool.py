"""tools/predict.py with a detector whose truth is known: videos, cameras, tiles, forms, and Ctrl-C."""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest
import torch
from finder import CATEGORIES, RectangleFinder, draw, grey
from PIL import Image
from test_inputs import Camera, turn

from retinanet.checkpoint import Checkpoint, save_checkpoint
from retinanet.config import parse_config
from retinanet.model import build_model

TOOL = Path(__file__).parent.parent / "tools" / "predict.py"


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def finder() -> RectangleFinder:
    return RectangleFinder()


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, finder: RectangleFinder
) -> Callable[..., Outcome]:
    """Runs the tool in `tmp_path` with the finder as its weights; what it writes is in out/."""
    config = parse_config({"model": {"num_classes": 2}, "input": {"short_edge": 64, "long_edge": 128}})
    checkpoint = SimpleNamespace(build=lambda: finder, categories=CATEGORIES, config=config, thresholds={"red": 0.25})
    monkeypatch.setattr("retinanet.predictor.load_weights", lambda weights: checkpoint)
    monkeypatch.chdir(tmp_path)

    def start(*arguments: object) -> Outcome:
        arguments = (*arguments, "--weights", "finder", "--out", "out", "--device", "cpu")
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(TOOL), run_name="__main__")
        captured = capsys.readouterr()
        return Outcome(ended.value.code or 0, captured.out, captured.err)  # type: ignore[arg-type]

    return start


Run = Callable[..., Outcome]


def frame(n: int) -> np.ndarray:
    """A red square that moves right by 8 pixels a frame."""
    image = grey(64, 128)
    draw(image, 0, (8 * n, 16, 8 * n + 24, 40))
    return image


def write_video(path: Path, frames: int = 6, fps: float = 10.0) -> None:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), fps, (128, 64))
    for n in range(frames):
        writer.write(frame(n)[:, :, ::-1].copy())
    writer.release()


def length(path: Path) -> tuple[int, float, tuple[int, int]]:
    capture = cv2.VideoCapture(str(path))
    count, size = 0, (0, 0)
    while (picture := capture.read()[1]) is not None:
        count, size = count + 1, picture.shape[:2]
    return count, capture.get(cv2.CAP_PROP_FPS), size


def entries(tmp_path: Path) -> list[dict[str, Any]]:
    return json.loads((tmp_path / "out" / "detections.json").read_text())


def test_a_video(run: Run, tmp_path: Path) -> None:
    write_video(tmp_path / "drive.mp4")
    outcome = run("drive.mp4", "--batch-size", 4)
    assert outcome.code == 0, outcome.err
    assert length(tmp_path / "out" / "drive.mp4") == (6, 10.0, (64, 128))
    found = entries(tmp_path)
    assert [(e["image_id"], e["frame"], e["time"]) for e in found] == [(n + 1, n, n / 10) for n in range(6)]
    assert {e["file_name"] for e in found} == {"drive.mp4"}
    np.testing.assert_allclose([e["bbox"] for e in found], [[8 * n, 16, 24, 24] for n in range(6)], atol=2)  # compression
    assert "6 objects in 6 images; pictures and detections.json in out" in outcome.out
    assert "6/6" in outcome.err  # the progress bar knew how many


def test_every_second_frame_of_a_turned_video(run: Run, tmp_path: Path) -> None:
    """Upright it is 128 high and 64 wide; (x, y) has come to (64 - y, x)."""
    write_video(tmp_path / "drive.mp4")
    turn(tmp_path / "drive.mp4")
    assert run("drive.mp4", "--every", 2).code == 0
    assert length(tmp_path / "out" / "drive.mp4") == (3, 5.0, (128, 64))
    found = entries(tmp_path)
    assert [(e["image_id"], e["frame"], e["time"]) for e in found] == [(1, 0, 0), (2, 2, 0.2), (3, 4, 0.4)]
    np.testing.assert_allclose([e["bbox"] for e in found], [[24, 16 * n, 24, 24] for n in range(3)], atol=2)


def test_a_broken_video_among_pictures(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.mp4").write_bytes(b"")
    Image.fromarray(frame(1)).save(tmp_path / "a" / "c.png")
    outcome = run("a")
    assert outcome.code == 1
    assert "warning: left out: a/b.mp4: no video that can be read\n" in outcome.out
    assert "1 of 2 inputs could not be read" in outcome.out
    assert [e["image_id"] for e in entries(tmp_path)] == [2]


class Live(Camera):
    """Three pictures, and Ctrl-C while it waits for the fourth."""

    def read(self) -> tuple[bool, np.ndarray | None]:
        if self.left == 1:
            raise KeyboardInterrupt
        self.left -= 1
        return True, frame(3 - self.left)[:, :, ::-1].copy()


def test_a_camera_until_it_is_stopped(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its only way to end: no failure, and nothing lost of what was seen."""
    capture = cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", Live)
    outcome = run("webcam:0")
    monkeypatch.setattr(cv2, "VideoCapture", capture)
    assert outcome.code == 0, outcome.err
    assert "stopped\n3 objects in 3 images" in outcome.out and "Traceback" not in outcome.err
    assert Live.last.released
    found = entries(tmp_path)
    assert [(e["frame"], e["file_name"]) for e in found] == [(n, "webcam:0") for n in range(3)]
    assert found[0]["time"] <= found[1]["time"] <= found[2]["time"]
    assert length(tmp_path / "out" / "webcam_0.mp4")[0] >= 3


def test_ctrl_c_keeps_what_was_found(run: Run, tmp_path: Path, finder: RectangleFinder) -> None:
    for n in range(5):
        Image.fromarray(frame(n)).save(tmp_path / f"{n}.png")
    forward, seen = finder.forward, []

    def interrupted(*inputs: Any) -> Any:
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return forward(*inputs)

    finder.forward = interrupted  # type: ignore[method-assign]
    outcome = run("?.png", "--batch-size", 1, "--format", "json,csv", "--sheet")
    assert outcome.code == 130
    assert "interrupted: what was found so far is written\n2 objects in 2 images" in outcome.out
    assert [e["file_name"] for e in entries(tmp_path)] == ["0.png", "1.png"]
    assert len((tmp_path / "out" / "detections.csv").read_text().splitlines()) == 3
    assert (tmp_path / "out" / "sheet.jpg").exists() and not (tmp_path / "out" / "2.jpg").exists()


def test_what_was_decided_is_one_line(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retinanet.predictor.choose_precision", lambda asked, device: "fp32")
    Image.fromarray(frame(0)).save(tmp_path / "a.png")
    resized = "pictures resized to 64, their longer side to 128 at most"
    assert run("a.png").out.splitlines()[0] == f"cpu, fp32; {resized}; least score red 0.25, green 0.5"
    line = run("a.png", "--score", 0.3, "--tile", 100, "--tta").out.splitlines()[0]
    assert line == f"cpu, fp32; {resized}; in tiles of 100, overlap 0.2; six looks at each; least score 0.3"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_precision_asked_for(run: Run, tmp_path: Path, precision: str) -> None:
    Image.fromarray(frame(0)).save(tmp_path / "a.png")
    outcome = run("a.png", "--precision", precision)
    assert outcome.code == 0 and outcome.out.startswith(f"cpu, {precision}; ")


def test_the_sheet_leaves_an_input_of_its_name_alone(run: Run, tmp_path: Path) -> None:
    """Both are written beside the inputs, of which one is called sheet.jpg."""
    (tmp_path / "out").mkdir()
    Image.fromarray(frame(0)).save(tmp_path / "out" / "sheet.jpg", quality=95)
    before = (tmp_path / "out" / "sheet.jpg").read_bytes()
    assert run("out", "--sheet").code == 0
    assert (tmp_path / "out" / "sheet.jpg").read_bytes() == before
    assert {path.name for path in (tmp_path / "out").glob("*.jpg")} == {"sheet.jpg", "sheet_2.jpg", "sheet_3.jpg"}


def test_tiles(run: Run, tmp_path: Path) -> None:
    """An object 4 pixels wide in a picture of 640: resized to 128, of which columns 62 and 67 remain, it is gone."""
    image = grey(320, 640)
    draw(image, 1, (63, 100, 67, 104))
    Image.fromarray(image).save(tmp_path / "a.png")
    assert "0 objects" in run("a.png").out
    assert "1 objects" in run("a.png", "--tile", 64).out
    np.testing.assert_allclose(entries(tmp_path)[0]["bbox"], [63, 100, 4, 4], atol=0.1)


def test_forms_and_folders_of_folders(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    Image.fromarray(frame(0)).save(tmp_path / "a" / "x.png")
    Image.fromarray(frame(1)).save(tmp_path / "a" / "b" / "x.png")
    outcome = run("a", "--recursive", "--format", "coco, yolo,crops", "--no-pictures")
    assert "2 objects in 2 images; coco and yolo and crops in out" in outcome.out
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")}
    assert written == {"coco.json", "yolo/x.txt", "yolo/x_2.txt", "crops/red/x_1.jpg", "crops/red/x_2_1.jpg"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "jsn"], "--format: there is no 'jsn', but json, coco, yolo, voc, csv, crops. Did you mean 'json'?"),
        (["--tile", "8"], "a tile must have at least 32 pixels a side, got 8"),
        (["--tile", "64", "--overlap", "1"], "the overlap of tiles is a share of their side, 0..0.9, got 1"),
        (["--every", "0"], "not every 0"),
        (["--precision", "fp8"], "there is no precision 'fp8': expected auto, fp32, "),
    ],
)
def test_mistakes_are_one_line(run: Run, tmp_path: Path, arguments: list[str], message: str) -> None:
    Image.fromarray(frame(0)).save(tmp_path / "a.png")
    outcome = run("a.png", *arguments)
    assert outcome.code == 2 and len(outcome.err.splitlines()) == 1 and message in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """A random detector, model.pt, and in in/ eleven pictures of several sizes, of which two share a name and one is torn."""
    config = parse_config(
        {
            "model": {"num_classes": 2, "backbone": "resnet18", "norm": "batch", "fpn_channels": 32, "head_convs": 1},
            "input": {"short_edge": 64, "long_edge": 128},
        }
    )
    torch.manual_seed(0)
    model = build_model(config.model, config.input, trained_backbone=False)
    torch.nn.init.normal_(model.cls_subnet.final.weight, std=1.0)  # scores of all sizes
    save_checkpoint(tmp_path / "model.pt", Checkpoint(config, CATEGORIES, model.state_dict()))
    rng = np.random.default_rng(0)
    (tmp_path / "in" / "b").mkdir(parents=True)
    for n in range(11):
        name = "b/00.png" if n == 10 else f"{n:02}.png"
        Image.fromarray(rng.integers(0, 256, (60 + 9 * n, 120 - 7 * n, 3), np.uint8)).save(tmp_path / "in" / name)
    (tmp_path / "in" / "03.png").write_bytes(b"torn")
    return tmp_path


def started(album: Path, *program: str, inputs: str = "in", out: str) -> subprocess.CompletedProcess[str]:
    options = ["--weights", "model.pt", "--recursive", "--batch-size", "2", "--score", "0.2", "--format", "json,coco,csv,yolo"]
    command = [sys.executable, *program, str(TOOL), inputs, *options, "--device", "cpu", "--sheet", "--out", out]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=album, env=environment)


@pytest.mark.slow
def test_a_prediction_loads_neither_augmentation_nor_training_nor_evaluation(album: Path) -> None:
    """Not at the start and not on the way: each would take as long as the prediction itself."""
    outcome = started(album, "-X", "importtime", inputs="in/00.png", out="out")  # names on stderr what is imported
    assert outcome.returncode == 0, outcome.stderr[-2000:]
    loaded = {line.rsplit("|", 1)[1].strip() for line in outcome.stderr.splitlines() if line.startswith("import time:")}
    assert {"torch", "retinanet.predictor", "retinanet.outputs"} <= loaded
    unneeded = {"albumentations", "tensorboard", "torch.utils.tensorboard", "matplotlib", "scipy", "pandas", "pycocotools"}
    unneeded |= {"onnx", "onnxruntime", "retinanet.training", "retinanet.evaluation.coco", "retinanet.data.transforms"}
    unneeded |= {"torch._dynamo"}  # neither torchvision's import nor the building of the model
    assert not loaded & unneeded


@pytest.mark.slow
def test_two_processes_write_what_one_writes(album: Path) -> None:
    """To the byte: they share batches, not pictures, so that the padding is the same too."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    one, two = started(album, out="one"), started(album, *torchrun, out="two")
    files = {path.relative_to(album / "one") for path in (album / "one").rglob("*.*")}
    assert files == {path.relative_to(album / "two") for path in (album / "two").rglob("*.*")}
    assert {"00.jpg", "00_2.jpg", "sheet.jpg", "yolo/09.txt"} <= set(map(str, files)) and len(files) == 10 + 10 + 1 + 3
    for name in files - {Path("sheet.jpg")}:  # the first process's pictures
        assert (album / "one" / name).read_bytes() == (album / "two" / name).read_bytes(), name
    found = json.loads((album / "two" / "detections.json").read_text())
    assert {entry["image_id"] for entry in found} == {*range(1, 12)} - {4}
    for outcome in (one, two):
        assert outcome.returncode == 1, outcome.stderr
        assert outcome.stdout.count("warning: left out: in/03.png: not an image") == 1
        assert outcome.stdout.count(f"{len(found)} objects in 10 images; ") == 1
        assert outcome.stdout.count("1 of 11 inputs could not be read, named above") == 1
    write_video(album / "drive.mp4")
    refused = started(album, *torchrun, inputs="drive.mp4", out="three")
    assert (
        "error: drive.mp4: several processes share pictures, not videos or cameras: start one without torchrun"
        in refused.stderr
    )
    assert not (album / "three").exists()
