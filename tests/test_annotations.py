"""retinanet/data: COCO JSON and Pascal VOC XML become packed arrays, or one line that says what is wrong and where."""

import copy
import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO

from retinanet.config import DatasetConfig
from retinanet.data.annotations import AnnotationRow, Annotations, ImageRow, PackedStrings
from retinanet.data.coco import load_coco, report_odd_boxes
from retinanet.data.formats import load_dataset
from retinanet.data.voc import load_voc
from retinanet.errors import UserError
from retinanet.structures import Category

# Ids with gaps, from 0, in no order; the images lie in another order than their annotations.
BASE: dict[str, Any] = {
    "categories": [{"id": 90, "name": "cat"}, {"id": 0, "name": "dog"}, {"id": 7, "name": "cow"}],
    "images": [
        {"id": 42, "file_name": "b.jpg", "height": 100, "width": 200},
        {"id": 0, "file_name": "sub/a.jpg", "height": 50, "width": 60},
        {"id": 5, "file_name": "ç 犬.jpg"},
    ],
    "annotations": [
        {"id": 11, "image_id": 0, "category_id": 7, "bbox": [1, 2, 3, 4], "area": 6.5, "iscrowd": 0},
        {"id": 3, "image_id": 42, "category_id": 90, "bbox": [10, 20, 30.5, 40], "iscrowd": 0},
        {"id": 2, "image_id": 42, "category_id": 0, "bbox": [0, 0, 200, 100], "area": 9, "iscrowd": 1},
        {"id": 8, "image_id": 42, "category_id": 0, "bbox": [5, 5, 10, 10], "area": None},
    ],
}


@pytest.fixture
def base() -> dict[str, Any]:
    return copy.deepcopy(BASE)


@pytest.fixture
def read(tmp_path: Path) -> Callable[[Any], Annotations]:
    """A function that writes content as tmp_path/a.json (text as it is) and loads it."""

    def load(content: Any) -> Annotations:
        file = tmp_path / "a.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return load_coco(file, tmp_path)

    return load


Read = Callable[[Any], Annotations]


def one(box: Any, **more: Any) -> dict[str, Any]:
    """A data set of one image, 100 high and 200 wide, with one box, annotation 77."""
    return {
        "categories": [{"id": 1, "name": "x"}],
        "images": [{"id": 6, "file_name": "x.jpg", "height": 100, "width": 200}],
        "annotations": [{"id": 77, "image_id": 6, "category_id": 1, "bbox": box, **more}],
    }


# -------------------------------------------------------------------------------------------------------- COCO


def test_labels_follow_ascending_category_ids(read: Read, base: dict[str, Any]) -> None:
    data = read(base)
    assert data.categories == (Category(0, "dog"), Category(7, "cow"), Category(90, "cat"))
    assert data.image_ids.tolist() == [42, 0, 5]  # the file's order
    assert data.offsets.tolist() == [0, 3, 4, 4]
    assert data.annotation_ids.tolist() == [3, 2, 8, 11]  # by image, then in the file's order
    assert data.labels.tolist() == [2, 0, 0, 1]
    assert [data.categories[label].id for label in data.labels] == [90, 0, 0, 7]
    assert data.counts().tolist() == [1, 1, 1]  # without the crowd


def test_missing_area_and_iscrowd_are_filled_in(read: Read, base: dict[str, Any]) -> None:
    data = read(base)
    assert data.areas.tolist() == [30.5 * 40, 9, 100, 6.5]
    assert data.crowd.tolist() == [False, True, False, False]


def test_sizes_are_height_width_and_0_where_unknown(read: Read, base: dict[str, Any]) -> None:
    data = read(base)
    assert data.sizes.tolist() == [[100, 200], [50, 60], [0, 0]]
    assert [data.file_names[i] for i in range(3)] == ["b.jpg", "sub/a.jpg", "ç 犬.jpg"]


def test_target_is_xyxy_with_crowds_apart(read: Read, base: dict[str, Any], tmp_path: Path) -> None:
    data = read(base)
    target = data.target(0, (100, 200))
    assert target.boxes.tolist() == [[10, 20, 40.5, 60], [5, 5, 15, 15]]
    assert target.labels.tolist() == [2, 0]
    assert target.ignore_boxes.tolist() == [[0, 0, 200, 100]]
    assert target.image_id == 42
    assert data.path(1) == tmp_path / "sub" / "a.jpg"


