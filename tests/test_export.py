"""ONNX files: the same detections as the checkpoint's, in every form, and no file that was not compared with it."""

import importlib
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from retinanet import Detections, Predictor
from retinanet.checkpoint import Checkpoint, save_checkpoint
from retinanet.config import InputConfig, PostprocessConfig, parse_config
from retinanet.data.images import resized_size
from retinanet.errors import UserError
from retinanet.model import RetinaNet, build_model
from retinanet.onnx.export import default_size, export_onnx
from retinanet.onnx.runtime import load_onnx
from retinanet.onnx.verify import nearest, verify_onnx
from retinanet.structures import Category, Predictions

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

TOOLS = Path(__file__).parent.parent / "tools"
GAPPED = (Category(3, "bird"), Category(17, "Käfer"), Category(90, "tooth brush"))
THRESHOLDS = {"bird": 0.1, "Käfer": 0.2}
FORMS = {"raw": {}, "raw dynamic": {"dynamic": True}, "nms": {"nms": True}, "nms dynamic": {"nms": True, "dynamic": True}}


P2_SIZES = [8, 16, 32, 48, 96, 160]


def tiny(sizes: list[float] | None = None, **postprocess: Any) -> Checkpoint:
    """Random weights; the classifier's are large and its bias low, so that hundreds of scores pass, but few are near 1."""
    config = parse_config(
        {
            "model": {
                "num_classes": 3,
                "backbone": "resnet18",
                "backbone_weights": "none",
                "norm": "batch",
                "fpn_channels": 32,
                "head_convs": 1,
                "anchors": {"sizes": sizes or [16, 32, 48, 96, 160], "scales": [1.0]},
            },
            "input": {"short_edge": 64, "long_edge": 96},
            "postprocess": postprocess,
        }
    )
    torch.manual_seed(0)
    model = build_model(config.model, config.input)
    nn.init.normal_(model.cls_subnet.final.weight, std=0.5)
    nn.init.constant_(model.cls_subnet.final.bias, -1.0)  # type: ignore[arg-type]
    nn.init.normal_(model.box_subnet.final.weight, std=0.05)
    nn.init.normal_(model.box_subnet.final.bias, std=0.05)  # type: ignore[arg-type]
    return Checkpoint(config, GAPPED, model.state_dict(), thresholds=THRESHOLDS)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that exports `tiny` in a form, once, and returns the path."""
    folder, made = tmp_path_factory.mktemp("onnx"), dict[str, Path]()

    def file(form: str, **postprocess: Any) -> Path:
        name = f"{form} {postprocess}"
        if name not in made:
            made[name] = folder / f"{len(made)}.onnx"
            differences = export_onnx(tiny(**postprocess), made[name], **FORMS[form])
            assert differences and max(differences.values()) < 1e-4
        return made[name]

    return file


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Noise in blocks of 10 pixels: something for a network to answer to."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 255, (-(-height // 10), -(-width // 10), 3), dtype=np.uint8)
    return blocks.repeat(10, axis=0).repeat(10, axis=1)[:height, :width]


PICTURES = [picture(90, 140), picture(140, 90, 1), picture(64, 64, 2), picture(200, 400, 3), picture(130, 190, 4)]


def assert_like(found: Detections, expected: Detections, least: int = 20) -> None:
    """The same objects in the same order; scores to 1e-4, boxes to a hundredth of a pixel."""
    assert len(found) == len(expected) >= least
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)
    differences = torch.cat([nearest(found, expected), nearest(expected, found)])  # equal scores may stand either way
    assert differences[:, 0].max() < 1e-4 and differences[:, 1].max() < 1e-2
    assert sorted(found.names) == sorted(expected.names) and sorted(found.category_ids) == sorted(expected.category_ids)


def torch_predictor(**options: Any) -> Predictor:
    return Predictor.from_checkpoint(tiny(), device="cpu", precision="fp32", **options)


class Padded(nn.Module):
    """The detector on images padded to one size: what a graph of that size computes."""

    def __init__(self, model: RetinaNet, size: tuple[int, int]) -> None:
        super().__init__()
        self.model, self.size, self.num_classes = model, size, model.num_classes

    def forward(self, images: Tensor, image_sizes: Tensor) -> Predictions:
        below, beside = self.size[0] - images.shape[2], self.size[1] - images.shape[3]
        return self.model(F.pad(images, (0, beside, 0, below)), image_sizes)


def padded_predictor(size: tuple[int, int] = (64, 96), **options: Any) -> Predictor:
    """What a graph of one size is held against, for pictures that fit."""
    checkpoint = tiny()
    model: Any = Padded(checkpoint.build(), size)
    options = {"input": checkpoint.config.input, "thresholds": THRESHOLDS} | options
    return Predictor(model, GAPPED, device="cpu", precision="fp32", **options)


@pytest.mark.parametrize("form", ["raw", "nms"])
def test_one_size_finds_what_the_checkpoint_finds(files: Any, form: str) -> None:
    pictures = [image for image in PICTURES if image.shape[0] <= image.shape[1]]
    for options in ({}, {"score_threshold": 0.01}, {"score_threshold": 0.3}):
        found = Predictor.load(files(form), device="cpu", **options)
        expected = padded_predictor(**options)
        for image in pictures:
            assert_like(found(image), expected(image))
        for one, other in zip(found(list(pictures), batch_size=3), expected(list(pictures), batch_size=3), strict=True):
            assert_like(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["raw dynamic", "nms dynamic"])
def test_open_sizes_find_what_the_checkpoint_finds(files: Any, form: str) -> None:
    """Alone and in batches, where the padding differs; among them a picture without detections in a batch of four."""
    for options in ({}, {"score_threshold": 0.01}, {"score_threshold": 0.3}):
        found, expected = Predictor.load(files(form), device="cpu", **options), torch_predictor(**options)
        for image in PICTURES:
            assert_like(found(image), expected(image))
        for size in (2, 4):
            for one, other in zip(found(list(PICTURES), size), expected(list(PICTURES), size), strict=True):
                assert_like(one, other)
    pictures = [PICTURES[0], np.full((64, 64, 3), 128, np.uint8), PICTURES[1], PICTURES[2]]
    best = [float(torch_predictor(score_threshold=0.0)(image).scores.max()) for image in pictures]
    assert min(best) == best[1] < sorted(best)[1] - 0.01
    between = (best[1] + sorted(best)[1]) / 2
    predictors = Predictor.load(files(form), device="cpu", score_threshold=between), torch_predictor(score_threshold=between)
    found, expected = (predictor(list(pictures)) for predictor in predictors)
    assert [len(one) for one in found] == [len(one) for one in expected]
    assert len(found[1]) == 0 and all(len(found[n]) for n in (0, 2, 3))


@pytest.mark.parametrize("form", ["raw", pytest.param("nms dynamic", marks=pytest.mark.slow)])
def test_a_detector_with_p2(form: str, tmp_path: Path) -> None:
    checkpoint, file = tiny(P2_SIZES), tmp_path / "p2.onnx"
    assert max(export_onnx(checkpoint, file, **FORMS[form]).values()) < 1e-4
    model = load_onnx(file, "cpu")
    assert model.header.strides == (4, 8, 16, 32, 64, 128)
    if form == "raw":
        out = model(torch.zeros(1, 3, 64, 96, dtype=torch.uint8), torch.tensor([[64, 96]]))
        assert out.level_sizes == [3 * n for n in (16 * 24, 8 * 12, 4 * 6, 2 * 3, 1 * 2, 1 * 1)]
    ours, theirs = Predictor.from_checkpoint(checkpoint, device="cpu", precision="fp32"), Predictor.load(file, device="cpu")
    image = picture(64, 96)  # the graph's own size
    assert_like(theirs(image), ours(image))


@pytest.mark.parametrize(
    "settings", [{"class_agnostic": True}, {"clip": "after_nms"}, {"drop_empty": False, "max_detections": 7}]
)
def test_postprocessing_inside(files: Any, settings: dict[str, Any]) -> None:
    path = files("nms", **settings)
    options = {"score_threshold": 0.05}
    found = Predictor.load(path, device="cpu", **options)
    expected = padded_predictor(postprocess=PostprocessConfig(**settings), **options)
    for image in (PICTURES[0], PICTURES[3]):
        assert_like(found(image), expected(image), least=7)
    other = padded_predictor(**options)(PICTURES[0])
    assert len(found(PICTURES[0])) != len(other) or not torch.equal(found(PICTURES[0]).labels, other.labels)  # it matters


def test_a_picture_that_does_not_fit_is_made_smaller(files: Any) -> None:
    """140 x 90 into 64 x 96: 64 / 140 limits, width 41. The checkpoint itself would make it 96 x 62."""
    assert resized_size((140, 90), 64, 96, largest=(64, 96)) == (64, 41)
    found = Predictor.load(files("raw"), device="cpu")(PICTURES[1])
    assert_like(found, padded_predictor(input=InputConfig(short_edge=41, long_edge=64))(PICTURES[1]))
    assert found.boxes[:, 3].max() > 96 and found.boxes[:, 2].max() <= 90  # in pixels of the picture
    model = load_onnx(files("raw"), "cpu")
    with pytest.raises(UserError, match="takes images up to 64x96, got 96x62"):
        model(torch.zeros(1, 3, 96, 64, dtype=torch.uint8), torch.tensor([[96, 62]]))


@pytest.mark.parametrize("size", [(64, 1), (1, 96), (1000, 10), (10, 1000), (333, 500), (500, 333), (64, 96), (65, 97)])
@pytest.mark.parametrize("rounding", ["nearest", "floor"])
def test_resized_pictures_fit(size: tuple[int, int], rounding: str) -> None:
    height, width = resized_size(size, 64, 96, rounding, largest=(64, 96))
    assert 1 <= height <= 64 and 1 <= width <= 96


def test_what_stands_in_the_file(files: Any) -> None:
    proto = onnx.load(files("nms"))
    metadata = {entry.key: json.loads(entry.value) for entry in proto.metadata_props}
    assert metadata == {
        "retinanet_format": 1,
        "class_names": ["bird", "Käfer", "tooth brush"],
        "category_ids": [3, 17, 90],
        "input": InputConfig(short_edge=64, long_edge=96).model_dump(exclude={"mean", "std"}),
        "thresholds": {"bird": 0.1, "Käfer": 0.2},
        "postprocess": PostprocessConfig().model_dump(),
        "nms": True,
        "strides": [8, 16, 32, 64, 128],
        "precision": "fp32",
        "ap_loss": None,
    }
    onnx.checker.check_model(proto, full_check=True)
    assert {entry.domain for entry in proto.opset_import} == {""} and proto.opset_import[0].version >= 18
    content = files("nms").read_bytes()
    assert b".py" not in content and str(Path.home()).encode() not in content  # the exporter would note where code lies


def shapes(values: Any) -> dict[str, Any]:
    return {value.name: (value.type, value.shape) for value in values}


@pytest.mark.parametrize(
    ("form", "batch"),
    [("raw", [1, 64, 96, 387]), pytest.param("raw dynamic", ["batch", "height", "width", "anchors"], marks=pytest.mark.slow)],
)
def test_inputs_and_raw_outputs(files: Any, form: str, batch: list[Any]) -> None:
    """Anchors of 64 x 96: 3 * (8 * 12 + 4 * 6 + 2 * 3 + 1 * 2 + 1 * 1) = 387."""
    session = runtime.InferenceSession(files(form))
    b, h, w, r = batch
    assert shapes(session.get_inputs()) == {
        "images": ("tensor(uint8)", [b, 3, h, w]),
        "image_sizes": ("tensor(int64)", [b, 2]),
    }
    assert shapes(session.get_outputs()) == {
        "cls_logits": ("tensor(float)", [b, r, 3]),
        "box_deltas": ("tensor(float)", [b, r, 4]),
        "anchors": ("tensor(float)", [r, 4]),
    }


def test_final_detections_without_this_project(files: Any) -> None:
    session = runtime.InferenceSession(files("nms"))
    assert [value.name for value in session.get_inputs()] == ["images", "image_sizes"]
    image = np.zeros((1, 3, 64, 96), np.uint8)
    image[0, :, :62] = picture(62, 96).transpose(2, 0, 1)
    feeds = {"images": image, "image_sizes": np.array([[62, 96]])}
    image_index, boxes, scores, labels = session.run(None, feeds)
    assert len(scores) == 100 and boxes.shape == (100, 4)
    assert image_index.dtype == labels.dtype == np.int64 and not image_index.any() and set(labels) <= {0, 1, 2}
    assert (np.diff(scores) <= 0).all() and scores.min() > 0.05
    assert boxes.min() >= 0 and boxes[:, [0, 2]].max() <= 96 and boxes[:, [1, 3]].max() <= 62
    nothing = session.run(None, feeds | {"score_threshold": np.array([1.0], np.float32)})
    assert [value.shape for value in nothing] == [(0,), (0, 4), (0,), (0,)]


@pytest.mark.slow
def test_several_images_are_sorted_by_image_then_score(files: Any) -> None:
    session = runtime.InferenceSession(files("nms dynamic"))
    images = np.stack([picture(128, 160, seed).transpose(2, 0, 1) for seed in range(4)])
    image_index, _, scores, _ = session.run(None, {"images": images, "image_sizes": np.array([[128, 160]] * 4)})
    assert (np.diff(image_index) >= 0).all() and np.bincount(image_index).tolist() == [100] * 4
    assert all((np.diff(scores[image_index == n]) <= 0).all() for n in range(4))


def tamper(path: Path, new: Path, name: str, change: Any) -> Path:
    proto = onnx.load(path)
    tensor = next(entry for entry in proto.graph.initializer if name in entry.name)
    tensor.CopyFrom(onnx.numpy_helper.from_array(change(onnx.numpy_helper.to_array(tensor).copy()), tensor.name))
    onnx.save(proto, new)
    return new


def more(values: np.ndarray) -> np.ndarray:
    values.flat[0] += 0.1
    return values


@pytest.mark.parametrize("form", ["raw", "nms"])
@pytest.mark.parametrize(
    ("name", "change", "outputs"),
    [
        ("cls_subnet.final.bias", more, "cls_logits"),
        ("box_subnet.final.bias", more, "box_deltas"),
        ("backbone.layer1.0.conv1.weight", np.negative, "cls_logits"),
        ("cls_subnet.final.bias", lambda values: values * np.float32("nan"), "cls_logits"),
    ],
)
def test_a_changed_weight_is_found(files: Any, tmp_path: Path, form: str, name: str, change: Any, outputs: str) -> None:
    path = tamper(files(form), tmp_path / "changed.onnx", name, change)
    message = rf"does not compute what the checkpoint does: .*{outputs if form == 'raw' else 'have no like'}"
    with pytest.raises(UserError, match=message) as error:
        verify_onnx(path, tiny())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "value"), [("nms_iou", 0.4), ("nms_limit", 90), ("score_threshold", 0.9)])
def test_a_changed_setting_is_found(files: Any, tmp_path: Path, name: str, value: float) -> None:
    path = tamper(files("nms"), tmp_path / "changed.onnx", name, lambda values: np.full_like(values, value))
    with pytest.raises(UserError, match="does not compute what the checkpoint does"):
        verify_onnx(path, tiny())


def test_a_file_of_another_checkpoint_is_found(files: Any) -> None:
    with pytest.raises(UserError, match="not made from this checkpoint: its metadata differ"):
        verify_onnx(files("raw"), tiny(max_detections=99))


def test_a_wrong_graph_does_not_get_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here boxes are a pixel off; an older file of that name stays as it was."""
    module = importlib.import_module("retinanet.onnx.export")
    right = module.decode_boxes
    monkeypatch.setattr(module, "decode_boxes", lambda *given, **options: right(*given, **options) + 1)
    (tmp_path / "a.onnx").write_text("old")
    with pytest.raises(
        UserError, match=r"a\.onnx\.unverified does not compute .* detections have no like, the nearest .* pixels"
    ):
        export_onnx(tiny(), tmp_path / "a.onnx", nms=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx", "a.onnx.unverified"]
    assert (tmp_path / "a.onnx").read_text() == "old"


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"postprocess\.nms soft cannot .* without --nms"):
        export_onnx(tiny(nms="soft"), tmp_path / "a.onnx", nms=True)
    with pytest.raises(UserError, match="one size or any"):
        export_onnx(tiny(), tmp_path / "a.onnx", dynamic=True, size=(64, 64))
    for size in ((64, 100), (0, 64), (-32, 64)):
        with pytest.raises(UserError, match=f"must be multiples of 32, got {size[0]}x{size[1]}"):
            export_onnx(tiny(), tmp_path / "a.onnx", size=size)
    assert not list(tmp_path.iterdir())


