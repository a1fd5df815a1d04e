"""Matching of anchors to boxes: by hand, in chunks, and against torchvision.

In the hand-made cases every box and anchor spans 0..10 in y, so that IoU is a ratio of lengths in x.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher as TorchvisionMatcher
from torchvision.ops import box_iou

from retinanet import matcher as matcher_module
from retinanet.anchors import AnchorGenerator
from retinanet.matcher import BACKGROUND, IGNORE, ATSSMatcher, Matcher

STRICT = Matcher(low_quality_matches=False)


def spans(*pairs: tuple[float, float]) -> Tensor:
    return torch.tensor([[left, 0, right, 10] for left, right in pairs]).reshape(-1, 4)


def random_boxes(n: int, seed: int, extent: float = 100) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner, size = torch.rand(n, 2, generator=generator) * extent, torch.rand(n, 2, generator=generator) * 40 + 2
    return torch.cat([corner, corner + size], dim=1)


def test_foreground_between_and_background() -> None:
    anchors = spans(
        (0, 10),  # IoU 1
        (0, 5),  # 5 / 10: at the threshold is foreground
        (0, 4.5),  # 4.5 / 10: between
        (0, 3.9),  # 3.9 / 10: background
        (50, 60),  # 0
    )
    assert STRICT(anchors, spans((0, 10))).tolist() == [0, 0, IGNORE, BACKGROUND, BACKGROUND]


def test_thresholds_are_inclusive_below() -> None:
    matcher = Matcher(foreground_iou=0.5, background_iou=0.25, low_quality_matches=False)
    anchors = spans((0, 4), (0, 2), (0, 1.99))  # 0.5, 0.25 and a little less, all exact or safe in float32
    assert matcher(anchors, spans((0, 8))).tolist() == [0, IGNORE, BACKGROUND]


def test_the_box_of_largest_iou_wins() -> None:
    anchors = spans((0, 10), (20, 30))
    boxes = spans((3, 13), (1, 11), (20, 29))  # 7 / 13, 9 / 11 with the first anchor; 9 / 10 with the second
    assert STRICT(anchors, boxes).tolist() == [1, 2]


def test_low_quality_match() -> None:
    anchors = spans((0, 10), (7, 17), (8, 18))
    boxes = spans((5, 15))  # 5 / 15, 8 / 12 and 7 / 13: two are foreground anyway
    assert STRICT(anchors, boxes).tolist() == [BACKGROUND, 0, 0]
    tiny = spans((2, 3))  # 1 / 10 with the first anchor only: it would never be learnt
    assert STRICT(anchors, tiny).tolist() == [BACKGROUND] * 3
    assert Matcher()(anchors, tiny).tolist() == [0, BACKGROUND, BACKGROUND]


def test_low_quality_lifts_ignored_anchors_too() -> None:
    anchors = spans((0, 4.5), (0, 4.2))  # 0.45 and 0.42, both between the thresholds
    assert STRICT(anchors, spans((0, 10))).tolist() == [IGNORE, IGNORE]
    assert Matcher()(anchors, spans((0, 10))).tolist() == [0, IGNORE]


def test_equally_good_anchors_all_get_the_box() -> None:
    anchors = spans((0, 10), (10, 20), (30, 40))
    assert Matcher()(anchors, spans((9, 11))).tolist() == [0, 0, BACKGROUND]  # 1 / 11 with both


def test_an_anchor_keeps_its_own_best_box() -> None:
    anchors = spans((0, 10), (30, 40))
    boxes = spans((0, 9), (8, 12))  # the first anchor is the best of both: 9 / 10 and 2 / 12
    assert Matcher()(anchors, boxes).tolist() == [0, BACKGROUND]


def test_low_quality_match_changes_to_the_anchors_better_box_only() -> None:
    anchors = spans((0, 10), (20, 50))
    boxes = spans((22, 32), (24, 36))  # with the second anchor 10 / 30 and 12 / 30: best of both, below 0.5
    assert Matcher()(anchors, boxes).tolist() == [BACKGROUND, 1]


def test_a_box_that_touches_no_anchor_matches_none() -> None:
    anchors = spans((0, 10), (20, 30))
    outside = spans((100, 110), (10, 20))  # the second shares only an edge
    assert Matcher()(anchors, outside).tolist() == [BACKGROUND, BACKGROUND]
    # nor does it lift the anchors that another box overlaps a little (4.5 / 10 and 2 / 10)
    anchors = spans((0, 10), (0, 4.5), (0, 2))
    assert Matcher()(anchors, spans((100, 110), (0, 10))).tolist() == [1, IGNORE, BACKGROUND]
    everywhere = spans((-50, 50))
    assert Matcher()(anchors, outside, everywhere).tolist() == [IGNORE] * 3


@pytest.mark.parametrize("broken", [(4, 4), (8, 2), (math.nan, 10), (0, math.inf)])
def test_degenerate_boxes_match_nothing_and_disturb_nothing(broken: tuple[float, float]) -> None:
    anchors = spans((0, 10), (20, 30))
    assert Matcher()(anchors, spans(broken)).tolist() == [BACKGROUND, BACKGROUND]
    assert Matcher()(anchors, spans(broken, (20, 30))).tolist() == [BACKGROUND, 1]


def test_no_boxes() -> None:
    anchors, none = random_boxes(7, seed=0), torch.zeros(0, 4)
    for ignore_boxes in (None, none):
        matches = Matcher()(anchors, none, ignore_boxes)
        assert matches.tolist() == [BACKGROUND] * 7
        assert matches.dtype == torch.int64


def test_crowds_ignore_background_anchors_that_lie_half_inside() -> None:
    anchors = spans(
        (100, 110),  # inside
        (195, 205),  # half of it
        (196, 206),  # 4 of 10
        (0, 10),  # far away
    )
    assert Matcher()(anchors, torch.zeros(0, 4), spans((100, 200))).tolist() == [IGNORE, IGNORE, BACKGROUND, BACKGROUND]


def test_crowds_do_not_touch_foreground_anchors() -> None:
    anchors = spans((0, 10), (20, 40), (50, 60), (0, 4.5))
    boxes = spans((0, 10), (20, 24))  # the second anchor is only a low-quality match: 4 / 20
    everywhere = spans((-100, 100))
    assert Matcher()(anchors, boxes, everywhere).tolist() == [0, 1, IGNORE, IGNORE]
    assert STRICT(anchors, boxes, everywhere).tolist() == [0, IGNORE, IGNORE, IGNORE]


def test_coverage_counts_in_each_crowd_alone() -> None:
    anchors = spans((0, 10))
    halves = spans((-5, 4), (6, 15))  # 4 of 10 in each
    assert Matcher()(anchors, torch.zeros(0, 4), halves).tolist() == [BACKGROUND]


def test_chunks_give_the_same_as_one_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    anchors = random_boxes(400, seed=1)
    boxes = torch.cat([random_boxes(150, seed=2), random_boxes(150, seed=2)])  # each box twice: ties between chunks
    crowds = random_boxes(130, seed=3, extent=60)
    in_chunks = Matcher()(anchors, boxes, crowds)
    assert len(boxes) > matcher_module.BOXES_AT_ONCE and len(crowds) > matcher_module.BOXES_AT_ONCE
    for size in (1, 1000):
        monkeypatch.setattr(matcher_module, "BOXES_AT_ONCE", size)
        assert torch.equal(Matcher()(anchors, boxes, crowds), in_chunks)
    assert {BACKGROUND, IGNORE} < set(in_chunks.tolist())  # every kind of answer occurred
    assert in_chunks.max() < 150  # of two equal boxes the first


@pytest.mark.parametrize("low_quality", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_equals_torchvision(seed: int, low_quality: bool) -> None:
    anchors, boxes = random_boxes(300, seed), random_boxes(90, seed + 100)
    iou = box_iou(boxes, anchors)
    touching = iou.amax(dim=1) > 0  # torchvision matches a box without any overlap to every anchor
    theirs = TorchvisionMatcher(0.5, 0.4, allow_low_quality_matches=low_quality)(iou[touching])
    ours = Matcher(low_quality_matches=low_quality)(anchors, boxes[touching])
    assert torch.equal(ours, theirs)
    assert {BACKGROUND, IGNORE} < set(ours.tolist())


def test_follows_the_thresholds_given() -> None:
    anchors = spans((0, 7), (0, 6), (0, 3), (0, 2))  # IoU 0.7, 0.6, 0.3, 0.2
    matcher = Matcher(foreground_iou=0.65, background_iou=0.25, low_quality_matches=False)
    assert matcher(anchors, spans((0, 10))).tolist() == [0, IGNORE, IGNORE, BACKGROUND]


# --- ATSS


def atss_in_numpy(anchors: np.ndarray, boxes: np.ndarray, level_sizes: list[int], candidates: int) -> list[int]:
    """Algorithm 1 of the paper, box after box and anchor after anchor, in float64."""
    matches, best = [BACKGROUND] * len(anchors), [0.0] * len(anchors)
    iou = box_iou(torch.from_numpy(boxes), torch.from_numpy(anchors)).numpy()
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    for n, box in enumerate(boxes):
        chosen, first = [], 0
        for size in level_sizes:
            distance = np.linalg.norm(centres[first : first + size] - (box[:2] + box[2:]) / 2, axis=1)
            chosen += (first + np.argsort(distance, kind="stable")[:candidates]).tolist()
            first += size
        overlaps = iou[n, chosen]
        for r, overlap in zip(chosen, overlaps, strict=True):
            inside = (centres[r] > box[:2]).all() and (centres[r] < box[2:]).all()
            if inside and overlap >= overlaps.mean() + overlaps.std(ddof=1) and overlap > best[r]:
                matches[r], best[r] = n, overlap
    return matches


def test_atss_by_hand() -> None:
    """Five anchors 10 wide, one in each cell, and a box that covers the middle one and a little of its neighbours."""
    anchors = spans((0, 10), (10, 20), (20, 30), (30, 40), (40, 50))
    # of the nearest three: IoU 1 / 21 (1 of 10 + 12 - 1), 10 / 12, 1 / 21; mean .31, deviation .45: the middle one alone
    assert ATSSMatcher(topk=3, anchors_per_cell=1)(anchors, spans((19, 31))).tolist() == [-1, -1, 0, -1, -1]


def test_atss_foreground_lies_inside_its_box() -> None:
    """The anchor that fits best has its centre beyond the box's edge."""
    anchors = spans((0, 10), (10, 20), (20, 30))
    narrow = spans((11, 14))  # in the second anchor, whose centre is at 15
    assert Matcher()(anchors, narrow).tolist() == [-1, 0, -1]
    assert ATSSMatcher(topk=3, anchors_per_cell=1)(anchors, narrow).tolist() == [-1, -1, -1]


