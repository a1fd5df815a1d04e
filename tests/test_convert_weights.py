"""The converting tool: what it writes and says, and one clear line for a wrong file, of which nothing is executed."""

import pickle
import subprocess
import sys
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from conftest import Run, mistake
from PIL import Image
from torch import Tensor
from torchvision.models.detection import fasterrcnn_resnet50_fpn, fcos_resnet50_fpn, retinanet_resnet50_fpn

from retinanet.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from retinanet.config import parse_config
from retinanet.errors import UserError
from retinanet.model import build_model
from retinanet.structures import Category
from retinanet.weights.files import read_state_dict
from retinanet.weights.layout import MARKS
from retinanet.weights.torchvision import export_torchvision_state
from retinanet.weights.zoo import IMPORTERS, ZOO

TOOL = Path(__file__).parent.parent / "tools" / "convert_weights.py"
SOURCES = list(IMPORTERS)


@pytest.fixture
def run(run_tool: Run) -> Run:
    return partial(run_tool, "convert_weights")


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """torchvision's, of three classes."""
    torch.manual_seed(0)
    anchors = {"offset": 0.0, "integer": True, "strides": "grid"}
    model = {"backbone": "resnet18", "num_classes": 3, "norm": "batch", "anchors": anchors}
    config = parse_config({"model": model, "input": {"size_rounding": "floor"}})
    weights = build_model(config.model, config.input, trained_backbone=False).state_dict()
    categories = tuple(Category(n, name) for n, name in enumerate(("cat", "dog", "cow"), start=1))
    return export_torchvision_state(Checkpoint(config, categories, weights))


def test_help_is_quick() -> None:
    program = f"import runpy, sys; sys.argv = ['x', '--help']\ntry: runpy.run_path({str(TOOL)!r}, run_name='__main__')\n"
    program += "except SystemExit: pass\nprint('loaded', sorted({'torch', 'numpy', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "examples:" in done.stdout and done.stdout.endswith("loaded []\n")


def test_list(run: Run) -> None:
    outcome = run("--list")
    lines = outcome.out.splitlines()
    assert outcome.code == 0 and len(lines) == 1 + len(ZOO) + 2
    assert lines[1].split() == [
        "retinanet_resnet50_fpn_v2",
        "41.5",
        "torchvision",
        "146",
        *ZOO[lines[1].split()[0]].licence.split(),
    ]
    assert "as published, not measured by this project" in lines[-2]


def test_there_and_back(run: Run, state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(state, "theirs.pth")
    (tmp_path / "names.txt").write_text("\ufeffcat\n\ndog\n  cow \n", encoding="utf-8")
    outcome = run("theirs.pth", "--from", "torchvision", "--classes", "names.txt", "--out", "new/ours.pt", "--bn-eps", "0.001")
    assert outcome.code == 0, outcome.err
    rows = [line.split() for line in outcome.out.splitlines()]
    assert ["backbone.body.layer1.*", "->", "backbone.layer1.*", "(24)"] in rows  # 4 convolutions, 4 norms of 5 tensors
    assert ["head.classification_head.conv.*", "->", "cls_subnet.convs.*", "(8)"] in rows
    assert outcome.out.splitlines()[-1] == "new/ours.pt: resnet18, 3 classes, BatchNorm epsilon 0.001"
    checkpoint = load_checkpoint("new/ours.pt")
    assert checkpoint.categories == (Category(1, "cat"), Category(2, "dog"), Category(3, "cow"))
    assert checkpoint.config.model.norm_eps == 0.001

    outcome = run("new/ours.pt", "--to", "torchvision", "--out", "again/theirs.pth")
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines() == [
        "again/theirs.pth: for a RetinaNet with resnet18, P6 from C5, head norm none, num_classes=4",
        "then set eps = 0.001 in the BatchNorm of its backbone",
    ]
    again = torch.load("again/theirs.pth", weights_only=True)
    assert list(again) == list(state) and all(torch.equal(value, state[key]) for key, value in again.items())
    assert [file.name for file in Path("again").iterdir()] == ["theirs.pth"]


def test_torchvisions_own_builder_is_named(run: Run, tmp_path: Path) -> None:
    anchors = {"offset": 0.0, "integer": True, "strides": "grid"}
    config = parse_config(
        {"model": {"num_classes": 1, "p6_from": "p5", "anchors": anchors}, "input": {"size_rounding": "floor"}}
    )
    weights = build_model(config.model, config.input, trained_backbone=False).state_dict()
    save_checkpoint(tmp_path / "ours.pt", Checkpoint(config, (Category(6, "bus"),), weights))
    outcome = run("ours.pt", "--to", "torchvision", "--out", "theirs.pth")
    assert outcome.out == "theirs.pth: for retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=7)\n"
    theirs = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=7)
    theirs.load_state_dict(torch.load("theirs.pth", weights_only=True), strict=True)


