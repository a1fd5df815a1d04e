"""Box arithmetic: by hand, against torchvision, and by properties on random boxes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_iou

from retinanet.boxes import box_area, clip_boxes, decode_boxes, encode_boxes, pairwise_coverage, pairwise_iou, rescale_boxes

NAN, INF = math.nan, math.inf

position = st.floats(-500, 500, width=32)
side = st.floats(1, 400, width=32)


@st.composite
def boxes_of(draw: st.DrawFn, min_size: int = 1) -> Tensor:
    rows = draw(st.lists(st.tuples(position, position, side, side), min_size=min_size, max_size=6))
    return torch.tensor([[x, y, x + w, y + h] for x, y, w, h in rows]).reshape(-1, 4)


def random_boxes(n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner, size = torch.rand(n, 2, generator=generator) * 100, torch.rand(n, 2, generator=generator) * 60 + 1
    return torch.cat([corner, corner + size], dim=1)


def test_area() -> None:
    boxes = torch.tensor(
        [
            [0.0, 0, 10, 5],  # 10 * 5
            [-4, -3, -1, 1],  # 3 * 4
            [3, 3, 3, 9],  # no width
            [5, 5, 2, 9],  # inverted in x
            [2, 9, 5, 5],  # in y
            [5, 5, 2, 2],  # in both: not (-3) * (-3) = 9
        ]
    )
    assert box_area(boxes).tolist() == [50, 12, 0, 0, 0, 0]
    assert box_area(boxes.reshape(6, 1, 4)).shape == (6, 1)
    assert box_area(torch.zeros(0, 4)).shape == (0,)


def test_iou_by_hand() -> None:
    a = torch.tensor([[0.0, 0, 10, 10]])
    b = torch.tensor(
        [
            [0.0, 0, 10, 10],  # itself
            [5, 0, 15, 10],  # 50 / (100 + 100 - 50)
            [2, 2, 4, 4],  # inside: 4 / 100
            [10, 0, 20, 10],  # touches
            [11, 11, 20, 20],  # apart in both axes: -1 * -1 is no intersection
            [4, 0, 4, 10],  # no width
        ]
    )
    expected = torch.tensor([[1, 1 / 3, 0.04, 0, 0, 0]])
    torch.testing.assert_close(pairwise_iou(a, b), expected)
    torch.testing.assert_close(pairwise_iou(b, a), expected.T)


def test_iou_of_nothing_and_of_nan_is_zero() -> None:
    point = torch.tensor([[3.0, 3, 3, 3]])
    assert pairwise_iou(point, point).item() == 0  # 0 / 0
    broken = torch.tensor([[NAN, 0, 10, 10], [0, 0, INF, 10]])
    assert pairwise_iou(broken, torch.tensor([[0.0, 0, 10, 10]])).tolist() == [[0], [0]]


def test_pairwise_functions_of_no_boxes() -> None:
    none, three = torch.zeros(0, 4), random_boxes(3)
    for function in (pairwise_iou, pairwise_coverage):
        assert function(none, three).shape == (0, 3)
        assert function(three, none).shape == (3, 0)


@given(boxes_of(), boxes_of())
@settings(deadline=None, max_examples=60)
def test_iou_equals_torchvision(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(pairwise_iou(a, b), box_iou(a, b), rtol=0, atol=1e-6)


@given(boxes_of(), boxes_of())
@settings(deadline=None, max_examples=60)
def test_iou_is_symmetric_between_0_and_1_and_1_with_itself(a: Tensor, b: Tensor) -> None:
    iou = pairwise_iou(a, b)
    torch.testing.assert_close(iou, pairwise_iou(b, a).T, rtol=0, atol=1e-6)
    assert (iou >= 0).all() and (iou <= 1 + 1e-6).all()
    torch.testing.assert_close(pairwise_iou(a, a).diagonal(), torch.ones(len(a)))


def test_coverage_is_the_share_of_the_second_box() -> None:
    region = torch.tensor([[0.0, 0, 100, 100], [0, 0, 5, 10]])
    anchors = torch.tensor(
        [
            [10.0, 10, 20, 20],
            [95, 0, 105, 10],  # half of it lies in the first region
            [0, 0, 10, 10],  # all in the first, half in the second
            [7, 7, 7, 9],  # no width
        ]
    )
    assert pairwise_coverage(region, anchors).tolist() == [[1, 0.5, 1, 0], [0, 0, 0.5, 0]]
    assert pairwise_coverage(anchors[:1], region[:1]).item() == pytest.approx(0.01)  # 100 of the region's 10,000


def test_encode_by_hand() -> None:
    anchor = torch.tensor([0.0, 0, 10, 20])  # centre (5, 10)
    box = torch.tensor([5.0, 10, 25, 30])  # centre (15, 20), 20 x 20
    expected = torch.tensor([1.0, 0.5, math.log(2), 0])  # (15 - 5) / 10, (20 - 10) / 20, ln(20 / 10), ln(20 / 20)
    torch.testing.assert_close(encode_boxes(box, anchor), expected)
    torch.testing.assert_close(decode_boxes(expected, anchor), box)


def test_deltas_of_zero_are_the_anchor_itself() -> None:
    anchors = random_boxes(20)
    torch.testing.assert_close(decode_boxes(torch.zeros(20, 4), anchors), anchors)
    torch.testing.assert_close(encode_boxes(anchors, anchors), torch.zeros(20, 4), rtol=0, atol=1e-6)


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_decode_inverts_encode(data: st.DataObject) -> None:
    boxes = data.draw(boxes_of())
    anchors = data.draw(boxes_of())[: len(boxes)]
    boxes = boxes[: len(anchors)]
    # sides are 1..400, below the clamp at 62.5 times the anchor only if the anchor is not the tiny one
    growth = (boxes[:, 2:] - boxes[:, :2]) / (anchors[:, 2:] - anchors[:, :2])
    held = (growth < 62).all(dim=1)
    torch.testing.assert_close(decode_boxes(encode_boxes(boxes, anchors), anchors)[held], boxes[held], rtol=1e-5, atol=2e-3)


def test_encode_and_decode_equal_torchvision() -> None:
    coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
    boxes, anchors = random_boxes(50, seed=1), random_boxes(50, seed=2)
    torch.testing.assert_close(encode_boxes(boxes, anchors), coder.encode_single(boxes, anchors), rtol=1e-5, atol=1e-5)
    deltas = torch.randn(50, 4, generator=torch.Generator().manual_seed(3)) * 3  # beyond the clamp too
    assert (deltas[:, 2:] > math.log(62.5)).any()
    torch.testing.assert_close(decode_boxes(deltas, anchors), coder.decode_single(deltas, anchors), rtol=1e-5, atol=1e-3)


def test_encode_and_decode_take_leading_dimensions_and_no_boxes() -> None:
    boxes, anchors = random_boxes(6, seed=1), random_boxes(6, seed=2)
    deltas = encode_boxes(boxes.reshape(2, 3, 4), anchors.reshape(2, 3, 4))
    torch.testing.assert_close(deltas.reshape(6, 4), encode_boxes(boxes, anchors))
    torch.testing.assert_close(decode_boxes(deltas, anchors.reshape(2, 3, 4)).reshape(6, 4), boxes, rtol=1e-5, atol=1e-3)
    none = torch.zeros(0, 4)
    assert encode_boxes(none, none).shape == decode_boxes(none, none).shape == (0, 4)


def test_decode_bounds_growth_but_not_shrinking() -> None:
    anchor = torch.tensor([0.0, 0, 16, 16])  # centre 8
    grown = decode_boxes(torch.tensor([0.0, 0, 1e4, INF]), anchor)
    torch.testing.assert_close(grown, torch.tensor([-492.0, -492, 508, 508]))  # 8 -+ 16 * (1000 / 16) / 2
    shrunk = decode_boxes(torch.tensor([0.0, 0, -1e4, -INF]), anchor)
    assert shrunk.tolist() == [8, 8, 8, 8]


def test_decode_passes_nan_on() -> None:
    decoded = decode_boxes(torch.tensor([[NAN, 0, 0, 0], [0, 0, 0, NAN]]), torch.tensor([[0.0, 0, 10, 10]]))
    assert decoded.isnan().tolist() == [[True, False, True, False], [False, True, False, True]]


def test_clip() -> None:
    boxes = torch.tensor(
        [
            [-5.0, -6, 200, 300],  # larger than the image
            [10, 20, 30, 40],  # inside
            [120, 10, 140, 20],  # right of the image: width 0 is left
            [-9, -9, -1, -1],
        ]
    )
    before = boxes.clone()
    clipped = clip_boxes(boxes, (50, 100))  # height 50, width 100
    assert clipped.tolist() == [[0, 0, 100, 50], [10, 20, 30, 40], [100, 10, 100, 20], [0, 0, 0, 0]]
    assert torch.equal(boxes, before)
    assert clip_boxes(torch.zeros(0, 4), (50, 100)).shape == (0, 4)


def test_clip_keeps_nan_and_bounds_infinity() -> None:
    clipped = clip_boxes(torch.tensor([[NAN, -INF, INF, 10]]), (50, 100))
    assert clipped[0, 0].isnan()
    assert clipped[0, 1:].tolist() == [0, 100, 10]


def test_rescale() -> None:
    boxes = torch.tensor([[10.0, 20, 30, 40]])
    # height 50 -> 100 doubles y, width 100 -> 150 is 1.5 times x
    assert rescale_boxes(boxes, (50, 100), (100, 150)).tolist() == [[15, 40, 45, 80]]
    assert torch.equal(rescale_boxes(boxes, (50, 100), (50, 100)), boxes)
    assert rescale_boxes(torch.zeros(0, 4), (50, 100), (100, 150)).shape == (0, 4)


@given(boxes_of(), st.tuples(*[st.integers(1, 2000)] * 4))
@settings(deadline=None, max_examples=40)
def test_rescale_there_and_back(boxes: Tensor, sizes: tuple[int, int, int, int]) -> None:
    size, new_size = sizes[:2], sizes[2:]
    back = rescale_boxes(rescale_boxes(boxes, size, new_size), new_size, size)
    torch.testing.assert_close(back, boxes, rtol=1e-5, atol=1e-4)
