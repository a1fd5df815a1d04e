"""The detector under torchvision's contract: what comes out, held against torchvision's transform and our predictor."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision_style import GAPPED, INPUT, as_image, picture, references_rows, tiny_model, truth

from retinanet.adapters import TorchvisionDetector
from retinanet.anchors import AnchorGenerator
from retinanet.checkpoint import Checkpoint, save_checkpoint
from retinanet.config import LossConfig, PostprocessConfig, parse_config
from retinanet.errors import UserError
from retinanet.model import RetinaNet
from retinanet.predictor import Predictor
from retinanet.results import to_rows
from retinanet.structures import Detections, Predictions
from retinanet.weights.zoo import CONVERSION


@pytest.fixture
def detector() -> TorchvisionDetector:
    return TorchvisionDetector(tiny_model(), GAPPED, input=INPUT)


def predicted(detector: TorchvisionDetector, array: np.ndarray) -> Detections:
    assert isinstance(detector.model, RetinaNet)
    options: dict[str, Any] = {"input": INPUT, "score_threshold": 0.05, "device": "cpu", "precision": "fp32"}
    return Predictor(detector.model, GAPPED, **options)(array)


def test_what_comes_out_in_eval_mode(detector: TorchvisionDetector) -> None:
    images = [as_image(picture(96, 64)), as_image(picture(48, 120, seed=1))]
    found = detector(images)
    assert [list(one) for one in found] == [["boxes", "scores", "labels"]] * 2
    for image, one in zip(images, found, strict=True):
        count = len(one["scores"])
        assert count > 5 and one["boxes"].shape == (count, 4) and one["labels"].shape == (count,)
        assert one["boxes"].dtype == one["scores"].dtype == torch.float32 and one["labels"].dtype == torch.int64
        assert set(one["labels"].tolist()) <= {3, 7, 90}
        assert (one["scores"][:-1] >= one["scores"][1:]).all() and float(one["scores"].min()) > 0.05
        assert (one["boxes"] >= 0).all()
        assert (one["boxes"] <= torch.tensor([image.shape[2], image.shape[1]] * 2) + 1e-4).all()  # of the image given
    assert float(found[1]["boxes"].max()) > 96  # not of the resized one
    assert len(set(torch.cat([one["labels"] for one in found]).tolist())) > 1


def test_equals_the_predictor_where_nothing_is_resized(detector: TorchvisionDetector) -> None:
    """But for the rounding of norms folded into convolutions, which the predictor has."""
    array = picture(64, 96)
    ours = predicted(detector, array)
    found = detector([as_image(array)])[0]
    assert len(ours) > 5
    torch.testing.assert_close(found["boxes"], ours.boxes, rtol=0, atol=1e-3)
    torch.testing.assert_close(found["scores"], ours.scores, rtol=0, atol=1e-5)
    assert found["labels"].tolist() == ours.category_ids


def test_equals_the_predictor_but_for_rounding_where_images_are_resized(detector: TorchvisionDetector) -> None:
    """The predictor resizes bytes, the adapter floats: up to half a grey level apart, 1/100 of the input's deviation."""
    array = picture(88, 128)
    ours, found = predicted(detector, array).above(0.1), detector([as_image(array)])[0]
    assert len(ours) > 5
    for box, score, label in zip(ours.boxes, ours.scores, ours.category_ids, strict=True):
        near = (found["boxes"] - box).abs().amax(dim=1) < 0.5
        same = near & (found["labels"] == label) & ((found["scores"] - score).abs() < 0.02)
        assert same.sum() == 1


def test_a_batch_gives_what_its_images_give_alone(detector: TorchvisionDetector) -> None:
    """They all become 64 x 96: more padding beside an image would change what is seen at its border, as anywhere."""
    images = [as_image(picture(64, 96)), as_image(picture(128, 192, 1)), as_image(picture(32, 48, 2))]
    for together, image in zip(detector(images), images, strict=True):
        alone = detector([image])[0]
        assert torch.equal(together["labels"], alone["labels"]) and len(alone["labels"]) > 5
        torch.testing.assert_close(together["boxes"], alone["boxes"], rtol=0, atol=1e-3)
        torch.testing.assert_close(together["scores"], alone["scores"], rtol=0, atol=1e-5)