def test_image_without_boxes(read: Read, base: dict[str, Any]) -> None:
    data = read(base)
    target = data.target(2, (10, 10))
    assert target.boxes.shape == (0, 4) and target.ignore_boxes.shape == (0, 4) and target.labels.shape == (0,)
    assert str(target.labels.dtype) == "torch.int64" and str(target.boxes.dtype) == "torch.float32"
    assert data.has_boxes().tolist() == [True, True, False]


def test_no_annotations_at_all(read: Read, base: dict[str, Any]) -> None:
    data = read({**base, "annotations": []})
    assert len(data) == 3
    assert data.offsets.tolist() == [0, 0, 0, 0]
    assert data.coco_boxes.shape == (0, 4)
    assert data.target(1, (50, 60)).boxes.shape == (0, 4)
    assert data.counts().tolist() == [0, 0, 0]
    assert not data.has_boxes().any()
    assert data.to_coco()["annotations"] == []


def test_has_boxes_needs_an_object_with_an_area(read: Read, base: dict[str, Any]) -> None:
    base["annotations"] = [
        {"id": 1, "image_id": 42, "category_id": 0, "bbox": [0, 0, 5, 0]},
        {"id": 2, "image_id": 0, "category_id": 0, "bbox": [0, 0, 5, 5], "iscrowd": 1},
        {"id": 3, "image_id": 5, "category_id": 0, "bbox": [0, 0, 5, 5]},
        {"id": 4, "image_id": 5, "category_id": 0, "bbox": [0, 0, -5, 5]},
    ]
    assert read(base).has_boxes().tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ([10, 10, 0, 5], None),
        ([10, 10, 5, 0], None),
        ([10, 10, -5, 5], None),
        ([10, 10, -5, -5], None),
        ([300, 10, 5, 5], None),  # right of the image
        ([10, -20, 5, 5], None),  # above it
        ([200, 10, 5, 5], None),  # begins at the border
        ([-10, -20, 30, 40], [0, 0, 20, 20]),
        ([190, 90, 30, 40], [190, 90, 200, 100]),
        ([-5, -5, 500, 500], [0, 0, 200, 100]),
        ([0, 0, 200, 100], [0, 0, 200, 100]),
        ([199.5, 99.25, 0.5, 0.75], [199.5, 99.25, 200, 100]),
        ([150, 10, 1e-9, 5], None),  # less than float32 can tell apart there
        ([-1e300, 0, 1.5e300, 50], [0, 0, 200, 50]),
    ],
)
def test_target_is_clipped_and_keeps_only_boxes_with_an_area(
    read: Read, box: list[float], expected: list[float] | None
) -> None:
    for crowd in (0, 1):
        target = read(one(box, iscrowd=crowd)).target(0, (100, 200))
        kept, other = (target.ignore_boxes, target.boxes) if crowd else (target.boxes, target.ignore_boxes)
        assert kept.tolist() == ([] if expected is None else [expected])
        assert other.shape == (0, 4)
        assert len(target.labels) == len(target.boxes)


def test_boxes_without_area_are_kept_for_evaluation(read: Read) -> None:
    data = read(one([10, 10, 0, 5]))
    assert data.coco_boxes.tolist() == [[10, 10, 0, 5]]
    assert data.to_coco()["annotations"][0]["bbox"] == [10, 10, 0, 5]


def test_odd_boxes_are_reported_once_each(read: Read, base: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    boxes = {
        101: [10, 10, 0, 5],  # no area
        102: [10, 10, 5, -1],
        103: [300, 0, 5, 5],  # outside
        104: [190, 0, 20, 20],  # across
        105: [190, 0, 10.5, 20],  # half a pixel over the border is rounding
        106: [0, 0, 200, 100],
    }
    base["annotations"] = [{"id": n, "image_id": 42, "category_id": 0, "bbox": box} for n, box in boxes.items()]
    # of the third image no size is known, so that nothing can be said about this one
    base["annotations"].append({"id": 107, "image_id": 5, "category_id": 0, "bbox": [9000, 0, 5, 5]})
    data = read(base)
    assert capsys.readouterr().out == ""
    report_odd_boxes(data)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" of 7 boxes ")[2] for line in lines] == [
        "have no area and are left out of training (annotation 101 in b.jpg, 102 in b.jpg)",
        "lie outside their image and are left out of training (annotation 103 in b.jpg)",
        "reach more than a pixel over their image's border and are clipped (annotation 104 in b.jpg)",
    ]
    assert all(line.startswith(f"note: {data.source}: ") for line in lines)


