"""detectron2's weights: the detections of its forward written out in plain torch, from the same pixels."""

import pickle
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
from retinanet.weights.layout import COCO_CATEGORIES, Imported
from retinanet.weights.zoo import import_file

MEAN = torch.tensor([103.530, 116.280, 123.675]).view(3, 1, 1)  # BGR
SIZES = [(128, 160), (150, 97), (96, 128)]  # (height, width) as resized; only the first is a multiple of 32
ORIGINALS = [(240, 300), (301, 193), (64, 85)]
SMALL = [(96, 160), (141, 90)]
NAMES = ["cat", "dog", "horse", "sheep", "cow"]


def reference(layers: Layers, images: list[Tensor], originals: list[tuple[int, int]], classes: int, width: int) -> list[Found]:
    """detectron2's RetinaNet R50: `images` are RGB uint8 [3, h, w], the detections in pixels of `originals`."""
    maps = detectron2_maps(layers, peers.pad([image.flip(0).float() - MEAN for image in images]), classes, width)
    results = []
    for n, (image, original) in enumerate(zip(images, originals)):
        found = peers.candidates(*maps, classes, n, size_major=True, shrink_clamped=False)
        found = peers.suppress(found, 100)
        height, width = image.shape[1:]
        scale = torch.tensor([original[1] / width, original[0] / height] * 2)
        results.append(peers.nonempty(found._replace(boxes=peers.clip(found.boxes * scale, original))))
    return results


def detectron2_maps(layers: Layers, x: Tensor, classes: int, width: int) -> tuple[list[Tensor], list[Tensor]]:
    features = resnet50(layers, x)
    fpn = "backbone.fpn_"
    tops, top = [], torch.zeros(())
    for level in (5, 4, 3):
        lateral = layers.conv(f"{fpn}lateral{level}", features[level], width, 1, bias=True)
        top = lateral + F.interpolate(top, scale_factor=2, mode="nearest") if tops else lateral
        tops.insert(0, layers.conv(f"{fpn}output{level}", top, width, bias=True))
    p6 = layers.conv("backbone.top_block.p6", features[5], width, stride=2, bias=True)
    p7 = layers.conv("backbone.top_block.p7", p6.relu(), width, stride=2, bias=True, gain=4)  # to be heard
    maps = []
    for subnet, final, outputs, spread, bias in (
        ("cls_subnet", "cls_score", classes, 0.5, layers.class_bias(0.02)),
        ("bbox_subnet", "bbox_pred", 4, 0.2, layers.box_bias(9)),
    ):
        levels = [*tops, p6, p7]
        for n in (0, 2, 4, 6):
            levels = [layers.conv(f"head.{subnet}.{n}", level, width, bias=True).relu() for level in levels]
        maps.append(layers.output(f"head.{final}", levels, 9 * outputs, spread, bias))
    return maps[0], maps[1]


def resnet50(layers: Layers, x: Tensor) -> dict[int, Tensor]:
    """MSRA's: a stage's stride is in its first 1x1 convolution. Features by level."""

    def conv(name: str, x: Tensor, channels: int, kernel: int, stride: int = 1) -> Tensor:
        return layers.norm(f"{name}.norm", layers.conv(name, x, channels, kernel, stride))

    body, features = "backbone.bottom_up", {}
    x = F.max_pool2d(conv(f"{body}.stem.conv1", x, 64, 7, 2).relu(), 3, 2, 1)
    for level, blocks in zip((2, 3, 4, 5), (3, 4, 6, 3)):
        channels = 64 * 2 ** (level - 2)
        for n in range(blocks):
            block, stride = f"{body}.res{level}.{n}", 2 if n == 0 and level > 2 else 1
            shortcut = conv(f"{block}.shortcut", x, 4 * channels, 1, stride) if n == 0 else x
            out = conv(f"{block}.conv1", x, channels, 1, stride).relu()
            out = conv(f"{block}.conv2", out, channels, 3).relu()
            x = (conv(f"{block}.conv3", out, 4 * channels, 1) + shortcut).relu()
        features[level] = x
    return features


