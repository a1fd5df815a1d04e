"""Whatever stands in a config, an annotation file or an image: it works, or is refused in one line; it never hangs.

A few seconds by default; RETINANET_FAULTS_MINUTES makes them more.
"""

import io
import json
import math
import shutil
import signal
import time
import typing
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import BaseModel

from faults.child import narrow_backbone
from faults.seeds import MINUTES
from retinanet.checkpoint import load_checkpoint
from retinanet.checks.check import check
from retinanet.config import Config, parse_config
from retinanet.data.coco import load_coco
from retinanet.data.faults import Fault
from retinanet.errors import UserError
from retinanet.predictor import Predictor
from retinanet.training import train

pytestmark = pytest.mark.slow
EXAMPLES = 15  # between two looks at the clock
LIMIT = 60  # seconds for one example, which takes less than one: more is a hang

NUMBERS = st.one_of(
    st.integers(-3, 130),
    st.floats(),
    st.sampled_from([0, -0.0, 1e-300, 1e300, 2**53, 2**63, 10**40, math.nan, math.inf, True, None, "7", "", [], {}]),
)
SANE = st.integers(1, 70)
NAMES = st.sampled_from(["0.png", "1.png", "2.png", "3.png", "../0.png", "nowhere.png", "", "ç\n.png"])


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The backbone of `faults.child`; and quiet."""
    import torchvision

    monkeypatch.setattr(torchvision.models, "resnet18", torchvision.models.resnet18)  # put back after the test
    narrow_backbone()
    signal.signal(signal.SIGALRM, hung)


def hung(*_: Any) -> None:
    raise TimeoutError(f"no end after {LIMIT} s")


def explore(example: Callable[..., None], minutes: float, **strategies: st.SearchStrategy[Any]) -> None:
    """Hypothesis on `example` until the time is up; at least once, from a seed that is always the same."""

    def guarded(**drawn: Any) -> None:
        signal.alarm(LIMIT)
        try:
            example(**drawn)
        except UserError as error:
            assert "\n" not in str(error) and str(error).strip()
        finally:
            signal.alarm(0)

    options = settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    end = time.monotonic() + 60 * minutes
    for n in range(1 << 30):
        seed(n)(options(given(**strategies)(guarded)))()
        if time.monotonic() >= end:
            return


def values_of(annotation: Any) -> st.SearchStrategy[Any]:
    """Right and wrong values for a key of the config: of its type, of a section's keys, or anything."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        keys = {name: values_of(field.annotation) for name, field in annotation.model_fields.items()}
        return st.fixed_dictionaries({}, optional=keys)
    choices = [choice for choice in typing.get_args(annotation) if isinstance(choice, str)]
    if typing.get_origin(annotation) is typing.Literal:
        return st.sampled_from([*choices, "nothing"])
    parts = [values_of(part) for part in typing.get_args(annotation) if part is not type(None) and isinstance(part, type)]
    return st.one_of(NUMBERS, SANE, st.text(max_size=3), st.lists(NUMBERS, max_size=6), *parts)


def test_configs() -> None:
    """Parsed, they say again what they are when written and read; or they are refused."""

    def example(raw: dict[str, Any]) -> None:
        config = parse_config(raw)
        assert parse_config(config.model_dump(mode="json")) == config

    explore(example, MINUTES / 4, raw=values_of(Config))


@st.composite
def pictures(draw: st.DrawFn) -> bytes:
    """A picture file of any mode and an odd size; one time in four with some bytes changed, or no picture at all."""
    mode = draw(st.sampled_from(["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr", "I;16", "I", "F"]))
    size = draw(st.tuples(*[st.sampled_from([1, 2, 33, 64, 90])] * 2))
    kind = "TIFF" if mode in ("F", "I", "CMYK", "YCbCr") else "PNG"
    file = io.BytesIO()
    Image.new(mode, size, draw(st.integers(0, 1))).save(file, kind)
    content = bytearray(file.getvalue())
    match draw(st.integers(0, 7)):
        case 0:
            for _ in range(draw(st.integers(1, 8))):
                content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
        case 1:
            return draw(st.binary(max_size=40))
    return bytes(content)