def test_report_names_five_and_says_that_there_are_more(
    read: Read, base: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    base["annotations"] = [{"id": n, "image_id": 0, "category_id": 0, "bbox": [1, 1, 0, 0]} for n in range(7)]
    report_odd_boxes(read(base))
    (line,) = capsys.readouterr().out.splitlines()
    assert "7 of 7 boxes" in line
    assert line.endswith("4 in sub/a.jpg, ...)") and "5 in" not in line


def test_good_boxes_are_not_reported(read: Read, base: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    report_odd_boxes(read(base))
    report_odd_boxes(read({**base, "annotations": []}))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", ["not valid JSON", "it begins with ''"]),
        ("{", ["not valid JSON"]),
        ("<!DOCTYPE html><html>404</html>", ["not valid JSON", "<!DOCTYPE html>"]),
        ("version https://git-lfs.github.com/spec/v1", ["not valid JSON", "version https://git"]),
        ("[" * 100_000, ["not valid JSON"]),
        ('{"images": [' + "9" * 5000 + "]}", ["not valid JSON"]),  # more digits than Python converts
        ("[]", ["needs a list 'images'"]),
        ("null", ["needs a list 'images'"]),
        ("7", ["needs a list 'images'"]),
        ("{}", ["needs a list 'images'"]),
        ('{"images": [], "categories": []}', ["needs a list 'annotations'"]),
        ('{"images": [], "annotations": []}', ["needs a list 'categories'"]),
        ('{"images": [], "annotations": {}, "categories": []}', ["needs a list 'annotations'"]),
        ('{"images": [], "annotations": [], "categories": []}', ["'categories' is empty"]),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', ["'images' is empty"]),
    ],
)
def test_file_that_is_no_coco_file(read: Read, tmp_path: Path, content: str, said: list[str]) -> None:
    message = failure(read, content)
    assert str(tmp_path / "a.json") in message
    assert all(part in message for part in said), message


