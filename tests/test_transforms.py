"""retinanet/data/transforms.py: boxes follow the picture through augmentation and resize, and stay boxes."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from retinanet.config import AugmentConfig, InputConfig
from retinanet.data.images import resize
from retinanet.data.transforms import Augment, Resize, build_augment, build_pipeline
from retinanet.errors import UserError
from retinanet.structures import Target

SEED = (0, 0, 0)  # seed, epoch, index


def target(boxes: Any = (), labels: Any = (), ignore_boxes: Any = ()) -> Target:
    as_boxes = [torch.tensor(list(rows), dtype=torch.float32).reshape(-1, 4) for rows in (boxes, ignore_boxes)]
    return Target(as_boxes[0], torch.tensor(list(labels), dtype=torch.int64), as_boxes[1], image_id=9)


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def unresized(transforms: list[Any], height: int, width: int, **options: Any) -> Augment:
    """Only the transforms: the resize aims at the size that a picture of this shorter side has."""
    return Augment(transforms, [min(height, width)], 10_000, **options)


def assert_boxes(boxes: Tensor, expected: Sequence[Sequence[float]]) -> None:
    """Equal but for albumentations' arithmetic: it divides by the picture's size and multiplies again in float32."""
    np.testing.assert_allclose(boxes, np.reshape(expected, (-1, 4)), rtol=0, atol=1e-4)


def crop(x_min: int, y_min: int, x_max: int, y_max: int) -> dict[str, Any]:
    return {"Crop": {"x_min": x_min, "y_min": y_min, "x_max": x_max, "y_max": y_max, "p": 1}}


# ------------------------------------------------------------------------------------------- what a config may say


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("HorizontalFlop", ["no transform 'HorizontalFlop'", "Did you mean 'HorizontalFlip'"]),
        ("horizontalflip", ["Did you mean 'HorizontalFlip'"]),
        ("Xyzzy", ["no transform 'Xyzzy'"]),
        ("DualTransform", ["no transform 'DualTransform'"]),  # a base class
        ("os", ["no transform 'os'"]),
        ({"HorizontalFlip": {"probability": 0.5}}, ["HorizontalFlip has no argument 'probability'", "It takes p"]),
        ({"RandomCrop": {"heigth": 5, "width": 5}}, ["RandomCrop has no argument 'heigth'", "Did you mean 'height'"]),
        ({"HorizontalFlip": {"p": 2}}, ["HorizontalFlip: p: ", "less than or equal to 1"]),
        ({"HorizontalFlip": {"p": "often"}}, ["HorizontalFlip: p: ", "valid number"]),
        ({"RandomCrop": {}}, ["RandomCrop: height: Field required; width: Field required"]),
        ({"CoarseDropout": {"num_holes_range": [5, 1]}}, ["CoarseDropout: num_holes_range: "]),
        ({"HorizontalFlip": {"p": 1}, "VerticalFlip": {"p": 1}}, ["expected a name, or one"]),
        ({}, ["expected a name, or one"]),
        (5, ["expected a name, or one", "got 5"]),
        (None, ["expected a name, or one", "got None"]),
        (["HorizontalFlip"], ["expected a name, or one"]),
        ({"HorizontalFlip": 0.5}, ["expected a name, or one", "0.5"]),
        ({"HorizontalFlip": [0.5]}, ["expected a name, or one"]),
        ({"HorizontalFlip": {5: 1}}, ["expected a name, or one"]),
        ({7: {}}, ["expected a name, or one"]),
        ({"OneOf": {}}, ["OneOf needs a list 'transforms', got None"]),
        ({"OneOf": {"transforms": []}}, ["OneOf needs a list 'transforms', got []"]),
        ({"OneOf": {"transforms": "Blur"}}, ["OneOf needs a list 'transforms', got 'Blur'"]),
        ({"OneOf": {"transforms": ["HorizontalFlop"]}}, ["Did you mean 'HorizontalFlip'"]),
        ({"OneOf": {"transforms": [{"Sequential": {"transforms": [{"Blur": {"q": 1}}]}}]}}, ["Blur has no argument 'q'"]),
        ("CenterCrop3D", ["CenterCrop3D: size: Field required"]),
        ({"OneOf": {"transforms": [{"OverlayElements": {}}]}}, ["OverlayElements moves pixels but cannot move boxes"]),
        ({"CenterCrop3D": {"size": [1, 2, 3]}}, ["CenterCrop3D moves pixels but cannot move boxes"]),
    ],
)
def test_fault_in_the_config(entry: Any, said: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        build_pipeline(["Blur", entry], 0.1)
    message = str(caught.value)
    assert message.startswith("augment.transforms: ")
    assert "\n" not in message
    assert all(part in message for part in said), message


def test_arguments_of_the_config_are_left_alone() -> None:
    entry: dict[str, dict[str, Any]] = {"OneOf": {"transforms": ["HorizontalFlip", {"Blur": {"p": 1}}], "p": 1.0}}
    build_pipeline([entry], 0.1)
    assert entry == {"OneOf": {"transforms": ["HorizontalFlip", {"Blur": {"p": 1}}], "p": 1.0}}


def test_nested_transforms_move_boxes() -> None:
    nested = {"OneOf": {"transforms": [{"Sequential": {"transforms": [{"HorizontalFlip": {"p": 1}}]}}], "p": 1}}
    _, result = unresized([nested], 10, 20)(picture(10, 20), target([[1, 2, 5, 6]], [3]), SEED)
    assert_boxes(result.boxes, [[15, 2, 19, 6]])


def test_colours_alone_may_change() -> None:
    image = picture(10, 20)
    changed, result = unresized([{"InvertImg": {"p": 1}}], 10, 20)(image, target([[1, 2, 5, 6]], [3]), SEED)
    np.testing.assert_array_equal(changed, 255 - image)
    assert_boxes(result.boxes, [[1, 2, 5, 6]])


@pytest.mark.parametrize("entry", ["Normalize", "ToFloat", "ToTensorV2", {"ToGray": {"num_output_channels": 1}}])
def test_pictures_must_stay_rgb_uint8(entry: Any) -> None:
    (name, arguments) = (entry, {}) if isinstance(entry, str) else next(iter(entry.items()))
    augment = Augment([{name: {**arguments, "p": 1}}], [10], 20)
    with pytest.raises(UserError, match=r"^augment\.transforms must leave a picture uint8 \[height, width, 3\]"):
        augment(picture(10, 20), target(), SEED)


def test_build_augment_takes_the_edges_from_the_input() -> None:
    augment = build_augment(AugmentConfig(), InputConfig(short_edge=64, long_edge=96))
    assert [(edges.short_edge, edges.long_edge) for edges in augment.resizes] == [(64, 96)]
    augment = build_augment(AugmentConfig(short_edges=[32, 48], transforms=[]), InputConfig(short_edge=64, long_edge=96))
    assert [edges.short_edge for edges in augment.resizes] == [32, 48]
    assert augment.pipeline is None


# --------------------------------------------------------------------------------------------------------- by hand


def test_horizontal_flip_by_hand() -> None:
    image = picture(10, 20)
    augment = unresized([{"HorizontalFlip": {"p": 1}}], 10, 20)
    flipped, result = augment(image, target([[1, 2, 5, 6], [0, 0, 20, 10]], [3, 4], [[16, 1, 20, 3]]), SEED)
    np.testing.assert_array_equal(flipped, image[:, ::-1])
    assert_boxes(result.boxes, [[15, 2, 19, 6], [0, 0, 20, 10]])  # x -> 20 - x
    assert result.labels.tolist() == [3, 4]
    assert_boxes(result.ignore_boxes, [[0, 1, 4, 3]])
    assert result.image_id == 9


def test_crop_clips_boxes_and_drops_those_outside() -> None:
    boxes = [[10, 10, 30, 30], [0, 0, 15, 15], [50, 50, 60, 60], [0, 0, 100, 80]]
    image = picture(80, 100)
    cropped, result = unresized([crop(10, 10, 50, 40)], 30, 40)(image, target(boxes, [0, 1, 2, 3], boxes[:3]), SEED)
    np.testing.assert_array_equal(cropped, image[10:40, 10:50])
    # the second loses 200 of 225 and keeps 11 %; the third lies outside; the fourth keeps 15 % and covers all
    assert_boxes(result.boxes, [[0, 0, 20, 20], [0, 0, 5, 5], [0, 0, 40, 30]])
    assert result.labels.tolist() == [0, 1, 3]
    assert_boxes(result.ignore_boxes, [[0, 0, 20, 20], [0, 0, 5, 5]])


@pytest.mark.parametrize(("min_visibility", "kept"), [(0.0, True), (0.49, True), (0.51, False), (1.0, False)])
def test_min_visibility(min_visibility: float, kept: bool) -> None:
    half = [[40, 10, 60, 20]]  # the crop ends at 50
    augment = unresized([crop(0, 0, 50, 50)], 50, 50, min_visibility=min_visibility)
    _, result = augment(picture(50, 100), target(half, [7], half), SEED)
    expected = [[40, 10, 50, 20]] if kept else []
    assert_boxes(result.boxes, expected)
    assert_boxes(result.ignore_boxes, expected)
    assert result.labels.tolist() == ([7] if kept else [])


def test_ignore_boxes_never_become_objects() -> None:
    inside, outside = [10, 10, 20, 20], [60, 60, 70, 70]
    augment = unresized([crop(0, 0, 50, 50)], 50, 50)
    _, result = augment(picture(100, 100), target([outside, outside], [1, 2], [inside, inside, outside]), SEED)
    assert result.boxes.shape == (0, 4) and result.labels.shape == (0,)
    assert_boxes(result.ignore_boxes, [inside, inside])
    _, result = augment(picture(100, 100), target([outside, inside], [1, 2], [outside, inside]), SEED)
    assert_boxes(result.boxes, [inside])
    assert result.labels.tolist() == [2]
    assert_boxes(result.ignore_boxes, [inside])


@pytest.mark.parametrize("transforms", [[], [{"HorizontalFlip": {"p": 1}}], [crop(0, 0, 10, 10)]])
def test_no_boxes(transforms: list[Any]) -> None:
    _, result = unresized(transforms, 10, 20)(picture(20, 30), target(), SEED)
    assert result.boxes.shape == (0, 4) and result.ignore_boxes.shape == (0, 4) and result.labels.shape == (0,)
    assert (result.boxes.dtype, result.ignore_boxes.dtype, result.labels.dtype) == (torch.float32, torch.float32, torch.int64)


@pytest.mark.parametrize("transforms", [[], [{"Affine": {"rotate": 10, "p": 1}}], [crop(0, 0, 10, 10)]])
def test_types_of_a_target(transforms: list[Any]) -> None:
    _, result = Augment(transforms, [40], 80)(picture(20, 30), target([[1, 1, 9, 9]], [0], [[2, 2, 8, 8]]), SEED)
    assert (result.boxes.dtype, result.ignore_boxes.dtype, result.labels.dtype) == (torch.float32, torch.float32, torch.int64)
    assert len(result.boxes) == len(result.ignore_boxes) == 1


def test_resize_scales_boxes() -> None:
    image, given_target = picture(50, 100), target([[10, 10, 20, 30], [0, 0, 100, 50]], [1, 2], [[2, 4, 6, 8]])
    for transform in (Resize(100, 150), Augment([], [100], 150)):  # 100 / 50 would make the long edge 200: x 1.5
        resized, result = transform(image, given_target, SEED)
        np.testing.assert_array_equal(resized, resize(image, (75, 150)))
        assert result.boxes.tolist() == [[15, 15, 30, 45], [0, 0, 150, 75]]
        assert result.ignore_boxes.tolist() == [[3, 6, 9, 12]]
        assert result.labels.tolist() == [1, 2] and result.image_id == 9
    assert given_target.boxes.tolist() == [[10, 10, 20, 30], [0, 0, 100, 50]]  # the one given is left as it was


def test_resize_scales_each_axis_by_what_it_became() -> None:
    # 33 x 47 to a shorter side of 32: 47 * 32 / 33 = 45.58 becomes 46, so that x scales by 46 / 47 and y by 32 / 33
    _, result = Resize(32, 100)(picture(33, 47), target([[0, 0, 47, 33], [23.5, 16.5, 47, 33]], [0, 0]), SEED)
    assert result.boxes.tolist() == [[0, 0, 46, 32], [23, 16, 46, 32]]


@pytest.mark.parametrize("size", [(20, 75), (20, 78), (22, 75), (23, 78)])
def test_box_at_the_border_stays_at_the_border(size: tuple[int, int]) -> None:
    """In float32 width * (new / width) lies outside for these sizes."""
    image, result = Resize(32, 80)(picture(*size), target([[0, 0, size[1], size[0]]], [0]), SEED)
    assert result.boxes.tolist() == [[0, 0, image.shape[1], image.shape[0]]]


# ------------------------------------------------------------------------------------------------- flips one by one

SIMPLE: list[list[Any]] = [
    ["HorizontalFlip"],
    [{"HorizontalFlip": {"p": 0.5}}, {"VerticalFlip": {"p": 0.3}}],
    [{"HorizontalFlip": {"p": 1}}, "ColorJitter", {"VerticalFlip": {"p": 0}}, {"GaussNoise": {"p": 0.8}}],
    ["RandomBrightnessContrast", "HorizontalFlip"],
]


@pytest.mark.parametrize("transforms", SIMPLE)
def test_one_by_one_is_what_the_pipeline_does(transforms: list[Any]) -> None:
    """The same random numbers, so the same pictures; boxes but for the pipeline's arithmetic."""
    image = picture(40, 60)
    truth = target([[1.5, 2, 30, 36.25], [0, 0, 60, 40], [59, 3, 60, 4]], [3, 4, 5], [[16, 1, 20, 3]])
    steps, pipeline = Augment(transforms, [32, 48], 80), Augment(transforms, [32, 48], 80)
    assert steps.only_flips_move
    pipeline.only_flips_move = False
    shapes, flipped = set(), set()
    for index in range(60):
        (one, one_target), (other, other_target) = (augment(image, truth, (0, 0, index)) for augment in (steps, pipeline))
        np.testing.assert_array_equal(one, other)
        assert_boxes(one_target.boxes, other_target.boxes.tolist())
        assert_boxes(one_target.ignore_boxes, other_target.ignore_boxes.tolist())
        assert one_target.labels.tolist() == other_target.labels.tolist() == [3, 4, 5] and one_target.image_id == 9
        shapes.add(one.shape)
        flipped.add(bool(one_target.boxes[2, 0] < 20))  # it lies at the right side
    assert len(shapes) == 2
    assert flipped == ({True} if transforms == SIMPLE[2] else {False, True})
    assert truth.boxes[2].tolist() == [59, 3, 60, 4]  # the one given is left as it was