@st.composite
def coco_files(draw: st.DrawFn) -> dict[str, Any]:
    """About the images 0.png to 3.png, with one to six boxes; half of the files have up to three values of any kind."""
    box = st.lists(SANE, min_size=4, max_size=4)
    annotation = {"id": st.integers(0, 99), "image_id": st.integers(0, 3), "category_id": st.integers(1, 2), "bbox": box}
    optional = {"area": SANE, "iscrowd": st.integers(0, 1), "segmentation": NUMBERS}
    content = {
        "images": [{"id": n, "file_name": f"{n}.png"} for n in range(4)],
        "annotations": draw(st.lists(st.fixed_dictionaries(annotation, optional=optional), min_size=1, max_size=6)),
        "categories": [{"id": 1, "name": "red"}, {"id": 2, "name": "green"}],
    }
    for _ in range(max(0, draw(st.integers(-3, 3)))):
        entry = draw(st.sampled_from(content[draw(st.sampled_from([*content]))]))
        key = draw(st.sampled_from([*entry, "area", "iscrowd", "height", "width"]))
        entry[key] = draw(NAMES if key == "file_name" else NUMBERS | st.lists(SANE | NUMBERS, min_size=4, max_size=4))
    return content


SETTINGS = {
    "train.optimizer": ["sgd", "adamw"], "train.schedule": ["multistep", "cosine"], "train.batch_size": [1, 2, 3],
    "train.ema_decay": [None, 0.5], "train.learning_rate": [1e-3, 1e3], "model.norm": ["frozen", "batch"],
    "model.p6_from": ["c5", "p5"], "model.head_convs": [0, 1], "loss.box_loss": ["l1", "smooth_l1", "giou"],
    "loss.gamma": [0.0, 2.0], "loss.background_iou": [0.1, 0.5], "postprocess.nms": ["hard", "soft"],
    "postprocess.class_agnostic": [False, True], "postprocess.score_threshold": [0.0, 0.05], "data.drop_empty": [False, True],
    "data.repeat_threshold": [None, 0.9], "augment.min_visibility": [0.0, 1.0], "input.short_edge": [32, 64],
}  # fmt: skip


def run_config(folder: Path, chosen: dict[str, Any]) -> Config:
    """Two steps, on the data in `folder`."""
    data = {"path": str(folder), "annotations": str(folder / "data.json")}
    raw: dict[str, Any] = {
        "model": {"backbone": "resnet18", "backbone_weights": "none", "freeze_stages": 0, "fpn_channels": 8},
        "data": {"train": data, "val": data, "workers": 0, "max_corrupt_share": 1.0},
        "input": {"long_edge": 96},
        "train": {"max_steps": 2, "precision": "fp32", "max_bad_steps": 9},
        "output_dir": str(folder / "run"),
    }
    for key, value in chosen.items():
        section, name = key.split(".")
        raw.setdefault(section, {})[name] = value
    return parse_config(raw)


def test_data_through_check_training_and_prediction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def example(images: list[bytes], content: dict[str, Any], chosen: dict[str, Any]) -> None:
        folder = tmp_path / "data"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for n, picture in enumerate(images):
            (folder / f"{n}.png").write_bytes(picture)
        (folder / "data.json").write_text(json.dumps(content))
        config = run_config(folder, chosen)
        refused: list[Fault] = []
        check({"train": load_coco(folder / "data.json", folder, refused)}, {"train": refused}, config)
        train(config)
        capsys.readouterr()
        last = load_checkpoint(folder / "run" / "last.pt")
        assert all(value.isfinite().all() for value in last.model.values())
        predictor = Predictor.load(folder / "run" / "best.pt", score_threshold=0.0)
        for n in range(len(images)):
            predict(predictor, folder / f"{n}.png")

    def predict(predictor: Predictor, file: Path) -> None:
        try:
            found = predictor(str(file))
        except UserError as error:
            assert str(file) in str(error)
            return
        with warnings.catch_warnings(action="ignore"), Image.open(file) as image:  # of its damaged EXIF
            sides = np.array([*image.size, *image.size])
        boxes, scores, labels = found.numpy()
        assert np.isfinite(boxes).all()
        assert (boxes >= 0).all() and (boxes <= sides).all()
        assert ((scores >= 0) & (scores <= 1)).all() and (np.diff(scores) <= 0).all()
        assert np.isin(labels, [0, 1]).all()

    chosen = st.fixed_dictionaries({}, optional={key: st.sampled_from(values) for key, values in SETTINGS.items()})
    images = st.lists(pictures(), min_size=4, max_size=4)
    explore(example, 3 * MINUTES / 4, images=images, content=coco_files(), chosen=chosen)