def test_the_size_of_a_landscape_picture() -> None:
    assert default_size(InputConfig()) == (800, 1344)  # 800 and 1333, rounded up to 32
    assert default_size(InputConfig(short_edge=600, long_edge=400)) == (416, 416)  # no side exceeds the long edge


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # what `import` takes for not installed
    message = f"{package} is missing: pip install onnx onnxscript onnxruntime"
    with pytest.raises(UserError, match=message):
        export_onnx(tiny(), tmp_path / "a.onnx")
    if package == "onnxruntime":
        with pytest.raises(UserError, match=message):
            Predictor.load(tmp_path / "a.onnx", runtime="onnxruntime")


def test_running_a_file_takes_onnxruntime_only(files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("onnx", "onnxscript"):
        monkeypatch.setitem(sys.modules, package, None)
    assert len(Predictor.load(files("nms"), device="cpu", runtime="onnxruntime")(PICTURES[0])) > 20


def test_an_older_torch_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.8.1+cpu")
    with pytest.raises(UserError, match=r"needs torch 2\.9, not 2\.8\.1"):
        export_onnx(tiny(), tmp_path / "a.onnx")


def with_metadata(path: Path, new: Path, **changes: str) -> Path:
    proto = onnx.load(path)
    metadata = {entry.key: entry.value for entry in proto.metadata_props} | changes
    onnx.helper.set_model_props(proto, {key: value for key, value in metadata.items() if value})
    onnx.save(proto, new)
    return new


def test_what_is_no_file_of_ours(files: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"

    def mistake() -> str:
        with pytest.raises(UserError) as error:
            Predictor.load(path, device="cpu")
        assert "\n" not in str(error.value) and "a.onnx" in str(error.value)
        return str(error.value)

    assert "do not exist" in mistake()
    path.mkdir()
    assert "cannot be read: Is a directory" in mistake()
    path.rmdir()
    path.write_bytes(b"")
    assert "the file is empty" in mistake()
    content = files("raw").read_bytes()
    for length in (1, 100, 100_000, len(content) // 2, len(content) - 700):
        path.write_bytes(content[:length])
        assert "damaged, or not an ONNX file" in mistake() or "is no detector of this project" in mistake()
    Image.new("RGB", (64, 64)).save(path, format="png")
    assert "damaged, or not an ONNX file" in mistake()
    path.write_text("<html>")
    assert "damaged, or not an ONNX file" in mistake()
    other = onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 18]> g (float[N] x) => (float[N] y) { y = Relu(x) }')
    onnx.save(other, path)
    assert "is no detector of this project (it lacks 'retinanet_format')" in mistake()
    onnx.helper.set_model_props(other, {entry.key: entry.value for entry in onnx.load(files("raw")).metadata_props})
    onnx.save(other, path)
    assert "inputs or outputs are not those" in mistake()
    for changes, message in [
        ({"retinanet_format": "2"}, "written by a newer version of this project (format 2)"),
        ({"retinanet_format": "x"}, "its metadata are damaged"),
        ({"class_names": "[]"}, "its metadata are damaged"),
        ({"thresholds": "7"}, "its metadata are damaged"),
        ({"postprocess": '{"nms": "firm"}'}, "its metadata are damaged"),
        ({"nms": ""}, "its metadata are damaged"),
        ({"nms": "true"}, "inputs or outputs are not those"),
    ]:
        with_metadata(files("raw"), path, **changes)
        assert message in mistake()


def test_what_an_onnx_file_cannot_do(files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"compute in fp32 with onnxruntime: bf16 takes OpenVINO \(pip install openvino\)"):
        Predictor.load(files("nms"), device="cpu", precision="bf16", runtime="onnxruntime")
    with pytest.raises(UserError, match="compute in fp32, not in fp16"):
        Predictor.load(files("nms"), device="cpu", precision="fp16")
    with pytest.raises(UserError, match=r"compute in fp32: an int8 file comes from tools/export\.py --int8 --calibrate PHOTOS"):
        Predictor.load(files("nms"), device="cpu", precision="int8")
    with pytest.raises(UserError, match="no runtime 'tensorrt': expected auto, openvino, onnxruntime"):
        Predictor.load(files("nms"), device="cpu", runtime="tensorrt")
    with pytest.raises(UserError, match="there is no device 'gpu'"):
        Predictor.load(files("nms"), device="gpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    if "CUDAExecutionProvider" not in runtime.get_available_providers():
        with pytest.raises(UserError, match="pip install onnxruntime-gpu"):
            Predictor.load(files("nms"), device="cuda")
        with pytest.raises(UserError, match="OpenVINO runs on the CPU only"):
            Predictor.load(files("nms"), device="cuda", runtime="openvino")
        assert Predictor.load(files("nms")).device == torch.device("cpu")
    with pytest.raises(UserError, match="NMS inside, with settings of its own: export it without --nms"):
        Predictor(load_onnx(files("nms"), "cpu"), GAPPED, device="cpu", postprocess=PostprocessConfig(nms_threshold=0.6))
    with pytest.raises(UserError, match=r"fails on images \[1, 3, 32, 32\]"):
        model = load_onnx(files("raw"), "cpu")
        model.input_size = None  # as if it were of any size
        model(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), torch.tensor([[32, 32]]))


def run(monkeypatch: pytest.MonkeyPatch, tool: str, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", [str(TOOLS / f"{tool}.py"), *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(sys.argv[0], run_name="__main__")
    return int(ended.value.code or 0)


def in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that is fast at bf16 the checkpoint would be computed in that."""
    monkeypatch.setattr(importlib.import_module("retinanet.predictor"), "choose_precision", lambda asked, device: "fp32")


def assert_same_results(one: Path, other: Path, least: int) -> None:
    """The same entries but for rounding: scores to 1e-4, boxes to a hundredth of a pixel."""
    ours, theirs = (json.loads((folder / "detections.json").read_text(encoding="utf-8")) for folder in (one, other))
    assert len(ours) == len(theirs) >= least
    for entries in (ours, theirs):
        entries.sort(key=lambda entry: (entry["image_id"], entry["category_id"], round(entry["score"], 3), entry["bbox"]))
    for a, b in zip(ours, theirs, strict=True):
        assert {**a, "score": 0, "bbox": 0} == {**b, "score": 0, "bbox": 0}
        assert a["score"] == pytest.approx(b["score"], abs=1e-4) and a["bbox"] == pytest.approx(b["bbox"], abs=1e-2)


@pytest.mark.parametrize("form", [[], ["--nms"], pytest.param(["--nms", "--dynamic"], marks=pytest.mark.slow)])
def test_the_tools(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], form: list[str]
) -> None:
    save_checkpoint(tmp_path / "best.pt", tiny())
    monkeypatch.chdir(tmp_path)
    in_fp32(monkeypatch)
    assert run(monkeypatch, "export", "--weights", "best.pt", "--out", "new/a.onnx", *form) == 0
    said = capsys.readouterr()
    assert "new/a.onnx: 4" in said.out and "image_sizes" in said.out and said.err == ""
    assert "the largest differences: " + ("scores" if form else "cls_logits") in said.out
    (tmp_path / "photos").mkdir()
    for n in range(3):
        Image.fromarray(picture(90, 140, n)).save(tmp_path / "photos" / f"{n}.png")
    for weights, out in (("best.pt", "one"), ("new/a.onnx", "other")):
        assert run(monkeypatch, "predict", "photos", "--weights", weights, "--out", out, "--device", "cpu") == 0
    assert_same_results(tmp_path / "one", tmp_path / "other", 60)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "a.pt", "--out", "a.onnx"], "weights a.pt do not exist"),
        (["--weights", "a.pt", "--out", "a.pb"], "--out a.pb: the name of an ONNX file ends in .onnx"),
        (["--weights", "best.pt", "--out", "a.onnx", "--size", "64", "65"], "must be multiples of 32, got 64x65"),
        (["--weights", "best.pt", "--out", "a.onnx", "--size", "64", "64", "--dynamic"], "give --size or --dynamic"),
        (["--weights", "best.pt", "--out", "a.onnx", "--nms"], "postprocess.nms soft cannot"),
    ],
)
def test_mistakes_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    save_checkpoint(tmp_path / "best.pt", tiny(nms="soft"))
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "export", *arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]