def test_vertical_flip_by_hand() -> None:
    image = picture(10, 20)
    augment = unresized([{"VerticalFlip": {"p": 1}}], 10, 20)
    flipped, result = augment(image, target([[1, 2, 5, 6]], [3], [[16, 1, 20, 3]]), SEED)
    np.testing.assert_array_equal(flipped, image[::-1])
    assert_boxes(result.boxes, [[1, 4, 5, 8]])  # y -> 10 - y
    assert_boxes(result.ignore_boxes, [[16, 7, 20, 9]])


@pytest.mark.parametrize(
    "entry",
    [
        "Transpose",
        crop(0, 0, 9, 9),
        "RandomRotate90",
        {"OneOf": {"transforms": ["HorizontalFlip", "Blur"]}},
        "CoarseDropout",
        "ToTensorV2",
    ],
)
def test_what_moves_boxes_otherwise_goes_through_the_pipeline(entry: Any) -> None:
    assert not Augment(["HorizontalFlip", entry, "ColorJitter"], [32], 64).only_flips_move


def test_a_box_thinner_than_the_flip_resolves_is_dropped() -> None:
    """In float32 20 - 1e-7 is 20: mirrored, the box has no width."""
    augment = unresized([{"HorizontalFlip": {"p": 1}}], 10, 20)
    _, result = augment(picture(10, 20), target([[0, 2, 1e-7, 6], [1, 2, 5, 6]], [3, 4]), SEED)
    assert_boxes(result.boxes, [[15, 2, 19, 6]])
    assert result.labels.tolist() == [4]


