"""ONNX files run by OpenVINO find what onnxruntime finds; int8 twins of them say what they are and what they cost."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run, mistake
from PIL import Image
from test_export import PICTURES, assert_like, files, picture, tiny  # noqa: F401

from retinanet import Predictor
from retinanet.checkpoint import save_checkpoint
from retinanet.errors import UserError
from retinanet.onnx.runtime import load_onnx

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 21 pictures, the last in a folder of it."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    for n in range(21):
        Image.fromarray(picture(45 + n, 70, n)).save(folder / ("more" if n == 20 else "") / f"{n:02}.png")
    return folder


@pytest.fixture(scope="module")
def int8(files: Any, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:  # noqa: F811
    """A function that gives the int8 twin of `files(form)`, made once."""
    from retinanet.onnx.quantize import quantize_onnx

    folder, made = tmp_path_factory.mktemp("int8"), dict[str, Path]()

    def twin(form: str) -> Path:
        if form not in made:
            made[form] = folder / f"{len(made)}.onnx"
            quantize_onnx(files(form), made[form], sorted(photos.rglob("*.png")))
        return made[form]

    return twin


def metadata(path: Path) -> dict[str, Any]:
    return {entry.key: json.loads(entry.value) for entry in onnx.load(path).metadata_props}


@pytest.mark.parametrize("form", ["nms", *(pytest.param(form, marks=pytest.mark.slow) for form in ("raw", "nms dynamic"))])
def test_openvino_finds_what_onnxruntime_finds(files: Any, form: str) -> None:  # noqa: F811
    """Alone and in batches; with NMS in the graph the threshold is an input, which OpenVINO by itself takes for a constant."""
    pytest.importorskip("openvino")
    for threshold in (None, 0.01, 0.3):
        options = {"device": "cpu", "score_threshold": threshold}
        found = Predictor.load(files(form), runtime="openvino", **options)
        expected = Predictor.load(files(form), runtime="onnxruntime", **options)
        assert_like(found(PICTURES[0]), expected(PICTURES[0]))
        for one, other in zip(found(list(PICTURES)), expected(list(PICTURES)), strict=True):
            assert_like(one, other)
    nothing = np.full((64, 64, 3), 128, np.uint8)
    above = Predictor.load(files(form), device="cpu", runtime="openvino", score_threshold=1.0)
    assert len(above(nothing)) == 0


SIGNALS = """
import gc, signal, sys
from pathlib import Path
import numpy as np, torch
from retinanet.onnx.sessions import open_session
open_two = [open_session(Path(sys.argv[1]), "openvino", torch.device("cpu"), "fp32") for _ in range(2)]
while open_two:
    del open_two[0]
    gc.collect()
blocks = [np.full(size, 7, np.uint8) for size in range(1000, 90_000, 137) for _ in range(3)]  # where freed memory was
came = []
signal.signal(signal.SIGUSR1, lambda *_: came.append(1))
for _ in range(5):
    signal.raise_signal(signal.SIGUSR1)
