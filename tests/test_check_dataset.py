"""tools/check_dataset.py: exit codes, what it prints, and what it writes."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import Run, mistake
from PIL import Image

TOOL = Path(__file__).parent.parent / "tools" / "check_dataset.py"
RESOLUTION = ("input.short_edge=80", "input.long_edge=133")


@pytest.fixture
def run(run_tool: Run) -> Run:
    return partial(run_tool, "check_dataset")


def save_pictures(folder: Path, *, seed: int, count: int = 5) -> list[str]:
    """Soft spots, 100 x 80, other ones in each."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for n in range(count):
        spots = rng.integers(0, 255, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(spots).resize((100, 80), Image.Resampling.BICUBIC).save(folder / f"{n}.png")
    return [f"{n}.png" for n in range(count)]


def make_coco(root: Path, name: str, *, seed: int, width: float = 36) -> tuple[str, str]:
    """Ten boxes of one class, five of them `width` wide; as settings."""
    names = save_pictures(root / name, seed=seed)
    images = [{"id": n, "file_name": file, "width": 100, "height": 80} for n, file in enumerate(names)]
    boxes = [(n, [x, 20, w, 36]) for n in range(5) for x, w in ((4, 36), (52, width))]
    annotations = [{"id": i, "image_id": n, "category_id": 1, "bbox": box} for i, (n, box) in enumerate(boxes, start=1)]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "spot"}]}
    (root / f"{name}.json").write_text(json.dumps(content))
    return f"data.{name}.path={name}", f"data.{name}.annotations={name}.json"


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "config.yaml").write_text("input: {short_edge: 80, long_edge: 133}\n")
    return "config.yaml"


def test_a_sound_data_set_is_fit_to_train(run: Run, tmp_path: Path, config: str) -> None:
    settings = [*make_coco(tmp_path, "train", seed=1), *make_coco(tmp_path, "val", seed=2)]
    outcome = run(config, *settings)
    assert outcome.code == 0 and outcome.out.splitlines()[-1] == "fit to train", outcome.out
    assert "error" not in outcome.out and "warning" not in outcome.out
    assert "5 images, 0 without boxes; 10 boxes, 0 crowds (0%)" in outcome.out
    assert "trained at 80 x 100 ... 80 x 100 ... 80 x 100" in outcome.out and "(medium in training)" in outcome.out


def test_errors_are_named_counted_written_and_mended(run: Run, tmp_path: Path, config: str) -> None:
    settings = [*make_coco(tmp_path, "train", seed=1, width=0), *make_coco(tmp_path, "val", seed=2)]
    before = (tmp_path / "train.json").read_bytes()
    options = ["--named", 2, "--json", "out/all.json", "--fix", "clip", "--out", "mended", "--show", "shown"]
    outcome = run(config, *settings, *options)
    assert outcome.code == 1
    assert "error: zero-size box: 5" in outcome.out and "... and 3 more" in outcome.out
    assert "train: train/1.png, annotation 4" in outcome.out and "annotation 6" not in outcome.out
    assert outcome.out.splitlines()[-1].startswith("not fit to train: 5 errors. First: zero-size box (5)")
    assert "train: mended 5 zero-size box; 5 of 5 images, 5 of 10 boxes" in outcome.out
    assert "val: mended nothing" in outcome.out and "data.train.annotations=mended/train.json" in outcome.out

    content = json.loads((tmp_path / "out" / "all.json").read_text())
    assert content["fit"] is False and content["statistics"]["val"]["classes"] == {"spot": 10}
    zero = [finding for finding in content["findings"] if finding["kind"] == "zero-size box"]
    assert [(f["file"], f["annotation"]) for f in zero] == [(f"train/{n}.png", 2 * n + 2) for n in range(5)]
    assert {"severity", "hint", "split", "message"} <= set(zero[0])

    names = sorted(file.name for file in (tmp_path / "shown").iterdir())
    assert names[0].startswith("001_train_") and names[-1] == "sheet.jpg" and len(names) == 11
    assert (tmp_path / "train.json").read_bytes() == before
    again = run(config, *settings, "data.train.annotations=mended/train.json", "data.val.annotations=mended/val.json")
    assert again.code == 0 and "First: rare class (1)" in again.out.splitlines()[-1]  # five boxes are few


def test_a_folder_or_a_file_instead_of_a_config(run: Run, tmp_path: Path) -> None:
    """YOLO's data.yaml: both of its parts, and the same picture in both is an error."""
    for part, seed in (("train", 1), ("val", 2)):
        for name in save_pictures(tmp_path / "images" / part, seed=seed):
            label = tmp_path / "labels" / part / name.replace("png", "txt")
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text("0 0.22 0.475 0.36 0.45\n0 0.7 0.475 0.36 0.45\n")  # 36 x 36 of 100 x 80
    (tmp_path / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [spot]\n")
    for source in ("data.yaml", "."):  # its folder is the same data set
        outcome = run(source, *RESOLUTION)
        assert outcome.code == 0 and outcome.out.splitlines()[-1] == "fit to train", outcome.out
        assert "\ntrain: data.yaml" in outcome.out and "\nval: data.yaml" in outcome.out
    (tmp_path / "images" / "val" / "0.png").write_bytes((tmp_path / "images" / "train" / "3.png").read_bytes())
    outcome = run("data.yaml", *RESOLUTION)
    assert outcome.code == 1 and "val: images/val/0.png: is images/train/3.png of train" in outcome.out

    make_coco(tmp_path, "alone", seed=3)
    outcome = run("alone", "data.train.annotations=alone.json", *RESOLUTION, "--fix", "clip", "--out", "mended")
    assert outcome.code == 0 and "\ndata: alone.json" in outcome.out, outcome.out
    assert "use it: data.train.path=alone data.train.annotations=mended/data.json" in outcome.out


def test_mistakes_get_one_line(run: Run, tmp_path: Path, config: str) -> None:
    settings = make_coco(tmp_path, "train", seed=1)
    assert "names no data" in mistake(run(config))
    assert "nowhere" in mistake(run("nowhere"))
    assert "does not exist" in mistake(run("nowhere.yaml"))
    assert "--fix clip|drop and --out DIR" in mistake(run(config, *settings, "--fix", "clip"))
    assert "--fix clip|drop and --out DIR" in mistake(run(config, *settings, "--out", "new"))
    for option in (["--fix", "drop", "--out", "train"], ["--show", "train"], ["--show", "train.json"]):
        assert "is not an empty folder" in mistake(run(config, *settings, *option))
    assert "unknown key" in mistake(run(config, *settings, "input.shrt_edge=3"))
    (tmp_path / "train.json").write_text("{")
    assert "not valid JSON" in mistake(run(config, *settings))


def test_help(run: Run) -> None:
    outcome = run("--help")
    assert outcome.code == 0 and "--fix {clip,drop}" in outcome.out
