"""tools/convert_dataset.py: from any format into any, divided if wished, and what was lost is said."""

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from retinanet.data.formats import load_path

TOOL = Path(__file__).parents[1] / "tools" / "convert_dataset.py"
Make = Callable[..., dict[str, str]]
Run = Callable[..., Any]


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the tool in this process: a new one would spend seconds on loading PyTorch."""

    def main(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(TOOL), run_name="__main__")
        return Done(caught.value.code, *capsys.readouterr())  # type: ignore[arg-type]

    return main


def test_a_split_conversion_and_back(run: Run, make_coco: Make, tmp_path: Path) -> None:
    made = make_coco(n=10)
    raw = json.loads(Path(made["annotations"]).read_text())
    raw["annotations"][0]["iscrowd"] = 1
    Path(made["annotations"]).write_text(json.dumps(raw))
    out = tmp_path / "yolo"
    done = run(made["path"], "--annotations", made["annotations"], "--to", "yolo", "--out", out, "--split", "0.8,0.2")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{made['path']}: coco, from {made['annotations']}")
    assert lines[2].split() == ["images", "8", "80.0%", "2", "20.0%"]
    assert lines[-3:] == [
        f"{out}: 10 images with 20 annotations of 2 classes, yolo",
        "  yolo cannot hold: class ids or names, which change (2)",  # 3 and 7 become 0 and 1
        "  yolo cannot hold: crowd or difficult regions (1)",
    ]
    assert sorted(p.name for p in out.iterdir()) == ["data.yaml", "images", "labels"]
    assert (len(load_path(out, part="train")), len(load_path(out, part="val"))) == (8, 2)
    again = run(out, "--to", "coco", "--out", tmp_path / "coco", "--images", "copy")
    assert again.returncode == 0 and "cannot hold" not in again.stdout
    assert len(load_path(tmp_path / "coco").labels) == 19


def test_the_seed_chooses_the_split(run: Run, make_coco: Make, tmp_path: Path) -> None:
    made = make_coco(n=12)
    names = []
    for n, seed in enumerate((0, 0, 1)):
        out = tmp_path / str(n)
        common = ("--annotations", made["annotations"], "--to", "csv", "--out", out, "--images", "none")
        assert run(made["path"], *common, "--split", "0.5,0.25,0.25", "--seed", seed).returncode == 0
        names.append([(out / f"{part}.csv").read_text() for part in ("train", "val", "test")])
    assert names[0] == names[1] != names[2]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--split", "0.5"], "expected two or three shares that sum to 1"),
        (["--split", "0.5,0.6"], "expected two or three shares that sum to 1"),
        (["--split", "1,0"], "expected two or three shares"),
        (["--split", "nan,1"], "expected two or three shares"),
        (["--split", "a,b"], "got 'a,b'"),
        (["--to", "xml"], "invalid choice: 'xml'"),
        (["--from", "voc"], "a VOC data set has XML files in"),
        (["--one-based"], "one_based is for voc, and this is coco"),
    ],
)
def test_mistakes_get_one_line(run: Run, make_coco: Make, tmp_path: Path, more: list[str], said: str) -> None:
    made = make_coco(n=2)
    common = [made["path"], "--to", "coco", "--out", tmp_path / "out"]
    common += [] if "--from" in more else ["--annotations", made["annotations"]]
    done = run(*common, *more)
    assert done.returncode == 2 and said in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_empty_is_left_alone(run: Run, make_coco: Make, tmp_path: Path) -> None:
    made = make_coco(n=2)
    done = run(made["path"], "--annotations", made["annotations"], "--to", "coco", "--out", made["path"])
    assert done.returncode == 2 and "is no empty folder" in done.stderr
    assert len(list(Path(made["path"]).iterdir())) == 2


def test_help_shows_examples_and_loads_nothing_heavy() -> None:
    program = f"import sys, runpy\nsys.argv = ['x', '--help']\ntry: runpy.run_path({str(TOOL)!r}, run_name='__main__')\n"
    program += "except SystemExit: print('torch' in sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "--to yolo --out" in done.stdout and done.stderr.strip() == "False"
