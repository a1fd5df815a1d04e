"""The README's commands do what it says, on a copy of the repository and drawn data."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from PIL import Image

HEADING = "## From `git clone` to the first prediction on your own data"
XML = """<annotation><filename>{name}.png</filename><size><width>96</width><height>64</height><depth>3</depth></size>
<object><name>{kind}</name><bndbox><xmin>{x}</xmin><ymin>8</ymin><xmax>{end}</xmax><ymax>36</ymax></bndbox></object>
</annotation>"""
SMALLER = (  # what makes the run one of seconds: a small detector from random weights, two steps, small pictures
    "train.init_from=null model.backbone=resnet18 model.backbone_weights=none model.norm=group model.fpn_channels=64 "
    "model.head_convs=1 input.short_edge=64 input.long_edge=96 augment.short_edges=null train.max_steps=2 train.batch_size=2 "
    "data.workers=0"
)


def commands() -> list[str]:
    """The lines of the first block under the heading."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8").partition(HEADING)[2]
    block = re.search(r"```\n(.*?)```", text, re.DOTALL)
    assert block is not None
    return block[1].strip().splitlines()


def draw_voc(folder: Path, n: int) -> None:
    """`n` pictures with a red or a green square each."""
    rng = np.random.default_rng(0)
    for part in ("JPEGImages", "Annotations"):
        (folder / part).mkdir(parents=True)
    for i in range(n):
        picture = rng.integers(90, 110, (64, 96, 3), dtype=np.uint8)
        x = int(rng.integers(0, 60))
        picture[8:36, x : x + 28] = (220, 20, 20) if i % 2 else (20, 220, 20)
        Image.fromarray(picture).save(folder / "JPEGImages" / f"{i}.png")
        xml = XML.format(name=i, kind=("green", "red")[i % 2], x=x, end=x + 28)
        (folder / "Annotations" / f"{i}.xml").write_text(xml)


def test_the_commands_are_four() -> None:
    clone, setup, train, predict = commands()
    assert clone.startswith("git clone ") and setup == "make setup"
    assert "tools/train.py configs/finetune.yaml" in train and "tools/predict.py" in predict


@pytest.mark.slow
def test_the_commands_lead_to_a_prediction(tmp_path: Path) -> None:
    copy = tmp_path / "retinanet"
    for name in ("retinanet", "tools", "configs"):
        shutil.copytree(REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    python = copy / ".venv" / "bin" / "python"  # in the place of `make setup`, which downloads gigabytes: this interpreter
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    draw_voc(copy / "datasets" / "mine" / "train", 6)
    draw_voc(copy / "datasets" / "mine" / "val", 4)
    shutil.copytree(copy / "datasets" / "mine" / "val" / "JPEGImages", copy / "datasets" / "mine" / "photos")

    _, _, train, predict = commands()
    said = ""
    for command in (f"{train} {SMALLER}", predict):
        environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, shell=True, cwd=copy, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stderr
        said += done.stdout
    assert "2 classes: green, red" in said and "anchors: " in said and "finished: 2 steps" in said
    out = copy / "runs" / "finetune" / "predictions"
    assert {f"{i}.jpg" for i in range(4)} <= {file.name for file in out.iterdir()}
    detections = json.loads((out / "detections.json").read_text())
    assert isinstance(detections, list) and {entry["category_name"] for entry in detections} <= {"green", "red"}
