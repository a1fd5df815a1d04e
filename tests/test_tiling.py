"""Large pictures in tiles: where the tiles lie, and that what lies on their seams is found once and whole."""

import resource
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from finder import CATEGORIES, RectangleFinder, draw, grey

from retinanet.boxes import pairwise_iou
from retinanet.config import InputConfig
from retinanet.errors import UserError
from retinanet.predictor import Predictor
from retinanet.structures import Detections
from retinanet.tiling import Tiling, touches_seam

Found = tuple[list[float], float, int]  # box, score, label


def detections(*found: Found) -> Detections:
    boxes = torch.tensor([box for box, _, _ in found]).reshape(-1, 4)
    scores, labels = (torch.tensor([entry[n] for entry in found]) for n in (1, 2))
    return Detections(boxes, scores.float(), labels.long(), CATEGORIES)


def as_found(merged: Detections) -> list[Found]:
    boxes, scores, labels = merged.numpy()
    return [(b, pytest.approx(s), k) for b, s, k in zip(boxes.tolist(), scores.tolist(), labels.tolist(), strict=True)]


@pytest.mark.parametrize(
    ("size", "tile", "overlap", "columns", "rows"),
    [
        # 2500 - 1000 = 1500 to go in steps of 800 at most: two of 750; the height is one tile
        ((1000, 2500), 1000, 0.2, [(0, 1000), (750, 1750), (1500, 2500)], [(0, 1000)]),
        # one pixel more than a tile: two tiles almost on top of each other
        ((101, 100), 100, 0.2, [(0, 100)], [(0, 100), (1, 101)]),
        # without overlap they touch; 250 - 100 = 150 in two steps of 75, so that they overlap all the same
        ((100, 250), 100, 0.0, [(0, 100), (75, 175), (150, 250)], [(0, 100)]),
        # a picture lower than a tile: tiles as high as the picture
        ((60, 180), 100, 0.2, [(0, 100), (80, 180)], [(0, 60)]),
    ],
)
def test_where_tiles_lie(
    size: tuple[int, int], tile: int, overlap: float, columns: list[tuple[int, int]], rows: list[tuple[int, int]]
) -> None:
    whole, *tiles = Tiling(tile, overlap).regions(size)
    assert whole == (0, 0, size[1], size[0])
    assert tiles == [(x1, y1, x2, y2) for y1, y2 in rows for x1, x2 in columns]


def test_a_picture_of_one_tile_is_looked_at_once() -> None:
    assert Tiling(100).regions((100, 100)) == [(0, 0, 100, 100)]
    assert Tiling(100).regions((7, 30)) == [(0, 0, 30, 7)]


def test_tiles_cover_the_picture_and_share_what_was_asked() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        width, tile, overlap = int(rng.integers(33, 900)), int(rng.integers(32, 200)), float(rng.uniform(0, 0.9))
        tiles = sorted({(x1, x2) for x1, _, x2, _ in Tiling(tile, overlap).regions((20, width)) if x2 - x1 <= tile})
        assert tiles[0][0] == 0 and tiles[-1][1] == width
        assert all(x2 - x1 == min(tile, width) for x1, x2 in tiles)
        shared = [left[1] - right[0] for left, right in pairwise(tiles)]
        assert all(pixels >= overlap * tile for pixels in shared)


@pytest.mark.parametrize(("tile", "overlap"), [(0, 0.2), (-5, 0.2), (31, 0.2), (512, 1.0), (512, -0.1), (512, float("nan"))])
def test_tiles_that_cannot_be(tile: int, overlap: float) -> None:
    with pytest.raises(UserError, match=r"at least 32 pixels|0\.\.0\.9"):
        Tiling(tile, overlap)


