"""Several looks at one picture: what is fused, and how it scores."""

from typing import Any

import numpy as np
import pytest
import torch
from finder import CATEGORIES, RectangleFinder, draw, grey
from test_predictor import picture, predictor_of, tiny_model
from test_tiling import as_found, detections

from retinanet.config import InputConfig, PostprocessConfig
from retinanet.predictor import Predictor
from retinanet.test_time import fuse, mirror_boxes

BOX = [0.0, 0, 10, 10]


def test_mirrored_boxes() -> None:
    """In a picture 100 wide; twice is nothing."""
    boxes = torch.tensor([[10.0, 20, 30, 60], [0, 0, 100, 5]])
    assert mirror_boxes(boxes, 100).tolist() == [[70, 20, 90, 60], [0, 0, 100, 5]]
    assert mirror_boxes(mirror_boxes(boxes, 100), 100).tolist() == boxes.tolist()


def test_the_fused_box_is_the_mean_weighted_by_score() -> None:
    """IoU 100 / 120. The lower border: (10 * 0.8 + 12 * 0.4) / 1.2 = 10.667; the score: (0.8 + 0.4) / 2."""
    merged = fuse([detections((BOX, 0.8, 0)), detections(([0, 0, 10, 12], 0.4, 0))])
    np.testing.assert_allclose(merged.boxes.numpy(), [[0, 0, 10, 12.8 / 1.2]], rtol=1e-6)
    assert (merged.scores.tolist(), merged.labels.tolist()) == ([pytest.approx(0.6)], [0])


def test_what_few_looks_saw_scores_less() -> None:
    """Seen by one of four: a quarter of 0.8; by two: (0.6 + 0.6) / 2 * 2 / 4 = 0.3, and so first."""
    other = [50.0, 50, 70, 70]
    looks = [detections((BOX, 0.8, 0)), detections((other, 0.6, 1)), detections((other, 0.6, 1)), detections()]
    assert as_found(fuse(looks)) == [(other, pytest.approx(0.3), 1), (BOX, pytest.approx(0.2), 0)]


def test_one_look_twice_at_one_object_counts_no_more_than_all_looks() -> None:
    """Three boxes of two looks: the mean of the scores, not one and a half times it."""
    merged = fuse([detections((BOX, 0.9, 0), (BOX, 0.3, 0)), detections((BOX, 0.6, 0))])
    assert as_found(merged) == [(BOX, pytest.approx(0.6), 0)]


def test_classes_are_apart_unless_asked() -> None:
    looks = [detections((BOX, 0.8, 0)), detections((BOX, 0.6, 1))]
    assert as_found(fuse(looks)) == [(BOX, pytest.approx(0.4), 0), (BOX, pytest.approx(0.3), 1)]
    assert as_found(fuse(looks, class_agnostic=True)) == [(BOX, pytest.approx(0.7), 0)]


def test_the_best_are_kept_and_nothing_is_nothing() -> None:
    many = detections(*(([n * 20.0, 0, n * 20 + 10, 10], 0.1 + n / 10, 0) for n in range(5)))
    assert fuse([many, many], max_detections=2).boxes[:, 0].tolist() == [80, 60]
    assert len(fuse([detections(), detections()])) == 0


def finder_predictor(**options: Any) -> tuple[Predictor, RectangleFinder]:
    finder = RectangleFinder()
    size = InputConfig(short_edge=160, long_edge=320)
    return Predictor(finder, CATEGORIES, input=size, device="cpu", precision="fp32", **options), finder  # type: ignore[arg-type]


def two_objects() -> np.ndarray:
    """Far from symmetric. Every side is a multiple of 8 pixels, so that edges stay sharp at three quarters."""
    image = grey(160, 240)
    draw(image, 0, (16, 24, 64, 80))
    draw(image, 1, (128, 96, 232, 136))
    return image


def test_a_detector_that_sees_the_same_at_every_look_finds_the_same() -> None:
    predictor, finder = finder_predictor(tta=True)
    found, plain = predictor(two_objects()), finder_predictor()[0](two_objects())
    assert finder.sizes == [[120, 180]] * 2 + [[160, 240]] * 2 + [[200, 300]] * 2  # plain and mirrored
    assert sorted(found.names) == sorted(plain.names) == ["green", "red"]
    order, plain_order = found.labels.argsort(), plain.labels.argsort()
    np.testing.assert_allclose(found.boxes[order].numpy(), plain.boxes[plain_order].numpy(), atol=0.7)
    np.testing.assert_allclose(found.scores.numpy(), plain.scores.numpy(), rtol=1e-5)


def test_the_looks_of_several_pictures_share_batches() -> None:
    predictor, finder = finder_predictor(tta=True)
    assert [len(found) for found in predictor([two_objects()] * 3, batch_size=3)] == [2, 2, 2]
    assert finder.batches == [3] * 6
    assert finder.sizes[:6] == [[120, 180]] * 6  # both looks of one scale follow each other


def test_with_tiles() -> None:
    """Each tile has its six looks: 2 tiles and the whole, 18 in all."""
    image = np.concatenate([two_objects()[:, 120:], two_objects()[:, :120]], axis=1)
    predictor, finder = finder_predictor(tta=True, tile=160, overlap=0.25)
    assert sorted(predictor(image).names) == ["green", "red"]
    assert len(finder.sizes) == 18


def test_thresholds_are_of_the_fused_scores() -> None:
    """A network that answers differently at every look: with a threshold what is left is a part of what is there without."""
    model, post = tiny_model(), PostprocessConfig(score_threshold=0.01)
    everything = predictor_of(model, score_threshold=0.01, tta=True, postprocess=post)(picture())
    limit = float(everything.scores.median())
    some = predictor_of(model, score_threshold=limit, tta=True, postprocess=post)(picture())
    assert as_found(some) == as_found(everything)[: len(some)]
    assert 0 < len(some) == int((everything.scores >= limit).sum()) < len(everything)
