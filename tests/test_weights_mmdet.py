"""mmdet's weights: the detections of its forward written out in plain torch, from the same pixels."""

from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import peers
import pytest
import torch
import torch.nn.functional as F
from equality import Agreement, changeable, compare, detect, pictures
from peers import Found, Layers
from torch import Tensor

from retinanet.checkpoint import Checkpoint
from retinanet.config import AnchorConfig
from retinanet.errors import UserError
from retinanet.structures import Category
from retinanet.weights.layout import COCO_CATEGORIES, Imported
from retinanet.weights.mmdet import import_mmdet_state
from retinanet.weights.zoo import import_file

MEAN = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
STD = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
SIZES = [(128, 160), (141, 90), (170, 300)]  # (height, width) as resized; only the first is a multiple of 32
ORIGINALS = [(240, 300), (283, 180), (64, 113)]


def reference(layers: Layers, images: list[Tensor], originals: list[tuple[int, int]], classes: int) -> list[Found]:
    """mmdet's RetinaNet R18: `images` are RGB uint8 [3, h, w], the detections in pixels of `originals`."""
    maps = mmdet_maps(layers, peers.pad([(image - MEAN) / STD for image in images]), classes)
    results = []
    for n, (image, original) in enumerate(zip(images, originals)):
        found = peers.candidates(*maps, classes, n, size_major=False, shrink_clamped=True)
        height, width = image.shape[1:]
        boxes = peers.clip(found.boxes, (height, width)) / torch.tensor([width / original[1], height / original[0]] * 2)
        results.append(peers.suppress(peers.nonempty(found._replace(boxes=boxes)), 100))
    return results


def mmdet_maps(layers: Layers, x: Tensor, classes: int) -> tuple[list[Tensor], list[Tensor]]:
    features = resnet18(layers, x)
    tops, top = [], torch.zeros(())
    for n in (2, 1, 0):
        lateral = layers.conv(f"neck.lateral_convs.{n}.conv", features[n], 256, 1, bias=True)
        top = lateral + F.interpolate(top, size=lateral.shape[2:], mode="nearest") if tops else lateral
        tops.insert(0, layers.conv(f"neck.fpn_convs.{n}.conv", top, 256, bias=True))
    p6 = layers.conv("neck.fpn_convs.3.conv", features[2], 256, stride=2, bias=True)
    p7 = layers.conv("neck.fpn_convs.4.conv", p6, 256, stride=2, bias=True, gain=4)  # to be heard
    maps = []
    for kind, outputs, spread, bias in (
        ("cls", classes, 0.5, layers.class_bias(0.02)),
        ("reg", 4, 0.2, layers.box_bias(9)),
    ):
        levels = [*tops, p6, p7]
        for n in range(4):
            levels = [layers.conv(f"bbox_head.{kind}_convs.{n}.conv", level, 256, bias=True).relu() for level in levels]
        maps.append(layers.output(f"bbox_head.retina_{kind}", levels, 9 * outputs, spread, bias))
    return maps[0], maps[1]


def resnet18(layers: Layers, x: Tensor) -> list[Tensor]:
    """C3, C4, C5."""

    def conv(place: str, n: str, x: Tensor, channels: int, kernel: int, stride: int = 1) -> Tensor:
        conv, norm = ("0", "1") if place.endswith("downsample") else (f"conv{n}", f"bn{n}")
        return layers.norm(f"{place}.{norm}", layers.conv(f"{place}.{conv}", x, channels, kernel, stride))

    x = F.max_pool2d(conv("backbone", "1", x, 64, 7, 2).relu(), 3, 2, 1)
    features = []
    for stage in (1, 2, 3, 4):
        channels = 64 * 2 ** (stage - 1)
        for n in range(2):
            block, stride = f"backbone.layer{stage}.{n}", 2 if n == 0 and stage > 1 else 1
            shortcut = conv(f"{block}.downsample", "", x, channels, 1, stride) if stride == 2 else x
            out = conv(block, "1", x, channels, 3, stride).relu()
            x = (conv(block, "2", out, channels, 3) + shortcut).relu()
        features.append(x)
    return features[1:]


