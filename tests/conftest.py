"""What several tests share: small data sets drawn in a moment, and the real data where it is to be had."""

import json
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

REPOSITORY = Path(__file__).parent.parent

torch.set_num_threads(1)  # the tests' tensors are small, and pytest-xdist runs a process on each core


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images and annotations that RETINANET_TEST_DATA names; skips without it."""
    folder = os.environ.get("RETINANET_TEST_DATA")
    if not folder:
        pytest.skip("needs real images: RETINANET_TEST_DATA is not set")
    assert Path(folder).is_dir(), f"RETINANET_TEST_DATA names {folder}, which is no folder"
    return Path(folder)


@pytest.fixture(scope="session")
def real_weights(real_data: Path) -> Path:
    """The folder of pretrained backbones beside the real data; skips without it."""
    folder = real_data.parent / "weights"
    if not folder.is_dir():
        pytest.skip("needs pretrained backbones beside RETINANET_TEST_DATA")
    return folder


class Outcome(NamedTuple):
    """What came of a tool."""

    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def run_tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """A function that runs a tool as `python tools/NAME.py ARGUMENTS` does, in `tmp_path`."""
    monkeypatch.chdir(tmp_path)

    def start(tool: str, *arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", [str(REPOSITORY / "tools" / f"{tool}.py"), *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(sys.argv[0], run_name="__main__")
        captured = capsys.readouterr()
        return Outcome(ended.value.code or 0, captured.out, captured.err)  # type: ignore[arg-type]

    return start


def mistake(outcome: Outcome) -> str:
    """The one line on stderr of a user's mistake."""
    assert outcome.code == 2, outcome
    lines = outcome.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), outcome.err
    return lines[0]


SMALL = {"backbone": "resnet18", "backbone_weights": "none", "norm": "group", "fpn_channels": 32, "head_convs": 1}


@contextmanager
def power_cut(after: int) -> Iterator[None]:
    """Inside, a training must come as far as the step that follows the first `after`, and ends there as if it had crashed."""
    from retinanet.training import Trainer

    step = Trainer._train_step

    def crash(self: Trainer, *arguments: Any) -> Any:
        if self.step == after:
            raise RuntimeError("power cut")
        return step(self, *arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr(Trainer, "_train_step", crash)
        yield


def draw_coco(parent: Path, name: str = "train", n: int = 8, size: tuple[int, int] = (64, 96), seed: int = 0) -> dict[str, str]:
    """Draws `n` images with coloured rectangles below `parent`; returns {"path", "annotations"} for a config."""
    rng = np.random.default_rng(seed)
    folder = parent / name
    folder.mkdir()
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 3, "name": "red"}, {"id": 7, "name": "green"}],
    }
    for i in range(n):
        height, width = size if i % 2 == 0 else size[::-1]
        picture = rng.integers(90, 110, (height, width, 3), dtype=np.uint8)
        content["images"].append({"id": 10 + i, "file_name": f"{i}.png", "height": height, "width": width})
        for k in range(2):
            w, h = (int(v) for v in rng.integers(20, 32, 2))
            x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
            picture[y : y + h, x : x + w] = (220, 20, 20) if k == 0 else (20, 220, 20)
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": 10 + i,
                    "category_id": (3, 7)[k],
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
        Image.fromarray(picture).save(folder / f"{i}.png")
    annotations = parent / f"{name}.json"
    annotations.write_text(json.dumps(content))
    return {"path": str(folder), "annotations": str(annotations)}


@pytest.fixture
def make_coco(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """`draw_coco` in the test's folder."""
    return partial(draw_coco, tmp_path)
