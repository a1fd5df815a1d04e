"""The front door: any kind of picture in, the same detections out, in the picture's own pixels."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from retinanet import Detections, Predictor, RetinaNet
from retinanet.anchors import AnchorGenerator
from retinanet.boxes import encode_boxes
from retinanet.checkpoint import Checkpoint, save_checkpoint
from retinanet.config import InputConfig, PostprocessConfig, parse_config
from retinanet.data.images import UnreadableImageError
from retinanet.errors import UserError
from retinanet.onnx.runtime import OnnxHeader, OnnxModel
from retinanet.structures import Category, Predictions

GAPPED = (Category(3, "bird"), Category(17, "cup"), Category(90, "tooth brush"))
INPUT = InputConfig(short_edge=64, long_edge=96)


def tiny_model() -> RetinaNet:
    """Random weights; the classifier's are large, so that some of its scores pass any threshold."""
    torch.manual_seed(1)
    anchors = AnchorGenerator([8, 16, 32, 64, 128], [1.0])
    model = RetinaNet(3, "resnet18", norm="batch", fpn_channels=32, head_convs=1, anchors=anchors)
    nn.init.normal_(model.cls_subnet.final.weight, std=0.5)
    nn.init.zeros_(model.cls_subnet.final.bias)  # type: ignore[arg-type]
    nn.init.normal_(model.box_subnet.final.weight, std=0.05)
    return model


@pytest.fixture(scope="module")
def model() -> RetinaNet:
    return tiny_model()