def published(state: dict[str, Tensor], path: Path) -> Path:
    """As in their model zoo: a torch archive with notes, and BatchNorms that count."""
    counts = {key.replace("running_mean", "num_batches_tracked"): torch.tensor(7) for key in state if "running_mean" in key}
    notes = {"mmdet_version": "2.3.0", "epoch": 12, "CLASSES": ("person", "bicycle")}
    torch.save({"meta": notes, "state_dict": OrderedDict({**state, **counts})}, path)
    return path


class Original(NamedTuple):
    """A COCO detector, what it finds in the batch of pictures and in each alone, and what became of it."""

    layers: Layers
    images: list[Tensor]
    together: list[Found]
    alone: list[Found]
    imported: Imported
    checkpoint: Checkpoint


@pytest.fixture(scope="module")
def original(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Original:
    images, layers = pictures(real_data, SIZES), Layers()
    with torch.inference_mode():
        reference(layers, images, ORIGINALS, 80)  # fills in the weights
        together = reference(layers, images, ORIGINALS, 80)
        alone = [reference(layers, [image], [size], 80)[0] for image, size in zip(images, ORIGINALS)]
    imported = import_file(published(layers.state, tmp_path_factory.mktemp("mmdet") / "retinanet_r18.pth"), "mmdet")
    return Original(layers, images, together, alone, imported, imported.checkpoint())


@pytest.fixture
def checkpoint(original: Original) -> Checkpoint:
    return changeable(original.checkpoint)


def agreement(checkpoint: Checkpoint, original: Original) -> Agreement:
    return compare(detect(checkpoint, original.images, ORIGINALS), original.together)


def test_the_same_is_found(original: Original, checkpoint: Checkpoint) -> None:
    same = agreement(checkpoint, original)
    print(same)
    assert same.count > 200 and same.share == 1
    for image, size, expected in zip(original.images, ORIGINALS, original.alone):
        same = compare(detect(checkpoint, [image], [size]), [expected])
        print(same)
        assert same.count > 50 and same.share == 1
    assert checkpoint.categories == COCO_CATEGORIES
    assert checkpoint.config.model.backbone == "resnet18"


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("model", "p7_relu", True),
        ("model", "norm_eps", 0.01),
        ("model", "anchors", {"offset": 0.5}),
        ("model", "anchors", {"offset": 0.0, "strides": "grid"}),
        ("model", "anchors", {"offset": 0.0, "integer": True}),
        ("postprocess", "clip", "after_nms"),
        ("postprocess", "clamp_shrinking", False),
        ("postprocess", "drop_empty", False),
        ("postprocess", "max_detections", 300),
    ],
)
def test_every_difference_matters(original: Original, checkpoint: Checkpoint, section: str, key: str, value: object) -> None:
    """Or the test above would not notice if one were forgotten."""
    setattr(getattr(checkpoint.config, section), key, AnchorConfig.model_validate(value) if key == "anchors" else value)
    assert agreement(checkpoint, original).share < 1


def test_counts_are_left_and_all_else_is_moved(original: Original) -> None:
    assert len(original.imported.left) == 20  # the norms of a ResNet-18
    assert all(name.endswith("num_batches_tracked") for name in original.imported.left)
    assert len(original.imported.moved) == len(original.layers.state)


def test_p6_from_p5_is_seen_in_the_shapes(original: Original) -> None:
    state = dict(original.layers.state)
    state["neck.fpn_convs.3.conv.weight"] = torch.zeros(256, 256, 3, 3)
    assert import_mmdet_state(state).checkpoint().config.model.p6_from == "p5"


def test_other_classes(original: Original) -> None:
    state = dict(original.layers.state)
    for kind in ("weight", "bias"):
        state[f"bbox_head.retina_cls.{kind}"] = state[f"bbox_head.retina_cls.{kind}"][:18]
    with pytest.raises(UserError, match="it has 2 classes, but 80 are named, those of COCO: name its own with --classes FILE"):
        import_mmdet_state(state)
    categories = (Category(0, "cat"), Category(1, "dog"))
    assert import_mmdet_state(state, categories=categories).checkpoint().categories == categories