def test_what_touches_a_seam() -> None:
    """Tile (80, 0, 180, 100) of a picture 100 high and 260 wide: its left and right borders are seams, the others not."""
    boxes = torch.tensor(
        [
            [80.0, 20, 110, 50],  # begins at the left seam
            [84.0, 20, 110, 50],  # 4 pixels from it: near enough
            [85.0, 20, 110, 50],  # 5 pixels, more than 4 and than a tenth of 25
            [100.0, 20, 172, 50],  # 8 from the right one, but more than a tenth of 72
            [100.0, 20, 173, 50],  # 7 from it, less than a tenth of 73
            [100.0, 0, 120, 100],  # at the picture's own borders
        ]
    )
    cut = touches_seam(boxes, torch.tensor([[80, 0, 180, 100]]).expand(6, 4), (100, 260))
    assert cut.tolist() == [True, True, False, False, True, False]


# A picture 100 high and 180 wide in tiles of 100 that share 20 columns, 80 to 100.
PICTURE, PAIR = (100, 180), Tiling(100, 0.2)
NOTHING = detections()


def merged(whole: Detections, left: Detections, right: Detections, agnostic: bool = False) -> list[Found]:
    assert PAIR.regions(PICTURE) == [(0, 0, 180, 100), (0, 0, 100, 100), (80, 0, 180, 100)]
    return as_found(PAIR.merge([whole, left, right], PICTURE, nms_threshold=0.5, class_agnostic=agnostic))


def test_seen_whole_wins_over_cut_off() -> None:
    """An object from 82 to 112: cut in the left tile at 100, whole in the right one, which scores less."""
    left, right = ([82.0, 10, 100, 40], 0.95, 0), ([85.0, 10, 112, 40], 0.6, 0)
    assert merged(NOTHING, detections(left), detections(right)) == [right]


def test_seen_whole_twice_the_better_one_stays() -> None:
    one, other = ([85.0, 10, 95, 40], 0.7, 0), ([86.0, 10, 95, 40], 0.8, 0)
    assert merged(NOTHING, detections(one), detections(other)) == [other]
    assert merged(NOTHING, detections(other), detections(one)) == [other]


def test_a_weak_whole_does_not_hide_a_strong_fragment() -> None:
    left, right = ([70.0, 10, 100, 40], 0.95, 0), ([85.0, 5, 125, 60], 0.4, 0)  # of which 15 x 30 of 30 x 30 are shared
    assert merged(NOTHING, detections(left), detections(right)) == [left, right]
    right = (right[0], 0.5, 0)
    assert merged(NOTHING, detections(left), detections(right)) == [right]


def test_an_object_that_is_whole_nowhere_is_joined() -> None:
    """From 40 to 150. In columns 80 to 100, which both see, both reach from row 10 to 40 or 41."""
    left, right = ([40.0, 10, 100, 40], 0.7, 0), ([80.0, 10, 150, 41], 0.9, 0)
    assert merged(NOTHING, detections(left), detections(right)) == [([40, 10, 150, 41], 0.9, 0)]


def test_fragments_that_disagree_are_two_objects() -> None:
    left, right = ([40.0, 10, 100, 40], 0.9, 0), ([80.0, 30, 150, 60], 0.7, 0)  # shared rows: 30 to 40 of 10 to 60
    assert merged(NOTHING, detections(left), detections(right)) == [left, right]
    other_class = (left[0], 0.7, 1)
    assert merged(NOTHING, detections(left), detections(other_class)) == [left, other_class]


def test_larger_than_a_tile() -> None:
    """The whole picture shows it; its parts in the tiles are left out, better though they score."""
    whole = ([20.0, 5, 170, 95], 0.6, 0)
    parts = detections(([20.0, 5, 100, 95], 0.9, 0)), detections(([80.0, 5, 170, 95], 0.8, 0))
    assert merged(detections(whole), *parts) == [whole]


def test_the_whole_picture_does_not_speak_of_small_objects() -> None:
    """20 x 20 is no larger than the overlap: a tile sees it whole, and larger, or else it was none."""
    small, larger = ([10.0, 10, 30, 30], 0.9, 0), ([10.0, 50, 31, 60], 0.9, 0)
    assert merged(detections(small, larger), NOTHING, NOTHING) == [larger]