def failure(read: Read, content: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(content)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no\.json does not exist"):
        load_coco(tmp_path / "no.json", tmp_path)
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        load_coco(tmp_path, tmp_path)
    (tmp_path / "latin.json").write_bytes(b'{"images": "\xe9"}')
    with pytest.raises(UserError, match=r"latin\.json is not valid JSON"):
        load_coco(tmp_path / "latin.json", tmp_path)


def test_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(BASE).encode())
    assert len(load_coco(tmp_path / "a.json", tmp_path)) == 3


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("part", "entry", "said"),
    [
        # entry replaces the keys of the second annotation, id 3
        ("annotations", {"category_id": 1}, ["annotation 3 ", "category_id 1", "0, 7, 90"]),
        ("annotations", {"category_id": -1}, ["annotation 3 ", "category_id -1"]),
        ("annotations", {"image_id": 41}, ["annotation 3 ", "image_id 41"]),
        ("annotations", {"category_id": "cat"}, ["annotations[1] (id 3)", "whole number"]),
        ("annotations", {"category_id": None}, ["annotations[1] (id 3)", "whole number"]),
        ("annotations", {"category_id": 7.5}, ["annotations[1] (id 3)", "whole number"]),
        ("annotations", {"category_id": NAN}, ["annotations[1] (id 3)", "whole number"]),
        ("annotations", {"image_id": "b.jpg"}, ["annotations[1] (id 3)", "whole number"]),
        ("annotations", {"image_id": [42]}, ["annotations[1] (id 3)", "whole number"]),
        ("annotations", {"image_id": INF}, ["annotations[1] (id 3)", "whole number"]),
        ("annotations", {"id": "third"}, ["annotations[1] (id 'third')", "whole number"]),
        ("annotations", {"id": 2**53 + 1}, ["annotations[1] (id 9007199254740993)", "whole number"]),
        ("annotations", {"bbox": None}, ["annotation 3 (image 42)", "'bbox' must be [x, y, width, height]", "None"]),
        ("annotations", {"bbox": [1, 2, 3]}, ["annotation 3 (image 42)", "got [1, 2, 3]"]),
        ("annotations", {"bbox": []}, ["annotation 3 (image 42)", "got []"]),
        ("annotations", {"bbox": [1, 2, 3, 4, 5]}, ["annotation 3 (image 42)", "'bbox'"]),
        ("annotations", {"bbox": list(range(100_000))}, ["annotation 3 (image 42)", "'bbox'", "..."]),
        ("annotations", {"bbox": ["a", "b", "c", "d"]}, ["annotation 3 (image 42)", "'bbox'"]),
        ("annotations", {"bbox": ["1", "2", "3", "4"]}, ["annotation 3 (image 42)", "'bbox'"]),
        ("annotations", {"bbox": "1234"}, ["annotation 3 (image 42)", "got '1234'"]),
        ("annotations", {"bbox": {"1": 0, "2": 0, "3": 0, "4": 0}}, ["annotation 3 (image 42)", "'bbox'"]),
        ("annotations", {"bbox": [1, 2, NAN, 4]}, ["annotation 3 (image 42)", "nan"]),
        ("annotations", {"bbox": [1, 2, INF, 4]}, ["annotation 3 (image 42)", "inf"]),
        ("annotations", {"bbox": [1, 2, None, 4]}, ["annotation 3 (image 42)", "None"]),
        ("annotations", {"bbox": [1, 2, True, 4]}, ["annotation 3 (image 42)", "True"]),
        ("annotations", {"bbox": [1, 2, 10**400, 4]}, ["annotation 3 (image 42)", "'bbox'"]),
        ("annotations", {"bbox": [1.7e308, 2, 1.7e308, 4]}, ["annotation 3 (image 42)", "'bbox'"]),
        ("annotations", {"area": "big"}, ["annotation 3 (image 42)", "'area'"]),
        ("annotations", {"area": NAN}, ["annotation 3 (image 42)", "'area'"]),
        ("annotations", {"area": 10**400}, ["annotation 3 (image 42)", "'area'"]),
        ("annotations", {"iscrowd": "yes"}, ["annotation 3 (image 42)", "'iscrowd'"]),
        ("annotations", {"iscrowd": [1]}, ["annotation 3 (image 42)", "'iscrowd'"]),
        ("annotations", None, ["annotations[1]", "whole number"]),
        ("annotations", [], ["annotations[1]", "whole number"]),
        ("annotations", "x", ["annotations[1]", "whole number"]),
        # ... of the second image, id 0
        ("images", {"id": 42}, ["image id 42 occurs more than once"]),
        ("images", {"id": "first"}, ["images[1] (id 'first')", "whole-number 'id'"]),
        ("images", {"id": None}, ["images[1] (id None)", "whole-number 'id'"]),
        ("images", {"id": 1.5}, ["images[1] (id 1.5)", "whole-number 'id'"]),
        ("images", {"id": 2**60}, ["images[1]", "2^53"]),
        ("images", {"file_name": None}, ["images[1] (id 0)", "'file_name'"]),
        ("images", {"file_name": ""}, ["images[1] (id 0)", "'file_name'"]),
        ("images", {"file_name": ["a"]}, ["images[1] (id 0)", "'file_name'"]),
        ("images", {"file_name": "\ud800.jpg"}, ["images[1] (id 0)", "'file_name'"]),
        ("images", {"height": "tall"}, ["images[1] (id 0)", "'height'"]),
        ("images", {"width": 3.5}, ["images[1] (id 0)", "'width'"]),
        ("images", {"width": -60}, ["image id 0", "negative"]),
        ("images", None, ["images[1]", "whole-number 'id'"]),
        ("images", 7, ["images[1]", "whole-number 'id'"]),
        # ... of the second category, id 0
        ("categories", {"id": 90}, ["category id 90 occurs more than once"]),
        ("categories", {"name": "cat"}, ["category name 'cat' occurs more than once"]),
        ("categories", {"id": "zero"}, ["'categories'", "whole-number 'id'"]),
        ("categories", {"id": -1}, ["category id -1 is negative"]),
        ("categories", {"id": None}, ["'categories'", "whole-number 'id'"]),
        ("categories", {"name": None}, ["'categories'", "'name'"]),
        ("categories", {"name": " "}, ["'categories'", "'name'"]),
        ("categories", None, ["'categories'", "whole-number 'id'"]),
        ("categories", "dog", ["'categories'", "whole-number 'id'"]),
    ],
)
def test_entry_at_fault_is_named(
    read: Read, base: dict[str, Any], tmp_path: Path, part: str, entry: Any, said: list[str]
) -> None:
    base[part][1] = {**base[part][1], **entry} if isinstance(entry, dict) else entry
    message = failure(read, base)
    assert message.startswith(str(tmp_path / "a.json"))
    assert all(words in message for words in said), message


