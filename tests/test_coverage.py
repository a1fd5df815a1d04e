"""Anchor coverage: by hand, against every anchor of the grid, and against what the matcher does on real data."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from retinanet import coverage as coverage_module
from retinanet.anchors import AnchorGenerator, build_anchors
from retinanet.boxes import pairwise_iou
from retinanet.config import AnchorConfig, DatasetConfig, InputConfig, LossConfig, ModelConfig
from retinanet.coverage import LOW_QUALITY, NOT_TRAINED, REACHED, UNREACHED, anchor_coverage, best_iou, trained_boxes
from retinanet.data.annotations import AnnotationRow, Annotations, ImageRow
from retinanet.data.formats import load_dataset
from retinanet.data.transforms import Resize
from retinanet.matcher import Matcher
from retinanet.structures import Category

SQUARES = ModelConfig(anchors=AnchorConfig(scales=[1.0], ratios=[1.0]))  # one 32 x 32 anchor in each cell of 8 x 8, and so on
SAME = InputConfig(short_edge=128, long_edge=128)
CLASSES = (Category(1, "car"), Category(2, "person"))
# x, y, width, height; the cell 6, 5 of P3 has its centre at 52, 44
EQUAL, HALF, LESS = [36, 28, 32, 32], [36, 36, 32, 16], [36, 36.5, 32, 15]


def data_set(*images: list[Any], size: tuple[int, int] = (128, 128)) -> Annotations:
    """Images with boxes [x, y, width, height], or (box, label, crowd)."""
    rows = []
    for n, boxes in enumerate(images):
        for entry in boxes:
            box, label, crowd = entry if isinstance(entry, tuple) else (entry, 0, False)
            rows.append(AnnotationRow(n, len(rows) + 1, label, [float(v) for v in box], 0.0, crowd))
    pictures = [ImageRow(n, f"{n}.png", *size) for n in range(len(images))]
    return Annotations.pack("truth.json", Path(), CLASSES, pictures, rows)


def test_kinds_by_hand() -> None:
    data = data_set([EQUAL, HALF, LESS])
    found = anchor_coverage(data, SQUARES, SAME, LossConfig())
    assert found.best_iou.tolist() == [1, 0.5, 15 / 32]  # 16 * 32 / 32^2, 15 * 32 / 32^2: all inside the anchor
    assert found.kind.tolist() == [REACHED, REACHED, LOW_QUALITY]  # at the threshold is reached
    assert found.areas.tolist() == [1024, 512, 480]
    assert found.best_iou.dtype == np.float32 and found.kind.dtype == np.int8
    strict = anchor_coverage(data, SQUARES, SAME, LossConfig(low_quality_matches=False))
    assert strict.kind.tolist() == [REACHED, REACHED, UNREACHED]
    picky = anchor_coverage(data, SQUARES, SAME, LossConfig(foreground_iou=0.75))
    assert picky.kind.tolist() == [REACHED, LOW_QUALITY, LOW_QUALITY]
    assert found.share() == pytest.approx(2 / 3) and found.share(LOW_QUALITY) == pytest.approx(1 / 3)


def test_boxes_are_judged_at_the_training_resolution() -> None:
    small = data_set([[18, 14, 16, 16]], size=(64, 64))  # EQUAL in an image of half the size
    assert anchor_coverage(small, SQUARES, SAME, LossConfig()).best_iou.tolist() == [1]
    as_it_is = InputConfig(short_edge=64, long_edge=64)
    # 16 x 16 in 32 x 32 wherever it lies: 1/4
    assert anchor_coverage(small, SQUARES, as_it_is, LossConfig()).best_iou.tolist() == [0.25]
    wide = data_set([[36, 28, 32, 32]], size=(64, 256))  # long_edge 128 halves it: 16 x 16 again
    assert anchor_coverage(wide, SQUARES, SAME, LossConfig()).best_iou.tolist() == [0.25]


def test_what_is_not_trained() -> None:
    data = data_set(
        [(EQUAL, 0, True), [36, 28, 0, 32], [200, 0, 32, 32], [36, 28, -5, 32]],  # crowd, flat, outside, negative
        [],
        [[-16, 28, 48, 32]],  # clipped to 0..32 x 28..60: what is left is an anchor, with its centre at 16, 44
    )
    found = anchor_coverage(data, SQUARES, SAME, LossConfig())
    assert found.kind.tolist() == [NOT_TRAINED] * 4 + [REACHED]
    assert np.isnan(found.best_iou[:4]).all() and np.isnan(found.areas[:4]).all()
    # the nearest centres are at 12 and 20 in x: 28 of 32 columns in common, 28 / (32 + 32 - 28)
    assert found.best_iou[4] == np.float32(28 / 36)
    assert found.share() == 1  # of what is trained


def test_no_boxes_at_all() -> None:
    for data in (data_set([]), data_set([], []), data_set([(EQUAL, 0, True)])):
        found = anchor_coverage(data, SQUARES, SAME, LossConfig())
        assert np.isnan(found.share())
        assert len(found.table(data).splitlines()) == 1  # the heading


def test_table() -> None:
    data = data_set([EQUAL, HALF, (LESS, 1, False), (EQUAL, 1, True)])
    found = anchor_coverage(data, SQUARES, SAME, LossConfig())
    rows = [line.split() for line in found.table(data).splitlines()[1:]]
    # COCO calls 32^2 medium; below it is small
    assert rows == [
        ["car", "2", "100.0%", "0.0%", "0.0%", "0.75"],
        ["person", "1", "0.0%", "100.0%", "0.0%", "0.47"],
        ["(small", "in", "training)", "2", "50.0%", "50.0%", "0.0%", "0.48"],  # of .5 and .46875
        ["(medium", "in", "training)", "1", "100.0%", "0.0%", "0.0%", "1.00"],
        ["(all)", "3", "66.7%", "33.3%", "0.0%", "0.50"],
    ]


@pytest.mark.parametrize("size", [(33, 70), (200, 64), (320, 320), (130, 250)])
@pytest.mark.parametrize(
    "anchors",
    [
        AnchorConfig(),
        AnchorConfig(offset=0),
        AnchorConfig(integer=True, offset=0, strides="grid"),
        AnchorConfig(strides="grid"),
        AnchorConfig(sizes=[16, 32, 64, 128, 256, 512], ratios=[0.2, 1, 3]),
    ],
    ids=["default", "corner", "torchvision", "grid", "p2"],
)
def test_equals_the_best_of_all_anchors(anchors: AnchorConfig, size: tuple[int, int]) -> None:
    """Also at the border, where the nearest cell that there is may not be the nearest that could be."""
    rng = np.random.default_rng(size)
    height, width = size
    corner = rng.uniform(0, [width, height], (300, 2))
    sides = 2 ** rng.uniform(0, 9, (300, 2))
    boxes = np.concatenate([corner - sides / 2, corner + sides / 2], axis=1)  # centred anywhere, also at the very border
    boxes[:40, :2], boxes[:40, 2:] = rng.uniform(-1, 0, (40, 2)), rng.uniform(0.1, 9, (40, 2))  # slivers in the corners
    boxes[40:80] = boxes[:40] + [width - 6, height - 6] * 2
    boxes = torch.from_numpy(boxes.clip(0, [width, height] * 2).astype(np.float32))
    boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(dim=1)]
    generator = build_anchors(anchors)
    padded = [-(-side // 32) * 32 for side in size]
    grids = [(-(-padded[0] // stride), -(-padded[1] // stride)) for stride in generator.strides]
    expected = pairwise_iou(boxes, generator(grids, (padded[0], padded[1]))).amax(dim=1)
    found = best_iou(generator, boxes, torch.tensor([size]).expand(len(boxes), 2))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    assert len(boxes) > 200 and expected.min() < 0.1 and expected.max() > 0.8  # all kinds occurred


def test_parts_give_the_same_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = torch.rand(50, 4) * 60
    boxes[:, 2:] += boxes[:, :2] + 1
    sizes = torch.tensor([[128, 160]]).expand(50, 2)
    whole = best_iou(AnchorGenerator(), boxes, sizes)
    monkeypatch.setattr(coverage_module, "AT_ONCE", 7)
    assert torch.equal(best_iou(AnchorGenerator(), boxes, sizes), whole)
    assert torch.equal(best_iou(AnchorGenerator(), boxes.flip(0), sizes), whole.flip(0))
    assert best_iou(AnchorGenerator(), boxes[:0], sizes[:0]).shape == (0,)


def test_sizes_that_the_annotations_leave_open_come_from_the_files(tmp_path: Path) -> None:
    Image.new("RGB", (128, 128)).save(tmp_path / "0.png")
    (tmp_path / "1.png").write_text("no picture")
    known = data_set([EQUAL], [EQUAL], size=(0, 0))
    found = anchor_coverage(replace(known, image_dir=tmp_path), SQUARES, SAME, LossConfig())
    assert found.kind.tolist() == [REACHED, NOT_TRAINED]  # training stands another image in for the second


def _bccd(folder: Path) -> Annotations:
    root = folder / "bccd" / "BCCD"
    return load_dataset(DatasetConfig(format="voc", path=str(root), annotations=str(root / "ImageSets/Main/val.txt")))


def _coco_mini(folder: Path) -> Annotations:
    root = folder / "coco_mini"
    file = root / "annotations" / "instances_val2017.json"
    return load_dataset(DatasetConfig(format="coco", path=str(root / "val2017"), annotations=str(file)))


@pytest.mark.parametrize("load", [_bccd, _coco_mini])
@pytest.mark.parametrize("short_edge", [120, pytest.param(400, marks=pytest.mark.slow)])
def test_agrees_with_the_matcher(load: Callable[[Path], Annotations], short_edge: int, real_data: Path) -> None:
    """Each box alone, on the boxes and the grid that the loader and the model would make."""
    data = load(real_data)
    input = InputConfig(short_edge=short_edge, long_edge=2 * short_edge)
    found = anchor_coverage(data, ModelConfig(), input, LossConfig())
    boxes = trained_boxes(data, input)
    strict, lenient = Matcher(low_quality_matches=False), Matcher()
    start, kinds = 0, []
    for index in range(len(data)):
        height, width = (int(side) for side in data.sizes[index])
        picture, target = Resize(short_edge, 2 * short_edge)(
            np.zeros((height, width, 3), np.uint8), data.target(index, (height, width)), ()
        )
        assert torch.equal(target.boxes, boxes.boxes[start : start + len(target.boxes)])
        start += len(target.boxes)
        padded = [-(-side // 32) * 32 for side in picture.shape[:2]]
        anchors = AnchorGenerator()([(-(-padded[0] // stride), -(-padded[1] // stride)) for stride in (8, 16, 32, 64, 128)])
        for box in target.boxes[:, None]:
            kinds.append(REACHED if strict(anchors, box).max() == 0 else LOW_QUALITY)
            assert lenient(anchors, box).max() == 0
    assert found.kind[boxes.rows].tolist() == kinds
    assert start == len(boxes.rows) and {REACHED, LOW_QUALITY} == set(kinds)