def test_a_tiles_own_objects_do_not_suppress_each_other() -> None:
    """IoU 20 / 30 > 0.5: its own NMS (a soft one) has let both through."""
    pair = ([10.0, 10, 35, 20], 0.9, 0), ([15.0, 10, 40, 20], 0.8, 0)
    assert merged(NOTHING, detections(*pair), NOTHING) == list(pair)
    assert merged(NOTHING, detections(pair[0]), NOTHING) == [pair[0]]


def test_an_object_within_another_stays() -> None:
    """Both whole, of one class, from different tiles: a child before its mother, not a duplicate."""
    mother, child = ([30.0, 5, 94, 90], 0.9, 0), ([86.0, 50, 92, 80], 0.8, 0)
    assert merged(NOTHING, detections(mother), detections(child)) == [mother, child]


def test_classes_are_apart_unless_asked() -> None:
    red, green = ([85.0, 10, 95, 40], 0.7, 0), ([85.0, 10, 95, 40], 0.8, 1)
    assert merged(NOTHING, detections(red), detections(green)) == [green, red]
    assert merged(NOTHING, detections(red), detections(green), agnostic=True) == [green]


def test_nothing_anywhere() -> None:
    assert merged(NOTHING, NOTHING, NOTHING) == []


def test_four_corners() -> None:
    """180 x 180 in four tiles: cut off in each of them at both seams, an object of 60 x 60 in the middle becomes one."""
    tiling = Tiling(100, 0.2)
    parts = [(60.0, 60, 100, 100), (80.0, 60, 120, 100), (60.0, 80, 100, 120), (80.0, 80, 120, 120)]
    found = [NOTHING, *(detections((list(box), 0.5 + n / 10, 1)) for n, box in enumerate(parts))]
    merged = tiling.merge(found, (180, 180), nms_threshold=0.5)
    assert as_found(merged) == [([60, 60, 120, 120], 0.8, 1)]


def scattered(height: int, width: int, count: int, seed: int) -> tuple[np.ndarray, list[tuple[int, ...]]]:
    """A picture with up to `count` rectangles, 4 to 90 pixels a side and 6 apart, and (label, x1, y1, x2, y2) of each."""
    rng = np.random.default_rng(seed)
    image, taken, truth = grey(height, width), np.zeros((height, width), bool), list[tuple[int, ...]]()
    for _ in range(count):
        w, h = (int(side) for side in rng.integers(4, 90, 2))
        x, y, label = int(rng.integers(0, width - w)), int(rng.integers(0, height - h)), int(rng.integers(2))
        if not taken[max(0, y - 6) : y + h + 6, max(0, x - 6) : x + w + 6].any():
            taken[y : y + h, x : x + w] = True
            draw(image, label, (x, y, x + w, y + h))
            truth.append((label, x, y, x + w, y + h))
    return image, truth


def tiled(edge: int, tile: int, overlap: float = 0.2, jitter: float = 0.0) -> tuple[Predictor, RectangleFinder]:
    finder = RectangleFinder(jitter)
    size = InputConfig(short_edge=edge, long_edge=2 * edge)
    options = {"device": "cpu", "precision": "fp32", "tile": tile, "overlap": overlap}
    return Predictor(finder, CATEGORIES, input=size, **options), finder  # type: ignore[arg-type]


def test_every_object_of_a_large_picture_is_found_once() -> None:
    """Tiles of 400 at a short edge of 400: pixel for pixel. Objects are smaller than the overlap of 100."""
    image, truth = scattered(1100, 1500, 600, seed=0)
    predictor, finder = tiled(400, 400, 0.25)
    found = predictor(image)
    boxes, _, labels = found.numpy()
    assert len(truth) > 150
    assert sorted((k, *b) for k, b in zip(labels.tolist(), boxes.round().astype(int).tolist(), strict=True)) == sorted(truth)
    # 1100 high: 700 in 3 steps of 300 at most; 1500 wide: 1100 in 4 -> 4 x 5 tiles, and the whole; 8 in a forward
    assert finder.batches == [8, 8, 5]
    assert finder.sizes == [[400, 545]] + [[400, 400]] * 20