@pytest.mark.parametrize("key", ["image_id", "category_id", "bbox"])
def test_missing_key_of_an_annotation(read: Read, base: dict[str, Any], key: str) -> None:
    del base["annotations"][1][key]
    message = failure(read, base)
    assert key in message and "3" in message


@pytest.mark.parametrize(
    ("part", "key"), [("images", "id"), ("images", "file_name"), ("categories", "id"), ("categories", "name")]
)
def test_missing_key_of_an_image_or_category(read: Read, base: dict[str, Any], part: str, key: str) -> None:
    del base[part][1][key]
    message = failure(read, base)
    assert part in message and f"'{key}'" in message


def test_numbers_written_as_text_or_with_a_point_are_taken(read: Read, base: dict[str, Any]) -> None:
    base["images"][0] |= {"id": "42", "height": "100", "width": 200.0}
    base["annotations"][1] |= {"id": "3", "image_id": 42.0, "category_id": "90", "iscrowd": "0"}
    base["annotations"][2] |= {"iscrowd": True}
    base["categories"][0]["name"] = 8  # as digits are named
    data = read(base)
    assert data.image_ids.tolist() == [42, 0, 5]
    assert data.sizes[0].tolist() == [100, 200]
    assert data.labels.tolist() == [2, 0, 0, 1]
    assert data.crowd.tolist() == [False, True, False, False]
    assert data.categories[2].name == "8"


def test_annotations_without_ids_are_numbered_by_their_place(read: Read, base: dict[str, Any]) -> None:
    for entry in base["annotations"]:
        del entry["id"]
    assert read(base).annotation_ids.tolist() == [1, 2, 3, 0]


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../secret.jpg", "a/../../b.jpg", "a/..", "..", ".", "/", "a\n.jpg", "a\0.jpg", "//host/share/a.jpg"],
)
def test_file_name_must_stay_in_the_image_folder(read: Read, base: dict[str, Any], name: str) -> None:
    base["images"][1]["file_name"] = name
    message = failure(read, base)
    assert "image id 0" in message and "inside the image folder" in message and repr(name) in message


@pytest.mark.parametrize("name", ["a/b/c.jpg", "..a.jpg", "a..b/c...jpg", "./a.jpg", "Photo 3.04\u202fPM.png", "犬 🐕.jpg"])
def test_file_names_that_stay_in_the_image_folder(read: Read, base: dict[str, Any], name: str) -> None:
    base["images"][1]["file_name"] = name
    assert read(base).file_names[1] == name