class Recorder(nn.Module):
    """In the place of the detector: notes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.num_classes, self.anchor_generator = 3, AnchorGenerator()
        self.register_buffer("mean", torch.zeros(3, 1, 1))
        self.batch, self.sizes = torch.empty(0), torch.empty(0)

    def forward(self, batch: Tensor, sizes: Tensor) -> Predictions:
        self.batch, self.sizes = batch, sizes
        nothing = batch.new_zeros(len(batch), 1, 3).requires_grad_()
        return Predictions(nothing, batch.new_zeros(len(batch), 1, 4), batch.new_tensor([[0.0, 0, 9, 9]]), [1])


@pytest.mark.parametrize("sizes", [[(64, 96)], [(30, 50), (50, 30)], [(200, 90), (33, 400), (64, 64)]])
def test_images_become_what_torchvisions_transform_makes_of_them(sizes: list[tuple[int, int]]) -> None:
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    torch.manual_seed(0)
    images = [torch.rand(3, *size) for size in sizes]
    theirs = GeneralizedRCNNTransform(64, 96, [0.0] * 3, [1.0] * 3).eval()
    expected, _ = theirs([image.clone() for image in images])
    recorder = Recorder()
    adapter = TorchvisionDetector(recorder, GAPPED, input=INPUT.model_copy(update={"size_rounding": "floor"}))  # type: ignore[arg-type]
    adapter.eval()(images)
    torch.testing.assert_close(recorder.batch / 255, expected.tensors, rtol=0, atol=1e-6)
    assert [tuple(size) for size in recorder.sizes.tolist()] == expected.image_sizes


def test_sides_can_be_set_as_torchvisions(detector: TorchvisionDetector) -> None:
    """Sliced inference sets both to a float; several short sides are drawn from in training only."""
    sides = detector.transform
    sides.min_size, sides.max_size = (48.0,), 48.0
    assert sides.choose((100, 150), draw=False) == (32, 48)
    sides.min_size, sides.max_size = (32, 64, 96), 1000
    assert {sides.choose((50, 50), draw=True) for _ in range(60)} == {(32, 32), (64, 64), (96, 96)}
    assert {sides.choose((50, 50), draw=False) for _ in range(9)} == {(96, 96)}


def test_references_rows_are_ours(detector: TorchvisionDetector) -> None:
    """The same detections, once as torchvision's dicts and once as our `Detections`."""
    array = picture(64, 96)
    ours = predicted(detector, array)
    pairs = [({"image_id": torch.tensor(5)}, detector([as_image(array)])[0])]
    np.testing.assert_allclose(references_rows(pairs), to_rows(5, ours), rtol=0, atol=1e-3)  # folded norms round otherwise


# ------------------------------------------------------------------------------------- weights, modes, where it comes from


def test_the_state_dict_is_the_detectors_own(detector: TorchvisionDetector) -> None:
    """So references' checkpoints load into `RetinaNet`, and its weights into the adapter."""
    state = detector.state_dict()
    own = detector.model.state_dict()
    assert list(state) == list(own) and all(torch.equal(state[key], own[key]) for key in own)
    other = TorchvisionDetector(RetinaNet(3, "resnet18", norm="batch", fpn_channels=32, head_convs=1, anchors=AnchorGenerator(
        [16, 32, 64, 128, 256], [1.0])), GAPPED)  # fmt: skip
    other.load_state_dict(own)
    assert all(torch.equal(value, own[key]) for key, value in other.state_dict().items())
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({key: value for key, value in own.items() if key != "mean"})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict({**own, "head.weight": torch.zeros(1)})


