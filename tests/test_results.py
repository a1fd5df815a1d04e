"""Detections as rows and as JSON: nothing is lost on the way, and a foreign file's faults are named."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from retinanet.errors import UserError
from retinanet.results import COLUMNS, entry_rows, read_entries, to_rows, write_detections, write_json
from retinanet.structures import Category, Detections

CATEGORIES = (Category(3, "bird"), Category(90, "tooth brush"))
GOOD = {"image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4], "score": 0.5}


def two_detections() -> Detections:
    boxes = torch.tensor([[10.0, 20.0, 110.0, 70.0], [0.0, 0.0, 4.5, 8.25]])
    return Detections(boxes, torch.tensor([0.75, 0.5]), torch.tensor([1, 0]), CATEGORIES)


def read_rows(path: Path) -> np.ndarray:
    return entry_rows(read_entries(path), path)


def test_rows_hold_corner_size_score_and_category_id() -> None:
    expected = [[12, 10, 20, 100, 50, 0.75, 90], [12, 0, 0, 4.5, 8.25, 0.5, 3]]  # width is x2 - x1, without + 1
    np.testing.assert_array_equal(to_rows(12, two_detections()), expected)


def test_rows_with_another_data_sets_ids() -> None:
    np.testing.assert_array_equal(to_rows(1, two_detections(), [5, 6])[:, 6], [6, 5])
    left = to_rows(1, two_detections(), [5, -1])  # -1: the data set has no such class
    np.testing.assert_array_equal(left, [[1, 0, 0, 4.5, 8.25, 0.5, 5]])


@pytest.mark.parametrize("categories", [CATEGORIES, ()])
def test_no_detections_are_no_rows(categories: tuple[Category, ...]) -> None:
    nothing = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64), categories)
    assert to_rows(1, nothing).shape == (0, COLUMNS)


def test_large_image_ids_survive(tmp_path: Path) -> None:
    """Objects365 numbers its images beyond 2^32, which a float32 or int32 would not hold."""
    number = 900_100_448_263
    rows = to_rows(number, two_detections())
    write_detections(tmp_path / "d.json", rows, {number: "a.jpg"}, {3: "bird", 90: "tooth brush"})
    assert read_rows(tmp_path / "d.json")[:, 0].tolist() == [number, number]


def test_the_form_of_detections_json(tmp_path: Path) -> None:
    file = tmp_path / "new" / "folder" / "detections.json"
    write_detections(file, to_rows(12, two_detections()), {12: "straße/ä.jpg"}, {3: "bird", 90: "tooth brush"})
    assert json.loads(file.read_text(encoding="utf-8")) == [
        {
            "image_id": 12,
            "file_name": "straße/ä.jpg",
            "category_id": 90,
            "category_name": "tooth brush",
            "bbox": [10.0, 20.0, 100.0, 50.0],
            "score": 0.75,
        },
        {
            "image_id": 12,
            "file_name": "straße/ä.jpg",
            "category_id": 3,
            "category_name": "bird",
            "bbox": [0.0, 0.0, 4.5, 8.25],
            "score": 0.5,
        },
    ]
    first = json.loads(file.read_text(encoding="utf-8"))[0]
    assert [type(first[key]) for key in ("image_id", "category_id", "score")] == [int, int, float]


def test_round_trip(tmp_path: Path) -> None:
    """bbox is rounded to 3 decimals and score to 6: half a unit of the last is the most that can be lost."""
    rng = np.random.default_rng(0)
    rows = np.column_stack([rng.integers(1, 9, 50), rng.uniform(0, 500, (50, 4)), rng.random(50), rng.choice([3, 90], 50)])
    write_detections(tmp_path / "d.json", rows, {n: f"{n}.jpg" for n in range(1, 9)}, {3: "bird", 90: "tooth brush"})
    again = read_rows(tmp_path / "d.json")
    np.testing.assert_array_equal(again[:, [0, 6]], rows[:, [0, 6]])
    np.testing.assert_allclose(again[:, 1:5], rows[:, 1:5], atol=0.5001e-3, rtol=0)
    np.testing.assert_allclose(again[:, 5], rows[:, 5], atol=0.5001e-6, rtol=0)


def test_rounding_is_pythons_own_and_blocks_leave_no_seam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers a hair from a half: a thousand times 9.0005 is 9000.5 in floats, which rint takes down, though it lies above.
    The text is what json.dumps writes of each entry, whatever the number of blocks."""
    halves = np.arange(1, 41).reshape(10, 4) + np.array([0.0005, 0.0015, 0.0625, 0.1235])
    rows = np.column_stack([np.full(10, 7), halves, np.linspace(0.0000005, 1, 10), np.full(10, 3)])
    rows[0, 1:5] = [-0.0001, 509779946963137.3, np.inf, np.nan]  # the second times a thousand loses its tenths
    monkeypatch.setattr("retinanet.results.BLOCK", 4)
    write_detections(tmp_path / "d.json", rows, {7: 'a "b".jpg'}, {3: "größe"})
    entries = [
        {
            "image_id": 7,
            "file_name": 'a "b".jpg',
            "category_id": 3,
            "category_name": "größe",
            "bbox": [round(value, 3) for value in row[1:5]],
            "score": round(row[5], 6),
        }
        for row in rows.tolist()
    ]
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    assert (tmp_path / "d.json").read_text(encoding="utf-8") == f"[\n{lines}\n]\n"