assert len(came) == 5 and all((block == 7).all() for block in blocks)
"""


def test_signals_do_no_harm_when_a_file_is_let_go(tmp_path: Path) -> None:
    """OpenVINO leaves the system a stack for signals that it frees with its Core: a segmentation fault, or others' memory."""
    pytest.importorskip("openvino")
    inputs, outputs = ([onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 3, 8, 8])] for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "relu", inputs, outputs)
    onnx.save(onnx.helper.make_model(graph), tmp_path / "relu.onnx")
    command = [sys.executable, "-c", SIGNALS, str(tmp_path / "relu.onnx")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_openvino_as_many_threads_as_torch(files: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    pytest.importorskip("openvino")
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        compiled = load_onnx(files("nms"), "cpu", runtime="openvino").session._compiled
        assert compiled.get_property("INFERENCE_NUM_THREADS") == threads
        assert compiled.get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"  # its own choice may be bf16


def test_bf16_is_near_and_is_not_fp32(files: Any) -> None:  # noqa: F811
    """bfloat16 has 8 significant bits: scores agree to some hundredths, but not to 1e-6."""
    pytest.importorskip("openvino")
    from retinanet.onnx.sessions import has_bf16

    if not has_bf16():
        with pytest.raises(UserError, match="this CPU does not compute in bf16"):
            load_onnx(files("nms"), "cpu", precision="bf16", runtime="openvino")
        pytest.skip("this CPU does not compute in bf16")
    lower = load_onnx(files("nms"), "cpu", precision="bf16", runtime="openvino")
    assert lower.precision == "bf16"
    batch = torch.from_numpy(picture(64, 96)).permute(2, 0, 1)[None], torch.tensor([[64, 96]])
    scores, expected = (model(*batch).scores for model in (lower, load_onnx(files("nms"), "cpu")))
    assert len(scores) == len(expected) == 100  # the most that an image has
    assert 1e-6 < float((scores - expected).abs().max()) < 0.1


def test_which_runtime(
    files: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = importlib.import_module("retinanet.onnx.sessions")
    monkeypatch.setattr(module, "_installed", lambda package: package == "onnxruntime")
    Predictor.load(files("nms"), device="cpu")
    assert f"{files('nms')}: run by onnxruntime in fp32\n" in capsys.readouterr().out
    monkeypatch.setattr(module, "_installed", lambda package: True)
    assert module.choose_runtime("auto", "cpu") == ("openvino", torch.device("cpu"))
    assert module.choose_runtime("onnxruntime", "cpu")[0] == "onnxruntime"


def test_runtime_and_int8_are_for_onnx_files(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "best.pt", tiny())
    with pytest.raises(UserError, match=r"runtime='openvino' is for ONNX files, which .*best\.pt is not"):
        Predictor.load(tmp_path / "best.pt", runtime="openvino")
    with pytest.raises(UserError, match=r"int8 takes an ONNX file, made with: .*export\.py --weights .*best\.pt .*--int8"):
        Predictor.load(tmp_path / "best.pt", precision="int8")


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("form", ["nms", pytest.param("raw dynamic", marks=pytest.mark.slow)])
def test_the_int8_twin(
    files: Any,  # noqa: F811
    int8: Any,
    capsys: pytest.CaptureFixture[str],
    form: str,
    runtime: str,
) -> None:
    """Near the fp32 file's scores: 8 bits for each of a dozen layers' inputs leave some hundredths. Other than they are."""
    pytest.importorskip(runtime)
    assert metadata(int8(form)) == metadata(files(form)) | {"precision": "int8"}
    lower = Predictor.load(int8(form), device="cpu", runtime=runtime, score_threshold=0.05)
    assert lower.precision == "int8" and "in int8\n" in capsys.readouterr().out
    exact = Predictor.load(files(form), device="cpu", runtime=runtime, score_threshold=0.05)
    found, expected = lower(PICTURES[0]), exact(PICTURES[0])
    least = min(len(found), len(expected))
    assert least > 50
    differences = (found.scores[:least] - expected.scores[:least]).abs()
    assert 1e-5 < float(differences.max()) < 0.1 and float(differences.mean()) < 0.03
    with pytest.raises(UserError, match=r"compute in int8, not in (fp32|bf16)"):
        Predictor.load(int8(form), device="cpu", runtime=runtime, precision="bf16")


def test_what_is_int8(files: Any, int8: Any) -> None:  # noqa: F811
    """All convolutions but the last of each subnet, which five levels share: 2 x 5. Their weights are a byte each."""
    graph = onnx.load(int8("nms")).graph
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    kinds = [made_by.get(node.input[1]) for node in graph.node if node.op_type == "Conv"]
    assert kinds.count(None) == 10 and set(kinds) == {None, "DequantizeLinear"}
    assert int8("nms").stat().st_size < files("nms").stat().st_size / 3


def test_calibration_sees_what_the_detector_sees(files: Any, tmp_path: Path) -> None:  # noqa: F811
    """A portrait too, which the graph's one size makes smaller."""
    from retinanet.onnx.quantize import _feeds

    model = load_onnx(files("nms"), "cpu", runtime="onnxruntime")
    paths = [tmp_path / f"{n}.png" for n in range(len(PICTURES))]
    for path, image in zip(paths, PICTURES, strict=True):
        Image.fromarray(image).save(path)
    feeds = _feeds(model, paths)
    given = [next(feeds) for _ in paths]
    seen: list[dict[str, np.ndarray]] = []
    predictor, run = Predictor.from_onnx(model), model.session.run
    model.session.run = lambda names, feed: seen.append(feed) or run(names, feed)
    predictor(list(paths))
    assert len(seen) == len(given)
    for one, other in zip(seen, given, strict=True):
        np.testing.assert_array_equal(one["images"], other["images"])
        np.testing.assert_array_equal(one["image_sizes"], other["image_sizes"])


def test_unreadable_and_too_few(files: Any, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    """21 pictures of which two are none: 19 are too few."""
    from retinanet.onnx.quantize import quantize_onnx

    paths = [*sorted(photos.rglob("*.png"))[:19], tmp_path / "gone.png", tmp_path / "text.png"]
    paths[-1].write_text("no picture")
    with pytest.raises(UserError, match=r"^19 readable pictures are too few to calibrate on: give 20 or more, better 200$"):
        quantize_onnx(files("nms"), tmp_path / "a.onnx", paths)
    said = capsys.readouterr()
    assert "warning: left out: " in said.out and "gone.png: no such file" in said.out and "text.png: not an image" in said.out
    assert "calibrate" in said.err  # the progress bar
    assert [path.name for path in tmp_path.iterdir()] == ["text.png"]
    with pytest.raises(UserError, match="int8 file already"):
        quantize_onnx(load_again(files, photos, tmp_path), tmp_path / "b.onnx", paths)


def load_again(files: Any, photos: Path, folder: Path) -> Path:  # noqa: F811
    """A file that says that it is int8."""
    from retinanet.onnx.quantize import save_ap_loss

    proto = onnx.load(files("nms"))
    onnx.helper.set_model_props(proto, {e.key: e.value for e in proto.metadata_props} | {"precision": '"int8"'})
    onnx.save(proto, folder / "int8.onnx")
    save_ap_loss(folder / "int8.onnx", 0.456)
    assert metadata(folder / "int8.onnx")["ap_loss"] == 0.46
    return folder / "int8.onnx"


@pytest.mark.slow
def test_the_tool(run_tool: Run, make_coco: Any, photos: Path, tmp_path: Path) -> None:
    """What it measures stands in the header, and whoever loads the file is told."""
    checkpoint = tiny()
    checkpoint.categories = tuple(c._replace(name=name) for c, name in zip(checkpoint.categories, ("red", "green", "x")))
    checkpoint.thresholds = {}
    save_checkpoint(tmp_path / "best.pt", checkpoint)
    data = make_coco("val", 4)
    command = ["export", "--weights", "best.pt", "--out", "a.onnx", "--int8", "--calibrate", photos]
    done = run_tool(*command, "--data", data["annotations"])
    assert done.code == 0, done
    assert "calibrating on 21 of 21 pictures" in done.out and "a.int8.onnx: 1" in done.out
    assert done.out.count(", AP50 ") == 2 and "int8 costs " in done.out
    cost = float(done.out.split("int8 costs ")[1].split()[0])
    assert metadata(tmp_path / "a.int8.onnx")["ap_loss"] == cost
    Predictor.load(tmp_path / "a.int8.onnx", device="cpu")
    again = run_tool(*command, "--pictures", "20")
    assert "calibrating on 20 of 21 pictures" in again.out and "not measured: name a data set" in again.out
    assert metadata(tmp_path / "a.int8.onnx")["ap_loss"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--int8"], "--int8 needs pictures like those to come"),
        (["--calibrate", "photos"], "--calibrate and --data go with --int8"),
        (["--int8", "--calibrate", "nowhere"], "nowhere: no such image"),
        (["--int8", "--calibrate", "photos"], "--calibrate: 3 pictures are too few: give 20 or more, better 200"),
        (["--int8", "--calibrate", "photos", "--pictures", "2"], "--calibrate: 2 pictures are too few"),
    ],
)
def test_mistakes(run_tool: Run, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "photos").mkdir()
    for n in range(3):
        Image.fromarray(picture(40, 40, n)).save(tmp_path / "photos" / f"{n}.png")
    save_checkpoint(tmp_path / "best.pt", tiny())
    assert message in mistake(run_tool("export", "--weights", "best.pt", "--out", "a.onnx", *arguments))
    assert not (tmp_path / "a.onnx").exists()