def test_the_state_dict_inside_other_modules_and_copies(detector: TorchvisionDetector) -> None:
    """As in DDP or an averaged model, whose state dicts hold it below `module.`"""
    wrapped = nn.ModuleDict({"module": detector})
    state = {key: value.clone() for key, value in wrapped.state_dict().items()}
    assert set(state) == {f"module.{key}" for key in detector.model.state_dict()}
    twin = copy.deepcopy(wrapped)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.load_state_dict(state)
    assert all(torch.equal(value, state[key]) for key, value in twin.state_dict().items())
    average = torch.optim.swa_utils.AveragedModel(detector)
    average.load_state_dict(average.state_dict())


def test_modes_and_devices(detector: TorchvisionDetector) -> None:
    assert not detector.training and not detector.model.training  # as the model was
    detector.train()
    assert detector.model.training
    assert detector.to("cpu") is detector
    assert detector.to("meta").category_ids.device.type == "meta"  # all of it moves
    assert all(value.device.type == "meta" for value in (*detector.parameters(), *detector.buffers()))


@pytest.fixture
def checkpoint() -> Checkpoint:
    config = parse_config(
        {
            "model": {
                "num_classes": 3,
                "backbone": "resnet18",
                "backbone_weights": "none",
                "norm": "batch",
                "fpn_channels": 32,
                "head_convs": 1,
                "freeze_stages": 0,
                "anchors": {"sizes": [16, 32, 64, 128, 256], "scales": [1.0]},
            },
            "input": {"short_edge": 64, "long_edge": 96},
            "postprocess": {"max_detections": 7},
            "loss": {"box_loss": "giou"},
        }
    )
    return Checkpoint(config, GAPPED, tiny_model().state_dict())