def test_geometry_that_torchvision_has_not(run: Run, tmp_path: Path) -> None:
    config = parse_config({"model": {"backbone": "resnet18", "num_classes": 1, "fpn_channels": 32, "head_convs": 1}})
    weights = build_model(config.model, config.input, trained_backbone=False).state_dict()
    save_checkpoint(tmp_path / "ours.pt", Checkpoint(config, (Category(1, "cat"),), weights))
    line = mistake(run("ours.pt", "--to", "torchvision", "--out", "theirs.pth"))
    for key in ("model.fpn_channels is 32, there 256", "model.anchors.strides", "input.size_rounding", "model.head_convs"):
        assert key in line
    assert not Path("theirs.pth").exists()


def test_source_is_not_overwritten(run: Run, tmp_path: Path) -> None:
    (tmp_path / "model.pth").write_bytes(b"precious")
    assert "is the file to convert" in mistake(run("model.pth", "--from", "mmdet", "--out", tmp_path / "model.pth"))
    assert (tmp_path / "model.pth").read_bytes() == b"precious"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["x.pth"],
        ["x.pth", "--from", "mmdet"],
        ["--from", "mmdet", "--out", "y"],
        ["x", "--from", "keras", "--out", "y"],
        ["x", "--to", "torchvision", "--out", "y", "--classes", "z"],
        ["x", "--from", "mmdet", "--to", "torchvision", "--out", "y"],
    ],
)
def test_wrong_arguments(run: Run, arguments: list[str]) -> None:
    outcome = run(*arguments)
    assert outcome.code == 2 and "convert_weights.py: error: " in outcome.err


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "--classes names.txt cannot be read"),
        (b"", "--classes names.txt: no names in it"),
        (b"cat\ndog\ncat\n", "--classes names.txt: 'cat' stands there twice"),
        (b"\xff\xfe\x00c", "--classes names.txt cannot be read"),
        (b"cat\ndog\n", "theirs.pth: it has 3 classes and background, but 2 are named"),
    ],
)
def test_wrong_classes(run: Run, state: dict[str, Tensor], content: bytes | None, expected: str) -> None:
    torch.save(state, "theirs.pth")
    if content is not None:
        Path("names.txt").write_bytes(content)
    assert expected in mistake(run("theirs.pth", "--from", "torchvision", "--classes", "names.txt", "--out", "ours.pt"))
    assert not Path("ours.pt").exists()


class Malicious:
    """Unpickled by anything that executes, it writes a file."""

    def __reduce__(self) -> Any:
        return (exec, ("open('executed', 'w').close()",))