@pytest.mark.parametrize("transforms", [[], ["HorizontalFlip", {"VerticalFlip": {"p": 0.5}}]])
def test_boxes_of_the_full_picture_with_one_decoded_smaller(transforms: list[Any]) -> None:
    full = picture(41, 60).repeat(4, axis=0).repeat(4, axis=1)[:163]  # 163 x 240; a quarter is 41 x 60, a little too high
    small = full[::4, ::4]
    truth = target([[10, 10, 80, 120.5], [0, 0, 240, 163]], [1, 2], [[200, 3, 240, 50]])
    augment = Augment(transforms, [20, 27], 1000)
    for index in range(12):
        (one, one_target), (other, other_target) = (
            augment(full, truth, (0, 0, index)),
            augment(small, truth, (0, 0, index), (163, 240)),
        )
        assert one.shape == other.shape == (*augment.result_size((163, 240), (0, 0, index)), 3)
        assert torch.equal(one_target.boxes, other_target.boxes)
        assert torch.equal(one_target.ignore_boxes, other_target.ignore_boxes)
    resized, result = Resize(20, 1000)(small, truth, SEED, (163, 240))
    assert resized.shape == (20, 29, 3)  # 240 * 20 / 163 = 29.45; by the small picture's own size 60 * 20 / 41 = 29.27
    assert_boxes(result.boxes[1:], [[0, 0, 29, 20]])