def test_from_a_checkpoint(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETINANET_CACHE", str(tmp_path))
    save_checkpoint(tmp_path / "best.pt", checkpoint)
    save_checkpoint(tmp_path / f"retinanet_resnet50_fpn.{CONVERSION}.pt", checkpoint)  # as if the zoo's had been converted
    images, targets = [as_image(picture(64, 96))], [truth((8.0, 16, 40, 60), labels=(7,))]
    parts = TorchvisionDetector(
        tiny_model(), GAPPED, input=INPUT, loss=LossConfig(box_loss="giou"), postprocess=PostprocessConfig(max_detections=7)
    )
    expected = parts(images)[0]
    losses = parts.train()(images, targets)
    assert len(expected["boxes"]) == 7
    for source in (checkpoint, tmp_path / "best.pt", str(tmp_path / "best.pt"), "retinanet_resnet50_fpn"):
        detector = TorchvisionDetector.from_checkpoint(source)
        assert not detector.training and detector.categories == GAPPED
        assert torch.equal(detector(images)[0]["boxes"], expected["boxes"])
        assert detector.train()(images, targets) == losses
    with pytest.raises(UserError, match="do not exist"):
        TorchvisionDetector.from_checkpoint(tmp_path / "none.pt")


def test_back_into_a_checkpoint(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """What docs/finetuning.md tells to do after training elsewhere."""
    detector = TorchvisionDetector.from_checkpoint(checkpoint)
    with torch.no_grad():
        detector.model.cls_subnet.final.bias += 0.5  # type: ignore[operator]
    changed = replace(checkpoint, model=detector.state_dict(), ema=None, thresholds={}, training=None)
    save_checkpoint(tmp_path / "changed.pt", changed)
    array = picture(64, 96)
    ours = Predictor.load(tmp_path / "changed.pt", device="cpu", score_threshold=0.05, precision="fp32")(array)
    found = detector.to(memory_format=torch.channels_last)([as_image(array)])[0]  # type: ignore[call-overload]
    torch.testing.assert_close(found["scores"], ours.scores, rtol=0, atol=1e-5)
    assert len(ours) == 7


# --------------------------------------------------------------------------------------------------------- bad inputs

IMAGE = torch.zeros(3, 64, 96)
BOX = torch.tensor([[1.0, 2, 30, 40]])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "there are no images"),
        ([IMAGE, torch.zeros(1, 64, 96)], r"images\[1\] must be a tensor \[3, height, width\], got \[1, 64, 96\]"),
        ([IMAGE[None]], r"images\[0\] must be a tensor \[3, height, width\], got \[1, 3, 64, 96\]"),
        ([torch.zeros(3, 0, 96)], r"got \[3, 0, 96\]"),
        (IMAGE, r"images\[0\] must be .*, got \[64, 96\]"),  # one image instead of a list
        ([np.zeros((3, 64, 96), np.float32)], "got ndarray"),
        ([IMAGE.to(torch.uint8)], r"images\[0\] must be of a float type, in 0..1, got torch.uint8"),
        ([IMAGE + 200], "must lie in 0..1, not yet normalised, got 200..200"),
        ([IMAGE - 2], r"must lie in 0..1, not yet normalised, got -2..-2"),
        ([IMAGE * float("nan")], "must lie in 0..1"),
    ],
)
def test_images_that_are_none(detector: TorchvisionDetector, images: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        detector(images)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (None, "training needs a target for each image: 1 images, but none"),
        ([], "training needs a target for each image: 1 images, but 0"),
        (truth(), "1 images, but 2"),  # one dict instead of a list
        ([None], r"targets\[0\] must be a dict of boxes and labels, got NoneType"),
        ([{"labels": torch.tensor([7])}], r"targets\[0\]\['boxes'\] must be a tensor, got NoneType"),
        ([{"boxes": BOX}], r"targets\[0\]\['labels'\] must be a tensor, got NoneType"),
        ([{"boxes": BOX.tolist(), "labels": torch.tensor([7])}], r"\['boxes'\] must be a tensor, got list"),
        (
            [{"boxes": torch.zeros(0), "labels": torch.zeros(0)}],
            r"must be \[N, 4\], for an image without boxes \[0, 4\], got \[0\]",
        ),
        ([{"boxes": BOX[:, :3], "labels": torch.tensor([7])}], r"must be \[N, 4\].*, got \[1, 3\]"),
        ([{"boxes": BOX, "labels": torch.tensor([7.0])}], "must be whole numbers .*, got torch.float32"),
        ([{"boxes": BOX, "labels": torch.tensor([7, 3])}], r"has 1 boxes, but 'labels' is \[2\]"),
        ([{"boxes": BOX, "labels": torch.tensor([[7]])}], r"has 1 boxes, but 'labels' is \[1, 1\]"),
        ([{"boxes": BOX, "labels": torch.tensor([7]), "iscrowd": torch.zeros(2)}], r"has 1 boxes, but 'iscrowd' is \[2\]"),
        ([{"boxes": BOX, "labels": torch.tensor([1])}], "has label 1, but labels are the classes' ids, here 3, 7, 90"),
        ([{"boxes": BOX, "labels": torch.tensor([0])}], "has label 0, but"),  # no background
        ([truth((1.0, 2, 30, 2), labels=(7,))], r"has the box \[1.0, 2.0, 30.0, 2.0\], which has no area"),
        ([truth((10.0, 2, 9, 30), labels=(7,))], "has no area"),
        ([truth((10.0, 2, float("nan"), 30), labels=(7,))], "has no area"),
        ([truth((10.0, 2, float("inf"), 30), labels=(7,))], "has no area"),
    ],
)
def test_targets_that_are_none(detector: TorchvisionDetector, targets: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        detector.train()([IMAGE], targets)
    assert "\n" not in str(caught.value)


def test_categories_must_be_those_of_the_model() -> None:
    with pytest.raises(UserError, match="the model has 3 classes, but 2 categories are given"):
        TorchvisionDetector(tiny_model(), GAPPED[:2])