def malicious_codec(path: Path) -> None:
    """Asks for `_codecs.encode`, which older pickles of arrays need, with a codec of its own choice."""
    path.write_bytes(b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.")


def torchvision_names(build: Callable[..., Any], **options: Any) -> dict[str, Tensor]:
    """The keys of another of torchvision's models; what the tensors hold does not matter."""
    with torch.device("meta"):
        return {key: torch.zeros(()) for key in build(**options).state_dict()}


def truncated(path: Path, content: bytes) -> None:
    path.write_bytes(content[: len(content) * 2 // 3])


def archive(content: Any) -> bytes:
    path = Path("whole")
    torch.save(content, path)
    return path.read_bytes()


def damaged_archive(path: Path) -> None:
    torch.save({"a": torch.arange(1000.0)}, path)
    content = bytearray(path.read_bytes())
    place = content.index(np.arange(500.0, 502, dtype=np.float32).tobytes())
    content[place] ^= 1
    path.write_bytes(content)


ARRAYS = {"model": {"a": np.arange(1000.0), "b": np.float32(3)}}
WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "does not exist"),
    "folder": (lambda path: path.mkdir(), "is a folder"),
    "empty": (lambda path: path.touch(), "is empty"),
    "image": (lambda path: Image.new("RGB", (8, 8)).save(path, "PNG"), r"is no file of weights: it begins with b'\x89PNG"),
    "HTML": (lambda path: path.write_text("<!DOCTYPE html>"), "is no file of weights: it begins with b'<!DOCTYP'"),
    "text": (lambda path: path.write_text("x"), "is no file of weights: it begins with b'x'"),
    "cut archive": (lambda path: truncated(path, archive({"a": torch.zeros(9999)})), "is damaged, or another kind of archive"),
    "cut pickle": (lambda path: truncated(path, pickle.dumps(ARRAYS)), "is a damaged pickle, or not complete"),
    "damaged archive": (damaged_archive, "is damaged: wrong checksum of"),
    "other archive": (lambda path: zipfile.ZipFile(path, "w").writestr("a.txt", "x" * 99), "is damaged, or another kind"),
    "malicious archive": (lambda path: torch.save({"model": Malicious()}, path), "holds more than tensors and plain data"),
    "malicious older file": (
        lambda path: torch.save(Malicious(), path, _use_new_zipfile_serialization=False),
        "holds more than tensors and plain data",
    ),
    "malicious pickle": (
        lambda path: path.write_bytes(pickle.dumps({"model": {"a": Malicious()}})),
        "is no pickle of plain arrays (it asks for builtins.exec); nothing in it was executed",
    ),
    "malicious codec": (malicious_codec, "is no pickle of plain arrays (it asks for the codec rot13)"),
    "objects": (lambda path: path.write_bytes(pickle.dumps({"a": np.array([{}, None])})), "an array of O8, not of numbers"),
    "texts": (lambda path: path.write_bytes(pickle.dumps({"a": np.array(["b"])})), "an array of U1, not of numbers"),
    "numbers": (lambda path: path.write_bytes(pickle.dumps([1, 2, 3])), "is not a state dict"),
    "nothing in it": (lambda path: torch.save({}, path), "is not a state dict"),
    "whole numbers": (lambda path: torch.save({"a": 3}, path), "is not a state dict: 'a' is no tensor but int"),
    "numbered": (lambda path: torch.save({3: torch.zeros(1)}, path), "is not a state dict: '3' is no tensor but Tensor"),
    "classifier": (lambda path: torch.save(torchvision_names(torchvision.models.resnet18), path), "not a RetinaNet of"),
    "Faster R-CNN": (
        lambda path: torch.save(torchvision_names(fasterrcnn_resnet50_fpn, weights=None, weights_backbone=None), path),
        "not a RetinaNet of",
    ),
}  # fmt: skip


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", WRONG)
def test_wrong_file(run: Run, tmp_path: Path, kind: str, source: str) -> None:
    write, expected = WRONG[kind]
    run  # noqa: B018 (changes the folder)
    write(tmp_path / "model.bin")
    line = mistake(run("model.bin", "--from", source, "--out", "ours.pt"))
    assert line.startswith("error: model.bin") and expected in line
    assert not Path("ours.pt").exists() and not Path("executed").exists()


def test_malicious_files_would_be_noticed(run: Run) -> None:
    """Or nothing above would have to be refused."""
    Path("model.bin").write_bytes(pickle.dumps(Malicious()))
    with Path("model.bin").open("rb") as file:
        pickle.load(file)
    assert Path("executed").exists()


@pytest.mark.parametrize("source", SOURCES)
def test_file_of_another_project_is_known(run: Run, source: str) -> None:
    torch.save({MARKS[source]: torch.zeros(27)}, "model.bin")
    for other in SOURCES:
        if other != source:
            line = mistake(run("model.bin", "--from", other, "--out", "ours.pt"))
            assert f"not a RetinaNet of {other}: it has no tensor {MARKS[other]}; it is one of {source}" in line


def test_other_architectures_of_torchvision(run: Run, state: dict[str, Tensor]) -> None:
    """FCOS has a tensor of the same name, for one anchor in a cell."""
    with torch.device("meta"):
        names = fcos_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
    torch.save({key: torch.zeros(value.shape) for key, value in names.items() if key.startswith("head")}, "fcos.pth")
    line = mistake(run("fcos.pth", "--from", "torchvision", "--out", "ours.pt"))
    assert line == "error: fcos.pth: its class output is no convolution for 9 anchors in a cell"
    mobile = {key.replace("layer3", "blocks"): value for key, value in state.items()}
    torch.save(mobile, "mobile.pth")
    Path("names.txt").write_text("cat\ndog\ncow\n")
    line = mistake(run("mobile.pth", "--from", "torchvision", "--classes", "names.txt", "--out", "ours.pt"))
    assert "its backbone is no ResNet" in line


@pytest.mark.parametrize("key", ["head.cls_score.bias", "head.bbox_pred.bias", "backbone.bottom_up.stem.conv1.weight"])
def test_damage_to_a_detectron2_file_is_one_line(key: str) -> None:
    sound = {
        "head.cls_score.bias": torch.zeros(9),
        "head.cls_score.weight": torch.zeros(9, 256, 3, 3),
        "head.bbox_pred.bias": torch.zeros(36),
        "backbone.bottom_up.stem.conv1.weight": torch.zeros(64, 3, 7, 7),
        "backbone.fpn_lateral5.weight": torch.zeros(256, 512, 1, 1),
        "backbone.top_block.p6.weight": torch.zeros(256, 512, 3, 3),
        **{f"backbone.bottom_up.res4.{n}.conv{m}.weight": torch.zeros(256, 256, 3, 3) for n in (0, 1) for m in (1, 2)},
    }
    with pytest.raises(UserError, match=r"nothing in it is backbone\.bn1\.weight"):  # the first that is not there
        IMPORTERS["detectron2"](sound, categories=(Category(0, "a"),)).checkpoint()
    with pytest.raises(UserError) as caught:
        IMPORTERS["detectron2"]({**sound, key: torch.zeros(())}, categories=(Category(0, "a"),)).checkpoint()
    assert "\n" not in str(caught.value)


def test_damage_to_a_state_dict_is_always_one_line(state: dict[str, Tensor]) -> None:
    """Whatever is missing, has another shape or is too much, in any place."""
    categories = tuple(Category(n, str(n)) for n in (1, 2, 3))
    rng = np.random.default_rng(0)
    marks = ["head.classification_head.cls_logits.bias", "head.classification_head.cls_logits.weight"]
    telling = [*marks, "backbone.fpn.extra_blocks.p6.weight", "backbone.fpn.inner_blocks.2.0.weight"]
    telling += ["backbone.body.layer3.0.conv2.weight", "backbone.body.layer3.0.conv1.weight"]
    for key in [*telling, *rng.choice(list(state), 3)]:
        for kind in ("missing", "scalar", "flat", "longer", "none"):
            broken = dict(state)
            value = broken.pop(key)
            if kind != "missing":
                broken[key] = {
                    "scalar": torch.zeros(()),
                    "flat": value.flatten()[:5],
                    "longer": torch.cat([value.reshape(1, *value.shape)] * 2).flatten(0, min(1, value.ndim)),
                    "none": value.flatten()[:0],
                }[kind]
            with pytest.raises(UserError) as caught:
                IMPORTERS["torchvision"](broken, categories=categories).checkpoint()
            assert "\n" not in str(caught.value), (key, kind)
    broken = {**state, "backbone.body.layer9.weight": torch.zeros(1)}
    with pytest.raises(UserError, match=r"another architecture, this project's model has no backbone\.layer9\.weight"):
        IMPORTERS["torchvision"](broken, categories=categories).checkpoint()


def test_two_layouts_in_one_file_are_refused(state: dict[str, Tensor]) -> None:
    key = "backbone.fpn.inner_blocks.0.0.weight"
    with pytest.raises(UserError, match=r"would both be fpn\.lateral\.0\.weight"):
        IMPORTERS["torchvision"]({**state, "backbone.fpn.inner_blocks.0.weight": state[key]})


def test_every_container_gives_the_same_tensors(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b.c": torch.tensor(7), "half": torch.ones(2, dtype=torch.float16)}
    arrays = {key: value.numpy() for key, value in tensors.items()}
    path = tmp_path / "file"
    script = {"model": tensors, "optimizer": {"state": {}}, "args": Namespace(lr=0.02), "epoch": 25}  # torchvision's
    for content in (tensors, {"model": tensors, "epoch": 3}, {"state_dict": OrderedDict(tensors), "meta": {"a": "b"}}, script):
        for new in (True, False):
            torch.save(content, path, _use_new_zipfile_serialization=new)
            assert_equal(read_state_dict(path), tensors)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        for content in (arrays, {"model": arrays, "__author__": "somebody"}):
            path.write_bytes(pickle.dumps(content, protocol))
            assert_equal(read_state_dict(path), tensors)
    path.write_bytes(pickle.dumps({"a": np.arange(6).astype(">f4").reshape(2, 3), "b.c": np.int64(7), "half": arrays["half"]}))
    assert_equal(read_state_dict(path), tensors)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert torch.equal(found[key], value) and found[key].dtype == value.dtype