def test_a_detector_that_errs_finds_nearly_every_object_once() -> None:
    """4000 x 3000, boxes off by 6 % a side, objects up to nearly the overlap: at most 2 % are missed, 1 % found twice."""
    image, truth = scattered(3000, 4000, 2500, seed=2)
    predictor, _ = tiled(500, 500, 0.2, jitter=0.06)
    found = predictor(image)
    boxes = torch.tensor(truth, dtype=torch.float32)
    iou = pairwise_iou(boxes[:, 1:], found.boxes) * (boxes[:, :1] == found.labels)
    hit = iou.amax(dim=1) >= 0.5
    assert len(truth) > 1000
    assert hit.float().mean() >= 0.98
    assert len(found) <= int(hit.sum()) + 0.01 * len(truth)


def test_tiles_are_resized_as_pictures_are() -> None:
    """Tiles of 256 enlarged to 400: what is found is in pixels of the picture all the same."""
    image, truth = scattered(500, 700, 60, seed=1)
    found = tiled(400, 256, 0.4)[0](image)
    boxes, _, labels = found.numpy()
    assert len(boxes) == len(truth) > 20
    expected = np.array(truth)
    order = np.array([np.abs(boxes - row[1:]).max(axis=1).argmin() for row in expected])
    assert sorted(order.tolist()) == list(range(len(truth)))  # each is the nearest of one
    np.testing.assert_allclose(boxes[order], expected[:, 1:], atol=1.5)
    assert labels[order].tolist() == expected[:, 0].tolist()


def test_one_large_object_among_small_ones() -> None:
    image = grey(1000, 1000)
    draw(image, 0, (100, 150, 900, 850))  # twice a tile
    draw(image, 1, (20, 20, 60, 60))
    found = tiled(400, 400)[0](image)
    assert sorted(found.names) == ["green", "red"]
    np.testing.assert_allclose(found.boxes[found.labels == 0].numpy(), [[100, 150, 900, 850]], atol=3)
    np.testing.assert_allclose(found.boxes[found.labels == 1].numpy(), [[20, 20, 60, 60]], atol=0.1)


def test_a_list_of_pictures_of_many_sizes() -> None:
    images = [scattered(h, w, 40, seed=n) for n, (h, w) in enumerate([(500, 700), (90, 120), (400, 401)])]
    found = tiled(400, 400, 0.25)[0]([image for image, _ in images])
    assert [len(one) for one in found] == [len(truth) for _, truth in images]


@pytest.mark.slow
def test_a_mosaic_of_photographs_in_bounded_memory(real_data: Path) -> None:
    """4000 x 3000 pixels in tiles of 1024, ResNet-50: the picture, a batch of two tiles and their activations."""
    from test_export_resnet50 import lively_resnet50

    from retinanet.data.images import read_image, resize

    files = sorted((real_data / "coco_mini" / "val2017").glob("*.jpg"))
    mosaic = np.empty((3000, 4000, 3), np.uint8)
    for n in range(6 * 6):
        y, x = n // 6 * 500, n % 6 * 640
        mosaic[y : y + 500, x : x + 640] = resize(read_image(files[n % len(files)]), (500, 640))
    mosaic[:, 3840:] = 110
    checkpoint = lively_resnet50(torch.from_numpy(mosaic[:256, :384]).permute(2, 0, 1)[None])
    predictor = Predictor.from_checkpoint(checkpoint, score_threshold=0.05, device="cpu", precision="fp32", tile=1024)
    predictor(mosaic[:1024, :1024])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = predictor([mosaic], batch_size=2)[0]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert len(found) > 100
    assert grown < 300 * (2**20 if sys.platform == "darwin" else 2**10)  # kilobytes on Linux
