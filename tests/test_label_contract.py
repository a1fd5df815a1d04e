"""A data set's own class ids and names, from the annotation file through training to whatever is written about them."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, SMALL

from retinanet.checkpoint import load_checkpoint, save_checkpoint
from retinanet.config import parse_config
from retinanet.structures import Category
from retinanet.training import train

KINDS = {  # ids of red and green as the file writes them, and as they must come back
    "gapped": ([3, 90], [3, 90]),
    "from 0": ([0, 1], [0, 1]),
    "from 1": ([1, 2], [1, 2]),
    "against the order of the file": ([9, 4], [9, 4]),
    "text": (["7", "12"], [7, 12]),
}


def rewrite(data: dict[str, str], ids: list[Any], names: tuple[str, str] = ("red", "green")) -> None:
    """Gives `make_coco`'s classes, red 3 and green 7, these ids and names."""
    file = Path(data["annotations"])
    content = json.loads(file.read_text())
    of = dict(zip((3, 7), ids, strict=True))
    content["categories"] = [{"id": number, "name": name} for number, name in zip(ids, names, strict=True)]
    for entry in content["annotations"]:
        entry["category_id"] = of[entry["category_id"]]
    file.write_text(json.dumps(content))


def run(monkeypatch: pytest.MonkeyPatch, tool: str, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [str(REPOSITORY / "tools" / f"{tool}.py"), *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(sys.argv[0], run_name="__main__")
    assert not ended.value.code


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def train_a_step(data: dict[str, str], folder: Path) -> Path:
    """A run of one step, whose detector is then made to see green everywhere, and red nowhere."""
    train(
        parse_config(
            {
                "model": {
                    **SMALL,
                    "freeze_stages": 5,
                    "anchors": {"sizes": [24, 48, 96, 192, 384], "scales": [1.0], "ratios": [1.0]},
                },
                "input": {"short_edge": 64, "long_edge": 96},
                "data": {"train": data, "val": data, "workers": 0},
                "train": {"batch_size": 2, "max_steps": 1, "precision": "fp32"},
                "output_dir": str(folder),
            }
        )
    )
    checkpoint = load_checkpoint(folder / "best.pt")
    green = [category.name for category in checkpoint.categories].index("green")
    checkpoint.model["cls_subnet.final.bias"] = torch.where(torch.arange(2) == green, 3.0, -20.0)  # one anchor in a cell
    save_checkpoint(folder / "best.pt", checkpoint)
    return folder / "best.pt"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_names_come_back(
    kind: str, make_coco: Callable[..., dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, (red, green) = KINDS[kind]
    data = make_coco(n=2)
    rewrite(data, written)
    weights = train_a_step(data, tmp_path / "run")
    assert set(load_checkpoint(weights).categories) == {Category(red, "red"), Category(green, "green")}
    assert list(read(tmp_path / "run" / "metrics.json")["per_class"]) == (["red", "green"] if red < green else ["green", "red"])

    run(monkeypatch, "predict", data["path"], "--weights", weights, "--score", "0.5", "--out", tmp_path / "found")
    found = read(tmp_path / "found" / "detections.json")
    assert {(entry["category_id"], entry["category_name"]) for entry in found} == {(green, "green")}

    run(monkeypatch, "evaluate", "--weights", weights, "--out", tmp_path / "evaluated")
    measured = read(tmp_path / "evaluated" / "metrics.json")["per_class"]
    assert measured["green"]["AR100"] > 0 and measured["red"]["AR100"] == 0
    assert {entry["category_id"] for entry in read(tmp_path / "evaluated" / "detections.json")} == {green}

    # as plain COCO results of the data's own images: no names, only ids
    number = {Path(image["file_name"]).name: image["id"] for image in read(Path(data["annotations"]))["images"]}
    results = [
        {**{key: entry[key] for key in ("category_id", "bbox", "score")}, "image_id": number[Path(entry["file_name"]).name]}
        for entry in found
    ]
    (tmp_path / "results.json").write_text(json.dumps(results))
    arguments = ("--detections", tmp_path / "results.json", "--annotations", data["annotations"])
    run(monkeypatch, "evaluate", *arguments, "--out", tmp_path / "again")
    again = read(tmp_path / "again" / "metrics.json")["per_class"]
    assert again["green"]["AR100"] == pytest.approx(measured["green"]["AR100"], abs=1e-6) and again["red"]["AR100"] == 0


@pytest.mark.slow
def test_other_data_is_evaluated_by_name(
    make_coco: Callable[..., dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same pictures whose file swaps the ids: 7 is red and 3 green. The file with names of its own is refused."""
    data, other = make_coco(n=2), make_coco("other", n=2)
    weights = train_a_step(data, tmp_path / "run")
    rewrite(other, [7, 3])
    given = [f"data.val.{key}={value}" for key, value in other.items()]
    run(monkeypatch, "evaluate", "--weights", weights, "--out", tmp_path / "one")
    run(monkeypatch, "evaluate", "--weights", weights, *given, "--out", tmp_path / "two")
    assert "matched by name (red 7 instead of 3, green 3 instead of 7)" in capsys.readouterr().out
    one, two = (read(tmp_path / name / "metrics.json")["per_class"] for name in ("one", "two"))
    assert one["green"] == two["green"] and one["green"]["AR100"] > 0
    assert {(e["category_id"], e["category_name"]) for e in read(tmp_path / "two" / "detections.json")} == {(3, "green")}

    arguments = ("--detections", tmp_path / "one" / "detections.json", "--annotations", other["annotations"])
    run(monkeypatch, "evaluate", *arguments, "--out", tmp_path / "three")  # ids of the first data, and names
    assert "matched by name (green 3 instead of 7)" in capsys.readouterr().out
    three = read(tmp_path / "three" / "metrics.json")["per_class"]
    assert three["green"]["AR100"] == pytest.approx(one["green"]["AR100"], abs=1e-6)