def published(state: dict[str, Tensor], path: Path) -> Path:
    """As in their model zoo: a pickle of arrays, by an older Python and numpy, with tensors that are no weights."""
    arrays = {key: value.numpy() for key, value in state.items()}
    arrays["anchor_generator.cell_anchors.0"] = torch.zeros(9, 4).numpy()
    arrays["pixel_mean"] = MEAN.numpy()
    content = pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}, protocol=2)
    path.write_bytes(content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    return path


class Small(NamedTuple):
    """A detector of few classes and narrow subnets, what it finds in two pictures, and what became of it."""

    layers: Layers
    images: list[Tensor]
    expected: list[Found]
    imported: Imported
    checkpoint: Checkpoint


@pytest.fixture(scope="module")
def small(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Small:
    images, layers = pictures(real_data, SMALL), Layers()
    with torch.inference_mode():
        reference(layers, images, ORIGINALS[:2], len(NAMES), 64)  # fills in the weights
        expected = reference(layers, images, ORIGINALS[:2], len(NAMES), 64)
    file = published(layers.state, tmp_path_factory.mktemp("small") / "model_final.pkl")
    imported = import_file(file, "detectron2", classes=NAMES)
    return Small(layers, images, expected, imported, imported.checkpoint())


@pytest.fixture
def checkpoint(small: Small) -> Checkpoint:
    return changeable(small.checkpoint)


def agreement(checkpoint: Checkpoint, small: Small) -> Agreement:
    return compare(detect(checkpoint, small.images, ORIGINALS[:2]), small.expected)


def test_the_same_is_found(small: Small, checkpoint: Checkpoint) -> None:
    same = agreement(checkpoint, small)
    print(same)
    assert same.count > 100 and same.share == 1
    assert [category.name for category in checkpoint.categories] == NAMES
    assert [category.id for category in checkpoint.categories] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("input", "mean", (103.53, 116.28, 123.675)),  # in their order
        ("model", "stride_in_1x1", False),
        ("model", "p7_relu", False),
        ("model", "norm_eps", 0.01),
        ("model", "anchors", {"offset": 0.5}),
        ("model", "anchors", {"offset": 0.0, "strides": "grid"}),
        ("model", "anchors", {"offset": 0.0, "integer": True}),
        ("postprocess", "clip", "before_nms"),
        ("postprocess", "clamp_shrinking", True),
        ("postprocess", "drop_empty", False),
    ],
)
def test_every_difference_matters(small: Small, checkpoint: Checkpoint, section: str, key: str, value: object) -> None:
    """Or the test above would not notice if one were forgotten."""
    part = getattr(checkpoint.config, section)
    setattr(part, key, AnchorConfig.model_validate(value) if key == "anchors" else value)
    if key == "mean":
        checkpoint.model["mean"] = torch.tensor(value).view(3, 1, 1)
    assert agreement(checkpoint, small).share < 1


def test_order_of_anchors_and_of_colours_matter(small: Small, checkpoint: Checkpoint) -> None:
    for key in ("backbone.conv1.weight", "box_subnet.final.weight", "cls_subnet.final.weight"):
        right = checkpoint.model[key]
        # three equal thirds, turned round: colours of the first convolution, else sizes of the anchors' outputs
        checkpoint.model[key] = (
            right.flip(1) if "conv1" in key else right.unflatten(0, (3, 3, -1)).transpose(0, 1).flatten(0, 2)
        )
        assert agreement(checkpoint, small).share < 1, key
        checkpoint.model[key] = right


def test_own_training_checkpoint_is_read_too(small: Small, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """detectron2 writes torch archives with more than the model while it trains."""
    torch.save({"model": small.layers.state, "iteration": 9, "optimizer": {"state": {}}}, tmp_path / "model_0000009.pth")
    other = import_file(tmp_path / "model_0000009.pth", "detectron2", classes=NAMES).checkpoint()
    assert other.config == checkpoint.config
    assert all(torch.equal(value, checkpoint.model[key]) for key, value in other.model.items())


def test_what_is_no_weight_is_left_and_named(small: Small) -> None:
    assert small.imported.left == ["anchor_generator.cell_anchors.0", "pixel_mean"]
    assert len(small.imported.moved) == len(small.layers.state)
    lines = [line.split() for line in small.imported.table().splitlines()]
    # three blocks of three convolutions and a shortcut, with four tensors of a norm each
    assert ["backbone.bottom_up.res2.*", "->", "backbone.layer1.*", "(50)"] in lines
    assert lines[-2:] == [["anchor_generator.cell_anchors.*", "left", "out", "(1)"], ["pixel_mean", "left", "out", "(1)"]]


@pytest.mark.slow
def test_coco_detector_of_full_size(real_data: Path, tmp_path: Path) -> None:
    images, layers = pictures(real_data, SIZES), Layers()
    with torch.inference_mode():
        reference(layers, images, ORIGINALS, 80, 256)  # fills in the weights
        together = reference(layers, images, ORIGINALS, 80, 256)
        alone = [reference(layers, [image], [size], 80, 256)[0] for image, size in zip(images, ORIGINALS)]
    checkpoint = import_file(published(layers.state, tmp_path / "model_final.pkl"), "detectron2").checkpoint()
    assert checkpoint.categories == COCO_CATEGORIES
    same = compare(detect(checkpoint, images, ORIGINALS), together)
    print(same)
    assert same.count > 200 and same.share == 1
    for image, size, expected in zip(images, ORIGINALS, alone):
        same = compare(detect(checkpoint, [image], [size]), [expected])
        print(same)
        assert same.count > 50 and same.share == 1
