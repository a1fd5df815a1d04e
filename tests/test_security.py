"""What docs/security.md promises of weights, annotations, configs and names, with hostile files."""

import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile import needs_linux, refusal, within

from retinanet.backbone import ResNetBackbone, load_backbone_weights
from retinanet.bounded import LARGEST_JSON, read_bounded
from retinanet.checkpoint import load_checkpoint
from retinanet.config import load_config
from retinanet.data.annotations import Annotations
from retinanet.data.coco import check_file_name, load_coco
from retinanet.data.files import read_yaml
from retinanet.data.formats import load_path
from retinanet.data.images import read_image
from retinanet.data.transforms import build_pipeline
from retinanet.data.voc import load_voc
from retinanet.distributed import say
from retinanet.errors import UserError, command_line, printable
from retinanet.onnx.runtime import OnnxHeader, load_onnx
from retinanet.results import read_entries
from retinanet.structures import Category
from retinanet.weights.files import read_state_dict
from retinanet.weights.zoo import load_weights

ESCAPE = "\x1b]0;owned\x07"  # sets the title of a terminal


class Calls:
    """Pickled as a call of `function`."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


# --- weights


@needs_linux
@pytest.mark.parametrize(
    "value",
    [
        Calls(np.ndarray, (1,), "O", b"AAAAAAAA"),  # an object at the address 0x4141414141414141
        Calls(np.ndarray, (10**6, 10**6), "f4", b"0000", 0, (0, 0)),  # one number, shown 10^12 times
        Calls(np.ndarray, (10**9,), "f4"),  # 4 GB of what lay in memory before
    ],
    ids=["pointer", "strides", "size"],
)
def test_a_pickled_array_is_no_more_than_its_bytes(tmp_path: Path, value: object) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": value}))
    assert "is a damaged pickle" in within(lambda: read_state_dict(tmp_path / "a.pkl"))


@needs_linux
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x80\x02K\x01r\xff\xff\xff\x0f.", "is not a state dict"),  # a number is noted as the 2^28th: 2 GB for the others
        (b"\x80\x05\x96" + (2 << 30).to_bytes(8, "little") + b".", "(EOFError)"),  # "here come 2 GB"
    ],
    ids=["memo", "bytes"],
)
def test_a_short_pickle_takes_little_memory(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.pkl").write_bytes(content)
    assert reason in within(lambda: read_state_dict(tmp_path / "a.pkl"))


def test_tensors_hold_no_more_than_their_file(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "a.pth")
    assert "claim more numbers than the file holds" in refusal(lambda: read_state_dict(tmp_path / "a.pth"))


READERS: dict[str, Callable[[Path], object]] = {
    "checkpoint": load_checkpoint,
    "other project's": read_state_dict,
    "backbone": lambda path: load_backbone_weights(ResNetBackbone("resnet18"), "resnet18", str(path)),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_zip_bomb_is_not_unfolded(tmp_path: Path, reader: str) -> None:
    """64 MB of zeros, in 64 kB: torch's own reader would unfold them."""
    torch.save({"a": torch.zeros(1 << 24)}, tmp_path / "flat.pt")
    with (
        zipfile.ZipFile(tmp_path / "flat.pt") as flat,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for member in flat.infolist():
            bomb.writestr(member.filename, flat.read(member))
    assert torch.load(tmp_path / "bomb.pt", weights_only=True)["a"].nbytes > 500 * (tmp_path / "bomb.pt").stat().st_size
    assert "BadZipFile" in refusal(lambda: READERS[reader](tmp_path / "bomb.pt"))


def test_weights_are_fetched_by_names_of_the_table_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib.request.OpenerDirector.open", lambda *_, **__: pytest.fail("it was fetched"))
    for source in ("https://example.com/best.pt", "file:///etc/passwd", "example.com/best"):
        assert "do not exist" in refusal(lambda source=source: load_weights(source))


# --- ONNX


@pytest.mark.parametrize("place", ["../secret.bin", "/etc/passwd", "evil.domain"])
def test_an_onnx_file_reaches_no_other_file_and_no_library(tmp_path: Path, place: str) -> None:
    """Weights kept in a file beside it, and operators of a library."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    folder = tmp_path / "model"
    folder.mkdir()
    np.arange(4, dtype=np.float32).tofile(tmp_path / "secret.bin")
    weight = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[4])
    if place == "evil.domain":
        weight.raw_data = bytes(16)
    else:
        weight.data_location = onnx.TensorProto.EXTERNAL
        weight.external_data.add(key="location", value=place)
    node = onnx.helper.make_node("Identity", ["w"], ["y"], domain=place if place == "evil.domain" else "")
    out = onnx.helper.make_tensor_value_info("y", 1, [4])
    imports = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("evil.domain", 1)]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", [], [out], [weight]), opset_imports=imports, ir_version=8
    )
    (folder / "x.onnx").write_bytes(model.SerializeToString())
    assert "are damaged, or not an ONNX file" in refusal(lambda: load_onnx(folder / "x.onnx"))


# --- YAML, JSON, CSV and text


@pytest.mark.parametrize("read", [load_config, read_yaml], ids=["config", "data.yaml"])
def test_yaml_calls_nothing(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    """Read as a program, the file would make a folder; read as data it is refused, or plain text."""
    file = tmp_path / "a.yaml"
    file.write_text(f"seed: !!python/object/apply:os.mkdir [{tmp_path / 'made'}]\n")
    if read is load_config:
        assert "could not determine a constructor" in refusal(lambda: read(file))
    else:
        assert read(file) == {"seed": [str(tmp_path / "made")]}
    assert not (tmp_path / "made").exists()


LAUGHS = "x0: &x0 {a: 1}\n" + "".join(f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]\n" for n in range(1, 12))


@needs_linux
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (LAUGHS + "augment: {transforms: [{Blur: {p: *x11}}]}", "its references stand for more than"),  # 9^11 values
        ("augment: {transforms: [{Blur: &x {p: *x}}]}", "its references stand for more than"),  # a value in itself
        ("a: " + "[" * 2000, "recursion"),
        ("seed: 2001-99-99", "month must be in 1..12"),
        ("seed: " + "9" * 5000, "4300 digits"),
        ("seed: [" + "1, " * 400_000 + "1]", "larger than 1 MB"),
        ("seed: " + "x" * 100_000, "unable to parse string as an integer"),
    ],
    ids=["references", "itself", "nesting", "date", "digits", "size", "long value"],
)
def test_a_config_is_bounded(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "a.yaml").write_text(content)
    assert reason in within(lambda: load_config(tmp_path / "a.yaml"))


def sparse(file: Path, size: int) -> Path:
    """A file of `size` bytes that takes no room on the disk."""
    file.parent.mkdir(exist_ok=True)
    with file.open("wb") as stream:
        stream.truncate(size)
    return file


@needs_linux
@pytest.mark.parametrize(
    ("name", "size", "read"),
    [
        ("a.json", LARGEST_JSON, lambda file: load_coco(file, file.parent)),
        ("results.json", LARGEST_JSON, read_entries),
        ("a.csv", 1 << 30, load_path),
        ("a.txt", 64 << 20, load_path),
        ("data.yaml", 4 << 20, load_path),
        ("config.yaml", 1 << 20, load_config),
        ("Annotations/a.xml", 8 << 20, lambda file: load_voc(file.parent.parent)),
    ],
)
def test_a_file_too_large_for_its_kind_is_not_read(
    tmp_path: Path, name: str, size: int, read: Callable[[Path], object]
) -> None:
    (tmp_path / "classes.txt").write_text("a")
    file = sparse(tmp_path / name, size + 1)
    assert f"{file}: larger than {size >> 20} MB" in within(lambda: read(file))


@needs_linux
def test_what_is_no_file_is_neither_waited_for_nor_read_without_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.json")
    os.mkfifo(tmp_path / "a.png")
    assert "is a pipe" in within(lambda: load_coco(tmp_path / "a.json", tmp_path))
    assert "a pipe" in within(lambda: read_image(tmp_path / "a.png"))
    assert "larger than 1 MB" in within(lambda: read_bounded(Path("/dev/zero"), 1 << 20))


# --- configs


@pytest.mark.parametrize(
    "entry",
    ["Lambda", {"Lambda": {"name": "x", "image": "os.system"}}, {"OneOf": {"transforms": ["Lambda"]}}, "from_dict", "os"],
)
def test_augmentation_is_transforms_alone(entry: Any) -> None:
    assert "albumentations has no transform" in refusal(lambda: build_pipeline([entry], 0.1))


# --- names


@pytest.mark.parametrize("name", ["a\x1b[2J.jpg", "a\x9b2J.jpg", "a\x7f.jpg", "a\n.jpg", "../a.jpg", "/a.jpg", "a/../../b.jpg"])
def test_a_data_set_names_only_its_own_files_and_in_plain_letters(name: str) -> None:
    message = refusal(lambda: check_file_name(name, "a.json: image id 1"))
    assert "must be a path inside the image folder" in message and printable(message) == message


def coco_file(folder: Path) -> Path:
    categories = [{"id": 1, "name": ESCAPE}]
    (folder / "a.json").write_text(
        json.dumps({"images": [{"id": 1, "file_name": "a"}], "annotations": [], "categories": categories})
    )
    return folder / "a.json"


def header() -> OnnxHeader:
    metadata = {"retinanet_format": 1, "class_names": [ESCAPE], "category_ids": [1]}
    return OnnxHeader.from_metadata({key: json.dumps(value) for key, value in metadata.items()}, "a.onnx")


def checkpoint_file(folder: Path) -> Path:
    content: dict[str, Any] = {key: {} for key in ("model", "ema", "thresholds", "training")}
    torch.save(content | {"format": 1, "config": {}, "categories": [{"id": 1, "name": ESCAPE}]}, folder / "a.pt")
    return folder / "a.pt"


NAMERS: dict[str, Callable[[Path], object]] = {
    "data set": lambda folder: load_coco(coco_file(folder), folder),
    "any reader": lambda folder: Annotations.pack("a.csv", folder, [Category(1, ESCAPE)], [], []),
    "checkpoint": lambda folder: load_checkpoint(checkpoint_file(folder)),
    "ONNX": lambda folder: header(),
}


@pytest.mark.parametrize("namer", NAMERS)
def test_names_of_classes_do_not_speak_to_the_terminal(tmp_path: Path, namer: str) -> None:
    message = refusal(lambda: NAMERS[namer](tmp_path))
    assert "has control characters" in message and printable(message) == message


def test_what_is_said_does_not_speak_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Names of files that a user's own folder holds can be anything."""

    @command_line
    def main() -> None:
        say(f"warning: {ESCAPE}")
        raise UserError(f"{ESCAPE}\nerror: all is lost")

    with pytest.raises(SystemExit):
        main()
    captured = capsys.readouterr()
    assert captured.out == "warning: \\x1b]0;owned\\x07\n"
    assert captured.err == "error: \\x1b]0;owned\\x07\\nerror: all is lost\n"


# --- the document


def test_the_document_names_tests_that_exist() -> None:
    tests = {
        name for file in Path(__file__).parent.glob("test_*.py") for name in re.findall(r"def (test_\w+)", file.read_text())
    }
    document = (Path(__file__).parents[1] / "docs" / "security.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", document)) - {file.stem for file in Path(__file__).parent.glob("test_*.py")}
    assert len(named) > 20 and named <= tests, named - tests
