"""Detections as rows of numbers, and as the JSON that COCO's tools and this project exchange."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retinanet.bounded import LARGEST_JSON, read_bounded
from retinanet.errors import UserError
from retinanet.structures import Detections

COLUMNS = 7  # image_id, x, y, width, height, score, category_id: what pycocotools' loadRes takes
ENTRY = ("image_id", "file_name", "category_id", "category_name", "bbox", "score")
BLOCK = 10_000  # rows that are entries at a time: a million are a gigabyte


def to_rows(image_id: int, detections: Detections, category_ids: Sequence[int] | None = None) -> np.ndarray:
    """[D, 7] float64. `category_ids` by label replaces the detections' own; -1 leaves a class out."""
    boxes, scores, labels = detections.numpy()
    ids = np.array(category_ids if category_ids is not None else [c.id for c in detections.categories], np.float64)
    rows = np.empty((len(scores), COLUMNS))
    rows[:, 0], rows[:, 5] = image_id, scores
    rows[:, 1:3], rows[:, 3:5] = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    rows[:, 6] = ids[labels]
    return rows[rows[:, 6] != -1]


def to_entries(rows: np.ndarray, file_names: dict[int, str], names: dict[int, str]) -> list[dict[str, Any]]:
    """Rows [D, 7] as dicts with the keys `ENTRY`."""
    boxes, scores = _rounded(rows[:, 1:5], 3).tolist(), _rounded(rows[:, 5], 6).tolist()
    images, classes = (rows[:, column].astype(np.int64).tolist() for column in (0, 6))
    columns = images, [file_names[i] for i in images], classes, [names[c] for c in classes], boxes, scores
    return [dict(zip(ENTRY, values)) for values in zip(*columns, strict=True)]


def _rounded(values: np.ndarray, digits: int) -> np.ndarray:
    """What Python's `round` makes of each value, which takes most of the time of writing if asked for all of them."""
    scaled = values * 10.0**digits
    result = np.rint(scaled) / 10.0**digits
    with np.errstate(invalid="ignore"):  # inf % 1
        clear = (np.abs(scaled) < 1e9) & (np.abs(scaled % 1 - 0.5) > 1e-6)  # the product's own error decides nothing
    result[~clear] = [round(value, digits) for value in values[~clear].tolist()]
    return result


def write_entries(path: Path, entries: Iterable[dict[str, Any]]) -> None:
    """A JSON list with an entry on each line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    encode = json.JSONEncoder(ensure_ascii=False).encode
    with path.open("w", encoding="utf-8") as file:
        between = "[\n"
        for entry in entries:
            file.write(between + encode(entry))
            between = ",\n"
        file.write("[]\n" if between == "[\n" else "\n]\n")


def write_detections(path: Path, rows: np.ndarray, file_names: dict[int, str], names: dict[int, str]) -> None:
    """Writes rows [D, 7] as a list of `to_entries`, of which no more than `BLOCK` exist at a time."""
    blocks = (to_entries(rows[begin : begin + BLOCK], file_names, names) for begin in range(0, len(rows), BLOCK))
    write_entries(path, (entry for block in blocks for entry in block))


def entry_rows(entries: list[Any], path: Path) -> np.ndarray:
    """Rows [D, 7] of what `read_entries` found in the file `path`. Raises `UserError` naming file and entry."""
    return np.array([_row(entry, n, path) for n, entry in enumerate(entries)]).reshape(-1, COLUMNS)


def read_entries(path: Path) -> list[Any]:
    """The list in a COCO results file, its entries unchecked."""
    try:
        entries = json.loads(read_bounded(path, LARGEST_JSON))
    except FileNotFoundError:
        raise UserError(f"results file {path} does not exist") from None
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"results file {path} cannot be read as JSON: {error}") from None
    if not isinstance(entries, list):
        raise UserError(f"{path}: a COCO results file is a list of detections")
    return entries


def _row(entry: Any, n: int, path: Path) -> list[float]:
    try:
        box = [float(value) for value in entry["bbox"]]
        row = [float(int(entry["image_id"])), *box, float(entry["score"]), float(int(entry["category_id"]))]
    except (KeyError, TypeError, ValueError, OverflowError):  # int(inf) overflows
        row = []
    if len(row) != COLUMNS or not all(map(math.isfinite, row)):
        raise UserError(f"{path}: entry {n} needs image_id, category_id, bbox [x, y, width, height] and score")
    return row


def make_folders(*folders: Path | None) -> None:
    """Those of the results, before the work: one that cannot be written is found then, not after it."""
    for folder in filter(None, folders):
        folder.mkdir(parents=True, exist_ok=True)


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
