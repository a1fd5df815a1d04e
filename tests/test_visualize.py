"""Pictures with boxes: where the lines lie, what colour they have, and that every caption can be read."""

import colorsys

import numpy as np
import pytest
import torch

from retinanet.structures import Category, Detections, Target
from retinanet.visualize import class_color, contact_sheet, draw_boxes, draw_detections, draw_target, side_by_side

SIDE = 480  # from this side on nothing is enlarged
BLACK = np.zeros((SIDE, SIDE, 3), np.uint8)
CATEGORIES = (Category(3, "bird"), Category(90, "tooth brush"))
NO_BOXES = np.zeros((0, 4))


def test_nothing_to_draw_leaves_the_picture_as_it_is() -> None:
    image = np.random.default_rng(0).integers(0, 255, (500, 700, 3), dtype=np.uint8)
    np.testing.assert_array_equal(draw_boxes(image, NO_BOXES, [], []), image)
    nothing = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), CATEGORIES)
    np.testing.assert_array_equal(draw_detections(image, nothing), image)


def test_the_given_picture_is_not_drawn_on() -> None:
    image = BLACK.copy()
    drawn = draw_boxes(image, np.array([[10, 100, 90, 200]]), [0], ["bird"])
    assert image.max() == 0 and drawn.max() > 0


def test_outlines_lie_on_the_box_in_the_class_colour() -> None:
    """A line is 2 pixels wide at this size (480 // 240) and lies inside the box."""
    picture = draw_boxes(BLACK, np.array([[100, 150, 300, 400]]), [4], [""])
    color = class_color(4)
    for y, x in ((150, 200), (151, 200), (400, 200), (399, 200), (300, 100), (300, 101), (300, 300), (300, 299)):
        assert tuple(picture[y, x]) == color, (y, x)
    for y, x in ((402, 200), (300, 98), (300, 302), (300, 200), (160, 200), (395, 200)):
        assert tuple(picture[y, x]) == (0, 0, 0), (y, x)


def test_a_box_as_large_as_the_picture_can_be_seen() -> None:
    picture = draw_boxes(BLACK, np.array([[0, 0, SIDE, SIDE]]), [0], [""])
    for y, x in ((300, 0), (SIDE - 1, 300), (300, SIDE - 1)):
        assert tuple(picture[y, x]) == class_color(0), (y, x)


@pytest.mark.parametrize(
    ("shape", "zoomed"),
    [
        ((120, 160), (480, 640)),  # the shorter side becomes 480
        ((160, 120), (640, 480)),
        ((480, 480), (480, 480)),
        ((900, 1600), (900, 1600)),  # large enough
        ((10, 4000), (10, 4000)),  # already longer than 4 x 480 = 1920
        ((1, 192), (10, 1920)),  # would become 480 x 92160: the longer side stops at 1920
        ((1, 1), (480, 480)),
    ],
)
def test_small_pictures_are_enlarged(shape: tuple[int, int], zoomed: tuple[int, int]) -> None:
    image = np.full((*shape, 3), 77, np.uint8)
    picture = draw_boxes(image, NO_BOXES, [], [])
    assert picture.shape == (*zoomed, 3) and picture.dtype == np.uint8
    assert (picture == 77).all()


def test_boxes_grow_with_the_picture() -> None:
    """120 pixels become 480: the box 10, 20 .. 50, 80 is drawn at 40, 80 .. 200, 320."""
    picture = draw_boxes(np.zeros((120, 120, 3), np.uint8), np.array([[10, 20, 50, 80]]), [1], [""])
    for y, x in ((80, 120), (320, 120), (200, 40), (200, 200)):
        assert tuple(picture[y, x]) == class_color(1)
    assert tuple(picture[200, 120]) == (0, 0, 0)


@pytest.mark.parametrize("x", [0, 200, SIDE - 1, SIDE])
@pytest.mark.parametrize("y", [0, 200, SIDE - 1, SIDE])
def test_captions_stay_inside(x: int, y: int) -> None:
    """A caption at the border must show as many pixels as one in the middle.

    The box is a point, drawn as 3 x 3 pixels, which the caption may cover or not: hence the 9. One row of the caption's
    ground cut off would be some 50 pixels, one column 18.
    """
    middle = draw_boxes(BLACK, np.array([[200, 200, 200, 200]]), [0], ["bird 0.87"])
    moved = draw_boxes(BLACK, np.array([[x, y, x, y]]), [0], ["bird 0.87"])
    visible, expected = (int((picture != 0).any(axis=2).sum()) for picture in (moved, middle))
    assert expected > 500
    assert abs(visible - expected) <= 9


def test_a_caption_lies_above_its_box_and_inside_at_the_top() -> None:
    above = draw_boxes(BLACK, np.array([[100, 200, 300, 400]]), [0], ["bird"])
    assert tuple(above[198, 102]) == class_color(0) and tuple(above[220, 110]) == (0, 0, 0)
    inside = draw_boxes(BLACK, np.array([[100, 5, 300, 400]]), [0], ["bird"])
    assert tuple(inside[7, 104]) == class_color(0) and tuple(inside[2, 110]) == (0, 0, 0)