def test_reduced_decoding_needs_boxes_that_only_flips_move() -> None:
    reduced = InputConfig(short_edge=64, long_edge=96, reduced_decode=True)
    assert build_augment(AugmentConfig(), reduced).only_flips_move
    with pytest.raises(UserError, match=r"^input\.reduced_decode: augment\.transforms may move boxes by HorizontalFlip and"):
        build_augment(AugmentConfig(transforms=[crop(0, 0, 10, 10)]), reduced)


@pytest.mark.parametrize(("short_edges", "long_edge", "largest"), [([20, 48], 64, (48, 64)), ([100, 20], 64, (64, 64))])
def test_no_result_is_larger_than_the_largest(short_edges: list[int], long_edge: int, largest: tuple[int, int]) -> None:
    augment = Augment([], short_edges, long_edge)
    assert augment.largest == largest
    for size in [(50, 50), (30, 60), (90, 20)]:
        for index in range(6):
            assert tuple(sorted(augment.result_size(size, (0, 0, index)))) <= largest


# ------------------------------------------------------------------------------------------------------ randomness

RANDOM: list[dict[str, dict[str, Any]] | str] = [
    {"HorizontalFlip": {"p": 0.5}},
    {"RandomResizedCrop": {"size": [24, 24], "p": 0.7}},
    {"ColorJitter": {"p": 0.8}},
]


