"""The matching against COCOeval's own arrays, and cases small enough to match by eye."""

import contextlib
import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retinanet.evaluation.matching import BEYOND, NONE, match

NO_CROWD = np.zeros(2, bool)
ONE = np.zeros(2, np.int64)  # all in one image


def boxes(*values: list[float]) -> np.ndarray:
    return np.array(values, np.float64).reshape(-1, 4)


def test_the_best_score_chooses_first_and_the_larger_overlap() -> None:
    """Boxes side by side, 10 wide, 5 apart: IoU 1/3. The second, surer detection lies on box 1 and takes it; the first, at 6,
    overlaps box 1 by 9 of 11 and box 0 by 4 of 16 only, so that it finds nothing."""
    truth = boxes([0, 0, 10, 10], [5, 0, 10, 10])
    found = match(boxes([6, 0, 10, 10], [5, 0, 10, 10]), np.array([0.5, 0.9]), ONE, truth, ONE, NO_CROWD, NO_CROWD)
    assert found.tolist() == [NONE, 1]
    assert match(boxes([6, 0, 10, 10], [5, 0, 10, 10]), np.array([0.9, 0.5]), ONE, truth, ONE, NO_CROWD, NO_CROWD).tolist() == [
        1,
        NONE,
    ]
    found = match(boxes([1, 0, 10, 10]), np.array([0.9]), ONE[:1], truth, ONE, NO_CROWD, NO_CROWD)
    assert found.tolist() == [0]  # 9 of 11, against 6 of 14


def test_a_crowd_is_found_by_many_but_only_by_those_without_a_box() -> None:
    """A crowd's overlap is the share of the detection inside it: 1 for all three. The box, 81 of 100, comes before it."""
    truth = boxes([0, 0, 100, 100], [10, 10, 10, 10])
    detections = boxes([10, 10, 9, 9], [50, 50, 5, 5], [10, 10, 9, 9])
    found = match(detections, np.array([0.9, 0.8, 0.7]), np.zeros(3), truth, ONE, *[np.array([True, False])] * 2)
    assert found.tolist() == [1, 0, 0]


def test_images_are_kept_apart_and_only_the_best_are_looked_at() -> None:
    truth = boxes([0, 0, 10, 10], [0, 0, 10, 10])
    detections = boxes(*[[0, 0, 10, 10]] * 4)
    scores, images = np.array([0.3, 0.1, 0.2, 0.1]), np.array([7, 9, 7, 7])
    found = match(detections, scores, images, truth, np.array([9, 7]), NO_CROWD, NO_CROWD, max_detections=2)
    assert found.tolist() == [1, 0, NONE, BEYOND]


def test_iou_of_one_needs_no_more_than_rounding_allows() -> None:
    box = boxes([0.3, 0.3, 0.6, 0.6])  # 0.9 - 0.3 is not quite 0.6: its IoU with itself is 1 - 9e-16
    assert match(box, np.ones(1), ONE[:1], box, ONE[:1], NO_CROWD[:1], NO_CROWD[:1], iou=1.0).tolist() == [0]


@pytest.mark.parametrize(("detections", "truth"), [(0, 0), (0, 2), (2, 0)])
def test_nothing_to_match(detections: int, truth: int) -> None:
    some = boxes([0, 0, 9, 9], [0, 0, 9, 9])
    found = match(some[:detections], np.ones(detections), ONE[:detections], some[:truth], ONE[:truth], *[NO_CROWD[:truth]] * 2)
    assert found.tolist() == [NONE] * detections


def test_boxes_without_an_inside_overlap_nothing() -> None:
    odd = boxes([5, 5, 0, 9], [9, 9, -4, -4])
    assert match(odd, np.ones(2), ONE, odd, ONE, NO_CROWD, NO_CROWD).tolist() == [NONE, NONE]


def cocoeval_matches(
    detections: np.ndarray, scores: np.ndarray, images: np.ndarray, truth: list[dict[str, Any]], iou: float
) -> tuple[np.ndarray, np.ndarray]:
    """dtMatches [D] as indices into `truth`, and dtIgnore [D], of pycocotools for the range "all", in the detections' order."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO()
        gt.dataset = {"images": [{"id": n} for n in range(3)], "categories": [{"id": 1}], "annotations": truth}
        gt.createIndex()
        columns = [images, detections, scores, np.ones(len(images))]
        result = COCOeval(gt, gt.loadRes(np.column_stack(columns)), "bbox")
        result.params.iouThrs, result.params.areaRng = np.array([iou]), [[0, 1e10]]
        result.evaluate()
    found, ignored = np.full(len(images), BEYOND), np.ones(len(images), bool)
    for image in result.evalImgs:
        if image is not None:
            rows = np.array(image["dtIds"], np.int64) - 1
            found[rows] = image["dtMatches"][0].astype(np.int64) - 1  # numbered from 1; 0 is none
            ignored[rows] = image["dtIgnore"][0]
    return found, ignored


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 130), st.integers(0, 12), st.sampled_from([0.3, 0.5, 0.75, 1.0]))
def test_as_cocoeval_on_whatever_boxes(seed: int, number: int, objects: int, iou: float) -> None:
    """Coarse coordinates and scores, so that scores and overlaps are often equal, and more detections than are looked at."""
    rng = np.random.default_rng(seed)
    detections, truth = (rng.integers(0, [6, 6, 5, 5], (n, 4)).astype(np.float64) for n in (number, objects))
    scores, images, truth_images = rng.integers(0, 4, number) / 4, rng.integers(0, 3, number) // 2, rng.integers(0, 3, objects)
    crowd, large = rng.random(objects) < 0.2, rng.random(objects) < 0.2
    annotations = [
        {
            "id": n + 1,
            "image_id": int(truth_images[n]),
            "category_id": 1,
            "bbox": truth[n].tolist(),
            "area": 1e11 if large[n] else 9.0,  # beyond the range "all": ignored, but taken once as others are
            "iscrowd": int(crowd[n]),
        }
        for n in range(objects)
    ]
    found = match(detections, scores, images, truth, truth_images, crowd, crowd | large, iou=iou)
    expected, expected_ignored = cocoeval_matches(detections, scores, images, annotations, iou)
    np.testing.assert_array_equal(found, expected)
    ignored = (found == BEYOND) | np.append(crowd | large, False)[np.maximum(found, -1)] & (found >= 0)
    np.testing.assert_array_equal(ignored, expected_ignored)