def test_too_long_a_caption_is_shortened() -> None:
    """It would reach far beyond the picture; its ground must end before the last column or with it, and letters be left."""
    picture = draw_boxes(BLACK, np.array([[200, 200, 200, 200]]), [0], ["a very long name of a class " * 10])
    row = picture[:200][(picture[:200] != 0).any(axis=(1, 2))][1]  # a row of the ground between border and letters
    assert 400 < (row != 0).any(axis=1).sum() <= SIDE


def test_letters_contrast_with_their_ground() -> None:
    for label in range(12):
        picture = draw_boxes(np.full_like(BLACK, 77), np.array([[200, 200, 200, 200]]), [label], ["bird"])
        luminance = 0.299 * class_color(label)[0] + 0.587 * class_color(label)[1] + 0.114 * class_color(label)[2]
        letters = 0 if luminance > 140 else 255
        assert (abs(picture.astype(int) - letters) < 50).all(axis=2).sum() > 20
        assert abs(luminance - letters) > 100


@pytest.mark.parametrize(
    "box",
    [
        [50, 100, 50, 200],  # no width
        [50, 100, 90, 100],  # no height
        [50, 100, 50, 100],
        [90, 200, 50, 100],  # inside out
        [-500, -500, 2000, 2000],
        [0.2, 0.4, 0.3, 0.6],  # smaller than a line is wide
        [700, 700, 800, 800],  # outside
    ],
)
def test_odd_boxes_are_drawn_without_fault(box: list[float]) -> None:
    picture = draw_boxes(BLACK, np.array([box]), [0], ["bird 0.50"])
    assert picture.shape == BLACK.shape
    assert (picture == class_color(0)).all(axis=2).sum() > 100  # the caption can be seen in any case


def test_the_best_detection_is_on_top() -> None:
    """Detections come best first; where two outlines cross, the better one's colour shows."""
    boxes = np.array([[100, 100, 300, 300], [200, 100, 400, 300]])
    picture = draw_boxes(BLACK, boxes, [0, 1], ["", ""])
    assert tuple(picture[100, 250]) == class_color(0)
    swapped = draw_boxes(BLACK, boxes, [1, 0], ["", ""])
    assert tuple(swapped[100, 250]) == class_color(1)


def test_detections_carry_name_and_score() -> None:
    detections = Detections(torch.tensor([[100.0, 100.0, 300.0, 300.0]]), torch.tensor([0.876]), torch.tensor([1]), CATEGORIES)
    expected = draw_boxes(BLACK, detections.boxes.numpy(), [1], ["tooth brush 0.88"])
    np.testing.assert_array_equal(draw_detections(BLACK, detections), expected)


def test_truth_carries_the_name() -> None:
    target = Target(torch.tensor([[100.0, 100.0, 300.0, 300.0]]), torch.tensor([1]), torch.zeros(0, 4))
    expected = draw_boxes(BLACK, target.boxes.numpy(), [1], ["tooth brush"])
    np.testing.assert_array_equal(draw_target(BLACK, target, CATEGORIES), expected)


def test_neighbouring_classes_differ_clearly() -> None:
    """Hues of classes k and k + 1 lie 0.382 of the circle apart, of k and k + 2 0.236: 137 and 85 degrees."""
    hues = [colorsys.rgb_to_hsv(*(value / 255 for value in class_color(label)))[0] for label in range(90)]
    for apart, least in ((1, 0.37), (2, 0.22), (3, 0.13)):
        for one, other in zip(hues, hues[apart:], strict=False):
            distance = abs(one - other)
            assert min(distance, 1 - distance) > least
    assert len({class_color(label) for label in range(90)}) == 90


def test_side_by_side() -> None:
    one, other = np.full((50, 30, 3), 10, np.uint8), np.full((50, 70, 3), 20, np.uint8)
    both = side_by_side([one, other])
    assert both.shape == (50, 30 + 8 + 70, 3)
    assert (both[:, :30] == 10).all() and (both[:, 30:38] == 255).all() and (both[:, 38:] == 20).all()
    np.testing.assert_array_equal(side_by_side([one]), one)


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (4, 1), (5, 2), (12, 3)])
def test_contact_sheet(count: int, rows: int) -> None:
    """Tiles of 100 with gaps of 6 around, 4 in a row."""
    pictures = [np.full((200, 400, 3), 10 + n, np.uint8) for n in range(count)]
    sheet = contact_sheet(pictures, tile=100)
    assert sheet.shape == (rows * 106 + 6, 4 * 106 + 6, 3)
    for n in range(count):  # shrunk to 50 x 100 and centred in its tile
        top, left = n // 4 * 106 + 6, n % 4 * 106 + 6
        assert (sheet[top + 25 : top + 75, left : left + 100] == 10 + n).all()
        assert (sheet[top : top + 24, left : left + 100] == 255).all()


def test_contact_sheet_of_nothing() -> None:
    assert (contact_sheet([]) == 255).all()