def test_same_seed_epoch_and_index_give_the_same_sample() -> None:
    image, truth = picture(40, 60), target([[5, 5, 30, 30]], [1])
    one, other = Augment(RANDOM, [20, 32, 48], 64), Augment(RANDOM, [20, 32, 48], 64)
    other(image, truth, (8, 8, 8))  # what came before must not matter
    for seed in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (3, 2, 1)]:
        (left, left_target), (right, right_target) = one(image, truth, seed), other(image, truth, seed)
        np.testing.assert_array_equal(left, right)
        assert left_target.boxes.tolist() == right_target.boxes.tolist()


def test_every_part_of_the_seed_matters() -> None:
    image = picture(40, 60)
    augment = Augment([{"RandomResizedCrop": {"size": [24, 24], "p": 1}}], [24], 64)
    seeds = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1, 1), (0, 2, 0)]
    assert len({augment(image, target(), seed)[0].tobytes() for seed in seeds}) == len(seeds)


def test_transforms_are_drawn_independently() -> None:
    image = np.repeat(np.array([[1, 2], [3, 4]], dtype=np.uint8)[..., None], 3, axis=2)
    augment = Augment([{"HorizontalFlip": {"p": 0.5}}, {"VerticalFlip": {"p": 0.5}}], [2], 4)
    seen = Counter(tuple(augment(image, target(), (0, 0, i))[0][..., 0].ravel().tolist()) for i in range(400))
    assert set(seen) == {(1, 2, 3, 4), (2, 1, 4, 3), (3, 4, 1, 2), (4, 3, 2, 1)}
    assert min(seen.values()) > 65  # a quarter is 100, with a standard deviation of 9


def test_short_edges_are_drawn_from_the_list() -> None:
    augment = Augment([], [20, 32, 48], 1000)
    seen = Counter(augment(picture(20, 30), target(), (0, 0, i))[0].shape[:2] for i in range(300))
    assert set(seen) == {(20, 30), (32, 48), (48, 72)}
    assert min(seen.values()) > 60  # a third is 100, with a standard deviation of 8


