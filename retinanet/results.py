"""Detections as rows of numbers, and as the JSON that COCO's tools and this project exchange."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retinanet.errors import UserError
from retinanet.structures import Detections

COLUMNS = 7  # image_id, x, y, width, height, score, category_id: what pycocotools' loadRes takes


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
    """Rows [D, 7] as {image_id, file_name, category_id, category_name, bbox, score}."""
    return [
        {
            "image_id": int(row[0]),
            "file_name": file_names[int(row[0])],
            "category_id": int(row[6]),
            "category_name": names[int(row[6])],
            "bbox": [round(value, 3) for value in row[1:5]],
            "score": round(row[5], 6),
        }
        for row in rows.tolist()
    ]


def write_entries(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    """A JSON list with an entry on each line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    path.write_text(f"[\n{text}\n]\n" if entries else "[]\n", encoding="utf-8")


def write_detections(path: Path, rows: np.ndarray, file_names: dict[int, str], names: dict[int, str]) -> None:
    """Writes rows [D, 7] as a list of `to_entries`."""
    write_entries(path, to_entries(rows, file_names, names))


def read_detections(path: Path) -> np.ndarray:
    """Rows [D, 7] of a COCO results file, of any detector. Raises `UserError` naming file and entry."""
    return entry_rows(read_entries(path), path)


def entry_rows(entries: list[Any], path: Path) -> np.ndarray:
    """Rows [D, 7] of what `read_entries` found in the file `path`."""
    return np.array([_row(entry, n, path) for n, entry in enumerate(entries)]).reshape(-1, COLUMNS)


def read_entries(path: Path) -> list[Any]:
    """The list in a COCO results file, its entries unchecked."""
    try:
        entries = json.loads(path.read_bytes())
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


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