@pytest.mark.parametrize("boxes_at_once", [1, 7, 64])
def test_atss_is_the_papers_algorithm(boxes_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matcher_module, "BOXES_AT_ONCE", boxes_at_once)
    generator = AnchorGenerator(sizes=(16, 32, 64, 128, 256))
    grids = [(16, 20), (8, 10), (4, 5), (2, 3), (1, 2)]  # of 128 x 160 pixels
    anchors, level_sizes = generator(grids), [9 * height * width for height, width in grids]
    boxes = random_boxes(30, 4) + torch.rand(1, generator=torch.Generator().manual_seed(5))  # no ties between cells
    found = ATSSMatcher(topk=9, anchors_per_cell=9)(anchors, boxes, None, level_sizes)
    assert found.tolist() == atss_in_numpy(anchors.double().numpy(), boxes.double().numpy(), level_sizes, 81)
    assert len(found[found >= 0].unique()) >= 20  # most boxes have anchors; small ones between the centres none


def test_atss_without_boxes_or_with_empty_ones_is_all_background() -> None:
    anchors = spans((0, 10), (10, 20))
    matcher = ATSSMatcher(topk=9, anchors_per_cell=1)
    assert matcher(anchors, torch.zeros(0, 4)).tolist() == [-1, -1]
    assert matcher(anchors, torch.tensor([[5.0, 5, 5, 5], [15.0, 0, 15, 10]])).tolist() == [-1, -1]


def test_atss_leaves_out_what_lies_in_a_crowd() -> None:
    anchors = spans((0, 10), (10, 20), (20, 30))
    found = ATSSMatcher(topk=3, anchors_per_cell=1)(anchors, spans((10, 20)), spans((8, 30)), [3])
    assert found.tolist() == [BACKGROUND, 0, IGNORE]
