"""COCO JSON to `Annotations`. Everything a file can get wrong is found here, before the first step."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from retinanet.data.annotations import AnnotationRow, Annotations, ImageRow
from retinanet.distributed import say
from retinanet.errors import UserError
from retinanet.structures import Category

SHOWN = 5  # annotation ids named in a note


def load_coco(file: str | Path, image_dir: str | Path) -> Annotations:
    """Reads a COCO instances file. Missing `area` and `iscrowd` are filled in; labels follow ascending category ids.

    Raises `UserError` naming file and annotation for an unknown class or image, or a box that is no box. Boxes
    without area stay (evaluation counts them as COCO does), are reported, and are left out of training targets.
    """
    file = Path(file)
    raw = _read_json(file)
    categories = _categories(raw, file)
    label_of = {category.id: label for label, category in enumerate(categories)}
    images, image_of = _images(raw, file)
    rows = [_annotation(entry, n, label_of, image_of, file) for n, entry in enumerate(raw["annotations"])]
    return Annotations.pack(str(file), Path(image_dir), categories, images, rows)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise UserError(f"annotation file {file} does not exist") from None
    except OSError as error:
        raise UserError(f"annotation file {file} cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"annotation file {file} is not valid JSON: {error}") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(raw, dict) or not isinstance(raw.get(key), list):
            raise UserError(f"{file}: a COCO instances file needs a list '{key}'")
    return raw


def _categories(raw: dict[str, Any], file: Path) -> list[Category]:
    try:
        categories = sorted(Category(int(entry["id"]), str(entry["name"])) for entry in raw["categories"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{file}: every entry of 'categories' needs a whole-number 'id' and a 'name'") from None
    for what in ("id", "name"):
        value, times = Counter(getattr(c, what) for c in categories).most_common(1)[0] if categories else (None, 0)
        if times > 1:
            raise UserError(f"{file}: category {what} {value!r} occurs more than once")
    if not categories:
        raise UserError(f"{file}: 'categories' is empty")
    return categories


def _images(raw: dict[str, Any], file: Path) -> tuple[list[ImageRow], dict[int, int]]:
    """The images, and the index of each id."""
    images: list[ImageRow] = []
    index_of: dict[int, int] = {}
    for n, entry in enumerate(raw["images"]):
        try:
            size = int(entry.get("height") or 0), int(entry.get("width") or 0)
            image = ImageRow(int(entry["id"]), str(entry["file_name"]), *size)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(f"{file}: images[{n}] needs a whole-number 'id' and a 'file_name'") from None
        if image.id in index_of:
            raise UserError(f"{file}: image id {image.id} occurs more than once")
        index_of[image.id] = n
        images.append(image)
    if not images:
        raise UserError(f"{file}: 'images' is empty")
    return images, index_of


def _annotation(entry: Any, n: int, label_of: dict[int, int], image_of: dict[int, int], file: Path) -> AnnotationRow:
    try:
        number, image_id, category_id = int(entry.get("id", n)), int(entry["image_id"]), int(entry["category_id"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{file}: annotations[{n}] needs whole-number 'image_id' and 'category_id'") from None
    where = f"{file}: annotation {number}"
    if category_id not in label_of:
        known = ", ".join(str(i) for i in list(label_of)[:10]) + (", ..." if len(label_of) > 10 else "")
        raise UserError(f"{where} has category_id {category_id}, which 'categories' does not list (it has {known})")
    if image_id not in image_of:
        raise UserError(f"{where} has image_id {image_id}, which 'images' does not list")
    try:
        box = [float(value) for value in entry["bbox"]]
        area = entry.get("area")
        area = box[2] * box[3] if area is None else float(area)
    except (KeyError, TypeError, ValueError, IndexError):
        box, area = [], 0.0
    if len(box) != 4 or not all(map(math.isfinite, [*box, area])):
        raise UserError(f"{where} (image {image_id}): 'bbox' must be [x, y, width, height], got {entry.get('bbox')!r}")
    return AnnotationRow(image_of[image_id], number, label_of[category_id], box, area, bool(entry.get("iscrowd") or 0))


def report_odd_boxes(annotations: Annotations) -> None:
    """Says which boxes training will clip or leave out."""
    boxes, ids = annotations.coco_boxes, annotations.annotation_ids
    size = np.repeat(annotations.sizes, np.diff(annotations.offsets), axis=0)[:, ::-1]  # width, height
    known = (size > 0).all(axis=1)
    flat = (boxes[:, 2:] <= 0).any(axis=1)
    outside = known & ~flat & ((boxes[:, :2] >= size) | (boxes[:, :2] + boxes[:, 2:] <= 0)).any(axis=1)
    across = known & ~flat & ~outside & ((boxes[:, :2] < -1) | (boxes[:, :2] + boxes[:, 2:] > size + 1)).any(axis=1)
    for mask, what in (
        (flat, "have no area and are left out of training"),
        (outside, "lie outside their image and are left out of training"),
        (across, "reach more than a pixel over their image's border and are clipped"),
    ):
        if mask.any():
            named = ", ".join(map(str, ids[mask][:SHOWN])) + (", ..." if mask.sum() > SHOWN else "")
            say(f"note: {annotations.source}: {mask.sum()} of {len(boxes)} boxes {what} (annotation {named})")