def test_empty_file_of_results(tmp_path: Path) -> None:
    write_detections(tmp_path / "d.json", np.empty((0, COLUMNS)), {}, {})
    assert json.loads((tmp_path / "d.json").read_text()) == []
    again = read_rows(tmp_path / "d.json")
    assert again.shape == (0, COLUMNS) and again.dtype == np.float64


def test_more_keys_than_needed_are_no_fault(tmp_path: Path) -> None:
    """Other programs write `segmentation`, `id` or `area` along, and whole numbers where these are floats."""
    entry = {**GOOD, "score": 1, "segmentation": [], "id": 4, "area": 12.0}
    (tmp_path / "d.json").write_text(json.dumps([entry]))
    np.testing.assert_array_equal(read_rows(tmp_path / "d.json"), [[1, 1, 2, 3, 4, 1, 3]])


@pytest.mark.parametrize(
    "entry",
    [
        {key: value for key, value in GOOD.items() if key != "image_id"},
        {key: value for key, value in GOOD.items() if key != "category_id"},
        {key: value for key, value in GOOD.items() if key != "bbox"},
        {key: value for key, value in GOOD.items() if key != "score"},
        {**GOOD, "score": float("nan")},
        {**GOOD, "score": None},
        {**GOOD, "bbox": [1, 2, 3]},
        {**GOOD, "bbox": [1, 2, 3, 4, 5]},
        {**GOOD, "bbox": [1, 2, float("nan"), 4]},
        {**GOOD, "bbox": 7},
        {**GOOD, "bbox": [1, 2, 3, "wide"]},
        {**GOOD, "image_id": "street.jpg"},
        {**GOOD, "image_id": float("inf")},  # JSON as Python writes it: Infinity
        {**GOOD, "category_id": float("nan")},
        [1, 2, 3],
        "text",
        None,
    ],
)
def test_a_faulty_entry_is_named(tmp_path: Path, entry: object) -> None:
    (tmp_path / "d.json").write_text(json.dumps([GOOD, entry]))
    with pytest.raises(
        UserError, match=r"d\.json: entry 1 needs image_id, category_id, bbox \[x, y, width, height\] and score"
    ):
        read_rows(tmp_path / "d.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as JSON"),
        (b"[{]", "cannot be read as JSON"),
        (b"\xff\xfe\xfa\x00\xd8", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b'{"images": []}', "is a list of detections"),
        (b"null", "is a list of detections"),
    ],
)
def test_a_file_of_another_kind(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "d.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_rows(tmp_path / "d.json")
    assert "d.json" in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.json does not exist"):
        read_rows(tmp_path / "none.json")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        read_rows(tmp_path)


def test_json_keeps_letters_and_writes_null(tmp_path: Path) -> None:
    write_json(tmp_path / "a" / "m.json", {"AP": None, "per_class": {"Käse": 1}})
    text = (tmp_path / "a" / "m.json").read_text(encoding="utf-8")
    assert "Käse" in text and json.loads(text) == {"AP": None, "per_class": {"Käse": 1}}