def predictor_of(model: nn.Module, **options: Any) -> Predictor:
    return Predictor(model, GAPPED, input=INPUT, device="cpu", precision="fp32", **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def predictor(model: RetinaNet) -> Predictor:
    return predictor_of(model, score_threshold=0.3)


def picture(height: int = 90, width: int = 140, seed: int = 0) -> np.ndarray:
    """Noise in blocks of 10 pixels: something for a network to answer to."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 255, (height // 10, width // 10, 3), dtype=np.uint8)
    return blocks.repeat(10, axis=0).repeat(10, axis=1)


def assert_same(one: Detections, other: Detections, atol: float = 0.0) -> None:
    assert len(one) == len(other) > 5  # or nothing would be compared
    np.testing.assert_allclose(one.boxes.numpy(), other.boxes.numpy(), atol=atol)
    np.testing.assert_allclose(one.scores.numpy(), other.scores.numpy(), atol=atol)
    assert one.names == other.names and one.category_ids == other.category_ids


@pytest.mark.parametrize(
    "kind", ["path", "text", "PIL", "array", "RGBA array", "uint8 tensor", "float tensor", "half tensor", "strided array"]
)
def test_every_kind_of_input_gives_the_same(predictor: Predictor, tmp_path: Path, kind: str) -> None:
    array = picture()
    file = tmp_path / "a.png"
    Image.fromarray(array).save(file)
    chw = torch.from_numpy(array).permute(2, 0, 1)
    given: Any = {
        "path": file,
        "text": str(file),
        "PIL": Image.fromarray(array),
        "array": array,
        "RGBA array": np.dstack([array, np.full(array.shape[:2], 255, np.uint8)]),
        "uint8 tensor": chw,
        "float tensor": chw / 255,
        "half tensor": chw.half() / 255,
        "strided array": array[:, :, ::-1].copy()[:, :, ::-1],  # what reversing OpenCV's BGR gives: a negative stride
    }[kind]
    assert_same(predictor(given), predictor(array))


@pytest.mark.parametrize("shape", [(90, 140), (90, 140, 1)])
def test_grey_is_three_equal_channels(predictor: Predictor, shape: tuple[int, ...]) -> None:
    grey = picture()[:, :, 0]
    expected = predictor(grey[:, :, None].repeat(3, axis=2))
    assert_same(predictor(grey.reshape(shape)), expected)
    assert_same(predictor(Image.fromarray(grey)), expected)


def test_a_list_gives_a_list(predictor: Predictor, tmp_path: Path) -> None:
    array = picture()
    Image.fromarray(array).save(tmp_path / "a.png")
    found = predictor([tmp_path / "a.png", array, Image.fromarray(array)], batch_size=1)
    assert isinstance(found, list) and len(found) == 3
    for detections in found:
        assert_same(detections, predictor(array))
    assert predictor([]) == []
    assert len(predictor([array])) == 1


def test_a_batch_gives_what_single_pictures_give(predictor: Predictor) -> None:
    """Pictures of one size, and so of equal padding; 5 of them in batches of 2 leave a last batch of 1."""
    arrays = [picture(seed=seed) for seed in range(5)]
    for size in (2, 5, 8):
        together = predictor(list(arrays), batch_size=size)
        for array, detections in zip(arrays, together, strict=True):
            assert_same(detections, predictor(array), atol=1e-3)


def test_the_stream_is_lazy_and_in_order(predictor: Predictor) -> None:
    """A folder of pictures must not be in memory at once: a batch is read when its turn comes."""
    arrays = [picture(seed=seed) for seed in range(4)]
    read = list[int]()

    def reading() -> Any:
        for n, array in enumerate(arrays):
            read.append(n)
            yield array

    stream = predictor.stream(reading(), batch_size=2)
    assert read == []
    assert_same(next(stream), predictor(arrays[0]), atol=1e-3)
    assert read == [0, 1]
    for array, detections in zip(arrays[1:], stream, strict=True):
        assert_same(detections, predictor(array), atol=1e-3)


def test_inference_mode_does_not_leak(predictor: Predictor) -> None:
    """Between two pictures of a stream the caller's own tensors must keep their gradients."""
    for detections in predictor.stream([picture(), picture(seed=1)], batch_size=1):
        assert not torch.is_inference_mode_enabled()
        weight = torch.ones(3, requires_grad=True)
        (weight * 2).sum().backward()
        assert weight.grad is not None
        detections.boxes.mul_(2)  # an inference tensor would refuse this


class Answer(nn.Module):
    """A detector that always gives the same boxes, in pixels of the resized picture, and remembers what it was given."""

    def __init__(self, boxes: list[list[float]], logits: list[list[float]]) -> None:
        super().__init__()
        self.num_classes = 3
        self.boxes, self.logits = torch.tensor(boxes), torch.tensor(logits)
        self.given: list[tuple[Tensor, Tensor]] = []

    def forward(self, images: Tensor, image_sizes: Tensor) -> Predictions:
        self.given.append((images, image_sizes))
        anchors = torch.tensor([[0.0, 0.0, 32.0, 32.0]]).expand(len(self.boxes), 4)
        deltas = encode_boxes(self.boxes, anchors)
        batch = len(images)
        return Predictions(self.logits.expand(batch, -1, -1), deltas.expand(batch, -1, -1), anchors, [len(self.boxes)])


def logits(*probabilities: float) -> list[list[float]]:
    """One box per probability, each of another class (0, 1, 2); all other scores are 0."""
    rows = torch.full((len(probabilities), 3), -30.0)
    for n, probability in enumerate(probabilities):
        rows[n, n] = torch.logit(torch.tensor(probability, dtype=torch.float64))
    return rows.tolist()


@pytest.mark.parametrize(
    ("size", "resized", "expected"),
    [
        # height 200 -> 48, width 400 -> 96: the longer side limits, 96 / 400 = 0.24; 1 / 0.24 = 4.1667
        ((200, 400), (48, 96), [50, 100 / 3, 150, 100]),
        # height 400 -> 85 (85.33), width 300 -> 64: the shorter side limits, and the factors differ by the rounding
        ((400, 300), (85, 64), [12 * 300 / 64, 8 * 400 / 85, 36 * 300 / 64, 24 * 400 / 85]),
        # 32 x 32 -> 64 x 64: enlarged by 2
        ((32, 32), (64, 64), [6, 4, 18, 12]),
        # 130 x 190 -> 64 x 94 (93.54)
        ((130, 190), (64, 94), [12 * 190 / 94, 8 * 130 / 64, 36 * 190 / 94, 24 * 130 / 64]),
    ],
)
def test_boxes_are_in_pixels_of_the_original(size: tuple[int, int], resized: tuple[int, int], expected: list[float]) -> None:
    answer = Answer([[12.0, 8.0, 36.0, 24.0]], logits(0.9))
    found = predictor_of(answer)(np.zeros((*size, 3), np.uint8))
    images, image_sizes = answer.given[0]
    assert tuple(image_sizes[0].tolist()) == resized
    assert all(side % 32 == 0 for side in images.shape[2:])
    np.testing.assert_allclose(found.boxes.numpy(), [expected], rtol=1e-5)


def test_boxes_end_at_the_border() -> None:
    """Also in a batch whose other pictures are larger: the border is the picture's, not the padding's."""
    answer = Answer([[-20.0, -10.0, 300.0, 300.0]], logits(0.9))
    found = predictor_of(answer)([np.zeros((200, 400, 3), np.uint8), np.zeros((400, 300, 3), np.uint8)])
    np.testing.assert_allclose(found[0].boxes.numpy(), [[0, 0, 400, 200]], rtol=1e-6)
    np.testing.assert_allclose(found[1].boxes.numpy(), [[0, 0, 300, 400]], rtol=1e-6)


def test_a_photo_turned_by_its_exif_tag(predictor: Predictor, tmp_path: Path) -> None:
    """Orientation 6: the camera stored the picture turned left by 90 degrees. Boxes are those of the upright one."""
    upright = picture(90, 140)
    Image.fromarray(upright).save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.ascontiguousarray(np.rot90(upright))).save(tmp_path / "turned.png", exif=exif)
    found = predictor(tmp_path / "turned.png")
    assert_same(found, predictor(upright))
    assert found.boxes[:, 2].max() > 90  # beyond the stored picture's width: these are not its pixels
    with Image.open(tmp_path / "turned.png") as image:
        assert image.size == (90, 140)  # width, height
        assert_same(predictor(image), found)