def test_short_edge_is_limited_by_the_long_one() -> None:
    seen = {Augment([], [20, 32, 48], 60)(picture(20, 30), target(), (0, 0, i))[0].shape[:2] for i in range(30)}
    assert seen == {(20, 30), (32, 48), (40, 60)}


# ------------------------------------------------------------------------------------------------------------ fuzz

HEIGHT, WIDTH = 37, 53
PIPELINES: list[list[dict[str, dict[str, Any]]]] = [
    [{"HorizontalFlip": {"p": 0.5}}, {"VerticalFlip": {"p": 0.5}}],
    [{"HorizontalFlip": {"p": 0.5}}, {"VerticalFlip": {"p": 0.5}}, {"RandomRotate90": {"p": 0.5}}],
    [{"RandomResizedCrop": {"size": [20, 31], "scale": [0.05, 1.0], "p": 1}}],
    [{"Affine": {"rotate": [-45, 45], "scale": [0.5, 2.0], "translate_percent": [-0.5, 0.5], "shear": [-20, 20], "p": 1}}],
    [{"RandomCrop": {"height": 5, "width": 7, "p": 1}}, {"HorizontalFlip": {"p": 0.5}}, {"RandomScale": {"p": 1}}],
    [{"Perspective": {"p": 1}}, {"OneOf": {"transforms": ["Transpose", {"CenterCrop": {"height": 9, "width": 9}}], "p": 1}}],
    [{"PadIfNeeded": {"min_height": 64, "min_width": 64, "p": 1}}, {"D4": {"p": 1}}, {"CropAndPad": {"percent": -0.1, "p": 1}}],
]
AUGMENTS = [
    Augment(transforms, [16, 40], 60, min_visibility=min_visibility)
    for transforms in PIPELINES
    for min_visibility in (0.0, 0.3)
]


def interval(length: int) -> st.SearchStrategy[tuple[float, float]]:
    """Two coordinates, the first the smaller in float32: borders, neighbours in float32 and sub-pixel lengths as well."""
    at = st.floats(0, length, width=32) | st.sampled_from([0.0, 1e-6, 0.5, length - 0.5, float(length)])
    near = at.map(lambda a: (a, float(np.nextafter(np.float32(a), np.float32(length)))))
    return st.one_of(st.tuples(at, at).map(lambda pair: (min(pair), max(pair))), near).filter(lambda pair: pair[0] < pair[1])


BOXES = st.lists(st.tuples(interval(WIDTH), interval(HEIGHT)).map(lambda b: [b[0][0], b[1][0], b[0][1], b[1][1]]), max_size=4)


def assert_valid(boxes: Tensor, image: np.ndarray) -> None:
    assert boxes.dtype == torch.float32 and boxes.shape[1:] == (4,)
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert (boxes >= 0).all()
    assert (boxes <= torch.tensor([image.shape[1], image.shape[0]] * 2)).all()


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(AUGMENTS) - 1), BOXES, BOXES, st.integers(0, 2**32))
def test_any_boxes_survive_any_pipeline(which: int, boxes: list[list[float]], ignore: list[list[float]], index: int) -> None:
    augment, image, seed = AUGMENTS[which], picture(HEIGHT, WIDTH), (0, 0, index)
    moved, result = augment(image, target(boxes, range(len(boxes)), ignore), seed)
    assert moved.dtype == np.uint8 and moved.shape[2] == 3
    assert_valid(result.boxes, moved)
    assert_valid(result.ignore_boxes, moved)
    assert len(result.labels) == len(result.boxes)
    # Each box fares as it would alone: none gets another's label, and ignore boxes stay apart.
    expected = [(label, alone(augment, image, box, seed)) for label, box in enumerate(boxes)]
    assert result.labels.tolist() == [label for label, moved_box in expected if moved_box is not None]
    assert result.boxes.tolist() == [moved_box for _, moved_box in expected if moved_box is not None]
    expected_ignore = [alone(augment, image, box, seed) for box in ignore]
    assert result.ignore_boxes.tolist() == [moved_box for moved_box in expected_ignore if moved_box is not None]


def alone(augment: Augment, image: np.ndarray, box: list[float], seed: tuple[int, int, int]) -> list[float] | None:
    """Where a box ends when the picture has no other; None if it is dropped."""
    moved: list[list[float]] = augment(image, target([box], [0]), seed)[1].boxes.tolist()
    return moved[0] if moved else None