def test_door_names_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere is not a folder"):
        load_dataset(DatasetConfig(path=str(tmp_path / "nowhere"), annotations="a.json"))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**400), 10**400)
    | st.integers(-2, 3)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["\ud800", "7", "1e3", "\0", "..", "nan"]),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(["id", "name", "bbox", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


def altered(entries: list[dict[str, Any]]) -> st.SearchStrategy[list[Any]]:
    """The entries with some values, or whole entries, replaced by any JSON value."""
    keys = sorted({key for entry in entries for key in entry})
    value = st.tuples(st.integers(0, len(entries) - 1), st.sampled_from([*keys, None]), JSON)

    def apply(changes: list[tuple[int, str | None, Any]]) -> list[Any]:
        result: list[Any] = copy.deepcopy(entries)
        for place, key, new in changes:
            if key is None or not isinstance(result[place], dict):
                result[place] = new
            else:
                result[place][key] = new
        return result

    return st.lists(value, max_size=2).map(apply)


def load_or_refuse(content: Any, folder: Path) -> None:
    """Loading ends in a data set whose every function works, or in a UserError of one line."""
    file = folder / "any.json"
    file.write_text(json.dumps(content))
    try:
        data = load_coco(file, folder)
    except UserError as error:
        assert "\n" not in str(error) and str(file) in str(error)
        return
    report_odd_boxes(data)
    assert np.isfinite(data.coco_boxes).all() and np.isfinite(data.areas).all()
    for index in range(len(data)):
        target = data.target(index, (30, 40))
        assert (target.boxes[:, 2:] > target.boxes[:, :2]).all()
        assert len(target.labels) == len(target.boxes)
        assert data.path(index).is_relative_to(folder)
    json.dumps(data.to_coco())
    assert len(data.has_boxes()) == len(data) == len(data.select(np.arange(len(data))))


@settings(max_examples=100, deadline=None)
@given(JSON | st.fixed_dictionaries({"images": JSON, "annotations": JSON, "categories": JSON}))
def test_any_json_is_loaded_or_refused(tmp_path_factory: pytest.TempPathFactory, content: Any) -> None:
    load_or_refuse(content, tmp_path_factory.getbasetemp())


@settings(max_examples=250, deadline=None)
@given(st.fixed_dictionaries({part: altered(BASE[part]) for part in BASE}))
def test_nearly_valid_json_is_loaded_or_refused(tmp_path_factory: pytest.TempPathFactory, content: dict[str, Any]) -> None:
    load_or_refuse(content, tmp_path_factory.getbasetemp())


# ------------------------------------------------------------------------------------------------- packed arrays


def arrays_of(data: Annotations) -> dict[str, np.ndarray]:
    values = {field.name: getattr(data, field.name) for field in dataclasses.fields(data)} | vars(data.file_names)
    return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}


def assert_same(one: Annotations, other: Annotations) -> None:
    assert one.categories == other.categories
    left, right = arrays_of(one), arrays_of(other)
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def test_to_coco_is_a_round_trip_that_pycocotools_accepts(read: Read, base: dict[str, Any]) -> None:
    data = read(base)
    content = data.to_coco()
    truth = COCO()
    truth.dataset = content
    truth.createIndex()
    assert truth.getCatIds() == [0, 7, 90]
    assert sorted(truth.getImgIds()) == [0, 5, 42]
    assert [truth.anns[i]["bbox"] for i in truth.getAnnIds(imgIds=[42])] == [
        [10, 20, 30.5, 40],
        [0, 0, 200, 100],
        [5, 5, 10, 10],
    ]
    assert [truth.anns[i]["area"] for i in truth.getAnnIds(imgIds=[42], iscrowd=True)] == [9]
    assert 0 not in truth.anns  # COCOeval would take it for "no match"
    again = read(content)
    again.annotation_ids = data.annotation_ids  # to_coco numbers them anew
    assert_same(data, again)


def test_real_coco_survives_the_round_trip(real_data: Path, tmp_path: Path) -> None:
    file = real_data / "coco_mini" / "annotations" / "instances_val2017.json"
    data = load_coco(file, real_data / "coco_mini" / "val2017")
    assert (len(data), len(data.labels), len(data.categories)) == (74, 629, 80)
    raw = json.loads(file.read_text())
    by_id = {entry["id"]: entry for entry in raw["annotations"]}
    for number, box, area, label, crowd in zip(data.annotation_ids, data.coco_boxes, data.areas, data.labels, data.crowd):
        entry = by_id[int(number)]
        assert box.tolist() == entry["bbox"] and area == entry["area"] and bool(crowd) == bool(entry["iscrowd"])
        assert data.categories[label].id == entry["category_id"]
    (tmp_path / "a.json").write_text(json.dumps(data.to_coco()))
    again = load_coco(tmp_path / "a.json", data.image_dir)
    again.annotation_ids = data.annotation_ids
    assert_same(data, again)
    assert all(data.path(index).is_file() for index in range(len(data)))


def test_select_keeps_the_order_asked_for(read: Read, base: dict[str, Any]) -> None:
    data = read(base).select(np.array([2, 0]))
    assert data.image_ids.tolist() == [5, 42]
    assert data.offsets.tolist() == [0, 0, 3]
    assert data.annotation_ids.tolist() == [3, 2, 8]
    assert data.labels.tolist() == [2, 0, 0]
    assert data.sizes.tolist() == [[0, 0], [100, 200]]
    assert data.file_names[1] == "b.jpg"
    assert data.target(1, (100, 200)).boxes.tolist() == [[10, 20, 40.5, 60], [5, 5, 15, 15]]
    assert data.counts().tolist() == [1, 0, 1]


def test_select_nothing_and_all(read: Read, base: dict[str, Any]) -> None:
    data = read(base)
    nothing = data.select(np.empty(0, np.int64))
    assert len(nothing) == 0 and len(nothing.labels) == 0 and nothing.offsets.tolist() == [0]
    assert nothing.categories == data.categories
    assert_same(data.select(np.arange(3)), data)


def unpacked(strings: PackedStrings) -> list[str]:
    return [strings[i] for i in range(len(strings))]


@pytest.mark.parametrize("strings", [[], [""], ["", ""], ["a"], ["", "ä", "", "犬🐕", "a\0b", ""], ["x" * 1000, ""]])
def test_packed_strings(strings: list[str]) -> None:
    packed = PackedStrings(strings)
    assert len(packed) == len(strings)
    assert [packed[i - len(strings)] for i in range(len(strings))] == strings
    assert unpacked(packed) == strings
    for outside in (len(strings), -len(strings) - 1):
        with pytest.raises(IndexError):
            packed[outside]
    assert unpacked(pickle.loads(pickle.dumps(packed))) == strings


@settings(deadline=None)
@given(st.lists(st.text()))
def test_packed_strings_hold_any_text(strings: list[str]) -> None:
    assert unpacked(PackedStrings(strings)) == strings


def test_a_hundred_thousand_annotations_are_six_megabytes() -> None:
    images = [ImageRow(i, f"{i:012}.jpg", 480, 640) for i in range(20_000)]
    rows = [AnnotationRow(i // 5, i, i % 80, [1.0, 2.0, 3.0, 4.0], 12.0, False) for i in range(100_000)]
    data = Annotations.pack("a.json", Path(), [Category(i, str(i)) for i in range(80)], images, rows)
    arrays = arrays_of(data)
    assert all(array.dtype.kind in "iufb" for array in arrays.values())  # no Python objects to count references of
    others = {field.name for field in dataclasses.fields(data)} - arrays.keys()
    assert others == {"source", "image_dir", "categories", "file_names"}
    per_annotation = 8 + 4 * 8 + 8 + 8 + 1  # id, box, area, label, crowd
    per_image = 8 + 2 * 8 + 8 + 16 + 8  # id, size, offset, the name's 16 letters, where they end
    total = 100_000 * per_annotation + 20_000 * per_image + 2 * 8
    assert sum(array.nbytes for array in arrays.values()) == total
    assert len(pickle.dumps(data)) < total + 10_000  # what a worker started by spawn is sent


# --------------------------------------------------------------------------------------------------------- VOC

OBJECT = "<object><name>{}</name>{}<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
SIZE = "<size><width>200</width><height>100</height><depth>3</depth></size>"


def make_voc(root: Path, files: dict[str, str]) -> Path:
    (root / "Annotations").mkdir()
    for stem, content in files.items():
        (root / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{content}</annotation>")
    return root


def test_voc(tmp_path: Path) -> None:
    two = OBJECT.format("dog", "", 1, 2, 11, 22) + OBJECT.format(" cat ", "<difficult>1</difficult>", 0, 0, 5.5, 5)
    make_voc(tmp_path, {"b": SIZE + "<filename>B.png</filename>" + two, "a": OBJECT.format("dog", "", 3, 3, 3, 9), "c": SIZE})
    data = load_voc(tmp_path)
    assert data.categories == (Category(1, "cat"), Category(2, "dog"))
    assert [data.file_names[i] for i in range(3)] == ["a.jpg", "B.png", "c.jpg"]
    assert data.image_dir == tmp_path / "JPEGImages"
    assert data.image_ids.tolist() == [1, 2, 3]
    assert data.sizes.tolist() == [[0, 0], [100, 200], [100, 200]]
    assert data.coco_boxes.tolist() == [[3, 3, 0, 6], [1, 2, 10, 20], [0, 0, 5.5, 5]]
    assert data.areas.tolist() == [0, 200, 27.5]
    assert data.labels.tolist() == [1, 1, 0]
    assert data.crowd.tolist() == [False, False, True]
    target = data.target(1, (100, 200))
    assert target.boxes.tolist() == [[1, 2, 11, 22]] and target.ignore_boxes.tolist() == [[0, 0, 5.5, 5]]
    assert data.has_boxes().tolist() == [False, True, False]


def test_voc_image_set_chooses_images_but_not_classes(tmp_path: Path) -> None:
    make_voc(tmp_path, {"a": OBJECT.format("ant", "", 1, 1, 2, 2), "b": OBJECT.format("bee", "", 1, 1, 2, 2), "my photo": ""})
    (tmp_path / "set.txt").write_text("b  1\n\nmy photo\n")
    data = load_voc(tmp_path, tmp_path / "set.txt")
    assert [data.file_names[i] for i in range(2)] == ["b.jpg", "my photo.jpg"]
    assert [category.name for category in data.categories] == ["ant", "bee"]
    assert data.labels.tolist() == [1]
    (tmp_path / "set.txt").write_text("b\nnone\n")
    with pytest.raises(UserError, match=r"set\.txt: 'none' has no file Annotations/none\.xml"):
        load_voc(tmp_path, tmp_path / "set.txt")
    with pytest.raises(UserError, match=r"no\.txt: cannot be read"):
        load_voc(tmp_path, tmp_path / "no.txt")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("<object>", "not valid XML"),
        ("<object><bndbox/></object>", "an object has no <name>"),
        ("<object><name> </name></object>", "an object has no <name>"),
        ("<object><name>a</name></object>", "corners of the box must be finite numbers"),
        (OBJECT.format("a", "", 1, 2, "wide", 4), "corners of the box must be finite numbers"),
        (OBJECT.format("a", "", 1, 2, "", 4), "corners of the box must be finite numbers"),
        (OBJECT.format("a", "", 1, 2, "nan", 4), "corners of the box must be finite numbers"),
        (OBJECT.format("a", "", 1, 2, "inf", 4), "corners of the box must be finite numbers"),
        ("<size><height>tall</height></size>", "<height> of <size> must be a number of pixels, got 'tall'"),
        ("<size><width>inf</width></size>", "<width> of <size> must be a number of pixels"),
        ("<filename>../../a.jpg</filename>", "inside the image folder"),
        ("<filename>/root/a.jpg</filename>", "inside the image folder"),
    ],
)
def test_voc_file_at_fault_is_named(tmp_path: Path, content: str, said: str) -> None:
    make_voc(tmp_path, {"good": OBJECT.format("a", "", 1, 1, 2, 2), "odd": content})
    with pytest.raises(UserError) as caught:
        load_voc(tmp_path)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert "odd.xml" in str(caught.value)


def test_voc_of_other_kinds_of_wrong(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there are none"):
        load_voc(tmp_path)
    folder = make_voc(tmp_path, {}) / "Annotations"
    (folder / "odd.xml").write_bytes(b'<?xml version="1.0" encoding="klingon"?><annotation/>')
    with pytest.raises(UserError, match=r"odd\.xml: not valid XML"):
        load_voc(tmp_path)
    (folder / "odd.xml").unlink()
    (folder / "odd.xml").mkdir()
    with pytest.raises(UserError, match=r"odd\.xml: cannot be read"):
        load_voc(tmp_path)


def test_real_voc(real_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = real_data / "bccd" / "BCCD"
    everything = load_voc(root)
    names = [category.name for category in everything.categories]
    assert (len(everything), len(everything.labels)) == (364, 4888)
    assert dict(zip(names, everything.counts().tolist())) == {"Platelets": 361, "RBC": 4155, "WBC": 372}
    assert everything.categories == (Category(1, "Platelets"), Category(2, "RBC"), Category(3, "WBC"))
    assert not everything.crowd.any()
    report_odd_boxes(everything)
    (line,) = capsys.readouterr().out.splitlines()
    assert "2 of 4888 boxes have no area" in line and "BloodImage_00338.jpg" in line and "BloodImage_00343.jpg" in line

    parts = {part: load_voc(root, root / "ImageSets" / "Main" / f"{part}.txt") for part in ("train", "val", "test")}
    assert {part: len(data) for part, data in parts.items()} == {"train": 205, "val": 87, "test": 72}
    assert sum(len(data.labels) for data in parts.values()) == 4888
    assert all(data.categories == everything.categories for data in parts.values())
    assert sum(len(data.target(i, (480, 640)).boxes) for data in parts.values() for i in range(len(data))) == 4886