BOXES = [[0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0], [40.0, 40.0, 50.0, 50.0]]
SQUARE = np.zeros((64, 64, 3), np.uint8)


def names_found(scores: tuple[float, float, float], **options: Any) -> list[str]:
    return predictor_of(Answer(BOXES, logits(*scores)), **options)(SQUARE).names


def test_thresholds_of_each_class() -> None:
    """Those of the checkpoint for bird (0.2) and cup (0.8); a class without one has 0.5."""
    known = {"bird": 0.2, "cup": 0.8}
    assert names_found((0.21, 0.79, 0.51), thresholds=known) == ["tooth brush", "bird"]  # best first
    assert names_found((0.19, 0.81, 0.49), thresholds=known) == ["cup"]
    assert names_found((0.51, 0.49, 0.49)) == ["bird"]  # none known: 0.5 everywhere


def test_a_number_wins_over_thresholds_of_classes() -> None:
    known = {"bird": 0.2, "cup": 0.8, "tooth brush": 0.9}
    assert names_found((0.31, 0.32, 0.29), thresholds=known, score_threshold=0.3) == ["cup", "bird"]
    assert names_found((0.21, 0.99, 0.99), thresholds=known, score_threshold=0.95) == ["cup", "tooth brush"]


def test_a_number_below_the_postprocessing_threshold() -> None:
    """Which drops everything up to 0.05 by default, and here up to 0.4."""
    assert names_found((0.02, 0.9, 0.001), score_threshold=0.01) == ["cup", "bird"]
    strict = PostprocessConfig(score_threshold=0.4)
    assert names_found((0.3, 0.9, 0.1), postprocess=strict, score_threshold=0.2) == ["cup", "bird"]
    assert strict.score_threshold == 0.4  # the caller's own is left alone
    assert names_found((0.3, 0.9, 0.1), postprocess=strict, thresholds={"bird": 0.1}) == ["cup"]
    assert names_found((0.0001, 0.9, 0.1), score_threshold=0)[:3] == ["cup", "tooth brush", "bird"]  # and all the rest


@pytest.mark.parametrize("score", [-0.1, 1.1, 50, float("nan")])
def test_a_threshold_that_is_no_score(model: RetinaNet, score: float) -> None:
    with pytest.raises(UserError, match=r"the score threshold must lie in 0\.\.1"):
        predictor_of(model, score_threshold=score)


def test_names_and_ids_are_the_data_sets(tmp_path: Path) -> None:
    found = predictor_of(Answer(BOXES, logits(0.9, 0.7, 0.8)))(SQUARE)
    assert found.labels.tolist() == [0, 2, 1]
    assert found.names == ["bird", "tooth brush", "cup"]
    assert found.category_ids == [3, 90, 17]
    np.testing.assert_allclose(found.scores.numpy(), [0.9, 0.8, 0.7], atol=1e-6)


def test_no_detections() -> None:
    found = predictor_of(Answer(BOXES, logits(0.01, 0.01, 0.01)))(SQUARE)
    assert (len(found), found.names, found.category_ids) == (0, [], [])
    assert found.boxes.shape == (0, 4)


def test_from_a_checkpoint(model: RetinaNet, tmp_path: Path) -> None:
    """Input size, postprocessing, categories and thresholds come with the weights."""
    anchors = {"sizes": [8, 16, 32, 64, 128], "scales": [1.0]}
    architecture = {"num_classes": 3, "backbone": "resnet18", "norm": "batch", "fpn_channels": 32, "head_convs": 1}
    config = parse_config(
        {
            "model": {**architecture, "anchors": anchors},
            "input": {"short_edge": 64, "long_edge": 96},
            "postprocess": {"max_detections": 7},
        }
    )
    thresholds = {category.name: 0.3 for category in GAPPED}
    save_checkpoint(tmp_path / "best.pt", Checkpoint(config, GAPPED, model.state_dict(), thresholds=thresholds))
    loaded = Predictor.load(tmp_path / "best.pt", device="cpu", precision="fp32")
    options = PostprocessConfig(max_detections=7)
    found = loaded(picture())
    assert len(found) == 7
    assert_same(found, predictor_of(model, postprocess=options, thresholds=thresholds)(picture()))
    everything = Predictor.load(str(tmp_path / "best.pt"), device="cpu", precision="fp32", score_threshold=0.99999)
    assert len(everything(picture())) < 7


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((8, 8, 3), np.float32), r"must be uint8 \[height, width, 3\], got float32 \[8, 8, 3\]"),
        (np.zeros((3, 8, 8), np.uint8), r"got uint8 \[3, 8, 8\]"),  # channels first is a tensor's order
        (np.zeros((8, 8, 2), np.uint8), r"got uint8 \[8, 8, 2\]"),
        (np.zeros((2, 8, 8, 3), np.uint8), r"got uint8 \[2, 8, 8, 3\]"),
        (np.zeros((0, 8, 3), np.uint8), r"got uint8 \[0, 8, 3\]"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), r"must be \[3, height, width\], got \[8, 8, 3\]"),
        (torch.zeros(1, 3, 8, 8), r"got \[1, 3, 8, 8\]"),  # a batch
        (torch.zeros(3, 8, 0), r"got \[3, 8, 0\]"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), r"must be uint8, or float in 0\.\.1, got torch\.int64"),
        (torch.full((3, 8, 8), 200.0), r"must lie in 0\.\.1, got 200\.\.200; pass uint8 for 0\.\.255"),
        (torch.full((3, 8, 8), -2.1), r"must lie in 0\.\.1"),  # normalised already
        (torch.full((3, 8, 8), float("nan")), r"must lie in 0\.\.1"),
        ((SQUARE, SQUARE), "must be a path, PIL image, array or tensor, got tuple"),
        (7, "got int"),
        (None, "got NoneType"),
    ],
)
def test_what_is_no_picture(predictor: Predictor, given: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        predictor(given)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=message):
        predictor([SQUARE, given])


def test_a_resized_tensor_may_overshoot_a_little(predictor: Predictor) -> None:
    chw = torch.from_numpy(picture()).permute(2, 0, 1) / 255
    beyond = torch.where(chw > 0.9, 1.05, chw)
    assert_same(predictor(beyond), predictor(beyond.clamp(max=1)))


def test_files_that_are_no_pictures(predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("hello")
    for name in ("a.jpg", "none.jpg", ""):
        with pytest.raises(UnreadableImageError, match=str(tmp_path / name)):
            predictor(tmp_path / name)


def test_wrong_arguments(model: RetinaNet) -> None:
    with pytest.raises(UserError, match="the model has 3 classes, but 2 categories are given"):
        Predictor(model, GAPPED[:2])
    with pytest.raises(UserError, match="there is no device 'gpu'"):
        Predictor(model, GAPPED, device="gpu")
    with pytest.raises(UserError, match=r"device cuda:99 is not there: torch .* finds \d+ CUDA device"):
        Predictor(model, GAPPED, device="cuda:99")
    with pytest.raises(UserError, match="there is no precision 'half': expected auto, fp32, bf16 or fp16"):
        Predictor(model, GAPPED, device="cpu", precision="half")
    with pytest.raises(UserError, match="the batch size must be at least 1, got 0"):
        predictor_of(model)([SQUARE], batch_size=0)


def test_a_single_pixel(predictor: Predictor) -> None:
    """Enlarged to 64 x 64; every box must lie in the one pixel."""
    found = predictor(np.full((1, 1, 3), 200, np.uint8))
    assert found.boxes.numel() == 0 or (found.boxes.min() >= 0 and found.boxes.max() <= 1)
    assert predictor(np.zeros((1, 500, 3), np.uint8)) is not None  # 96 / 500 of one row: still one row


@pytest.mark.parametrize("precision", ["bf16", "auto"])
def test_lower_precision_still_finds(model: RetinaNet, predictor: Predictor, precision: str) -> None:
    """bfloat16 has 8 significant bits: scores agree to some hundredths, and the dtype of what comes out is float32."""
    found = Predictor(model, GAPPED, input=INPUT, device="cpu", precision=precision, score_threshold=0.3)(picture())
    assert found.scores.dtype == found.boxes.dtype == torch.float32
    assert float(found.scores[0]) == pytest.approx(float(predictor(picture()).scores[0]), abs=0.05)


@pytest.mark.parametrize(("size", "says"), [((64, 96), True), (("height", "width"), False)])
def test_an_onnx_file_of_one_size_says_what_that_costs(
    size: tuple[Any, Any], says: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    session = SimpleNamespace(get_inputs=lambda: [SimpleNamespace(shape=["batch", 3, *size])])
    header = OnnxHeader(GAPPED, INPUT, PostprocessConfig(), {}, nms=False)
    Predictor.from_onnx(OnnxModel(session, header, torch.device("cpu")))
    line = (
        "note: this ONNX file has one fixed size, so that every picture is shrunk or padded to 64x96; "
        "one exported with --dynamic finds what the checkpoint finds\n"
    )
    assert capsys.readouterr().out == (line if says else "")
