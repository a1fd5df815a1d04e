"""COCO JSON to `Annotations`. Everything a file can get wrong is found here, before the first step."""

import json
import math
import reprlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from retinanet.bounded import LARGEST_JSON, read_bounded
from retinanet.data.annotations import AnnotationRow, Annotations, ImageRow
from retinanet.data.faults import DataError, Fault, reading
from retinanet.distributed import say
from retinanet.errors import CONTROL, UserError
from retinanet.structures import Category

SHOWN = 5  # annotations named in a note
LARGEST = 2**53  # a larger id would lose its last digits in evaluation, where ids and scores share float64 rows


def load_coco(file: str | Path, image_dir: str | Path, faults: list[Fault] | None = None) -> Annotations:
    """Reads a COCO instances file. Missing `area` and `iscrowd` are filled in; labels follow ascending category ids.

    Raises `UserError` naming file and annotation for an unknown class or image, or a box that is no box. Boxes
    without area stay (evaluation counts them as COCO does), are reported, and are left out of training targets.
    With a list `faults` such entries are noted there and left out instead.
    """
    file = Path(file)
    raw = _read_json(file)
    categories = _categories(raw, file)
    label_of = {category.id: label for label, category in enumerate(categories)}
    images: dict[int, ImageRow] = {}
    for n, entry in enumerate(raw["images"]):
        with reading(faults, file):
            image = _image(entry, n, file)
            if image.id in images:
                raise DataError("duplicate image id", f"{file}: image id {image.id} occurs more than once")
            images[image.id] = image
    if not images:
        raise UserError(f"{file}: 'images' is empty")
    image_of = {number: index for index, number in enumerate(images)}

    def rows() -> Iterator[AnnotationRow]:
        entries, raw["annotations"] = raw["annotations"], []
        for n in range(len(entries)):
            with reading(faults, file):
                yield _annotation(entries[n], n, label_of, image_of, file)
            entries[n] = None  # a million of them are a gigabyte

    return Annotations.pack(str(file), Path(image_dir), categories, [*images.values()], rows())


def _read_json(file: Path) -> dict[str, Any]:
    try:  # the bytes are held by nobody, so that they go once they are text; outlines go as they are read
        raw = json.loads(read_bounded(file, LARGEST_JSON), object_hook=_without_outline)
    except FileNotFoundError:
        raise UserError(f"annotation file {file} does not exist") from None
    except OSError as error:
        raise UserError(f"annotation file {file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        begin = read_bounded(file, LARGEST_JSON)[:20].decode(errors="replace")  # tells a web page or a Git LFS pointer
        raise UserError(f"annotation file {file} is not valid JSON: {error}; it begins with {begin!r}") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(raw, dict) or not isinstance(raw.get(key), list):
            raise UserError(f"{file}: a COCO instances file needs a list '{key}'")
    return raw


def _without_outline(entry: dict[str, Any]) -> dict[str, Any]:
    entry.pop("segmentation", None)  # polygons are most of COCO's files
    return entry


def _categories(raw: dict[str, Any], file: Path) -> list[Category]:
    try:
        return check_categories([Category(_whole(entry["id"]), _text(entry["name"])) for entry in raw["categories"]], file)
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{file}: every entry of 'categories' needs a whole-number 'id' (to 2^53) and a 'name'") from None


def check_categories(categories: list[Category], file: Path) -> list[Category]:
    """`categories` by ascending id. Raises `UserError` if there are none, or an id or a name stands there twice."""
    categories = sorted(categories)
    if categories and categories[0].id < 0:
        raise UserError(f"{file}: category id {categories[0].id} is negative")
    for what in ("id", "name"):
        value, times = Counter(getattr(c, what) for c in categories).most_common(1)[0] if categories else (None, 0)
        if times > 1:
            raise UserError(f"{file}: category {what} {value!r} occurs more than once")
    if not categories:
        raise UserError(f"{file}: 'categories' is empty")
    return categories


def _image(entry: Any, n: int, file: Path) -> ImageRow:
    try:
        size = _whole(entry.get("height") or 0), _whole(entry.get("width") or 0)
        image = ImageRow(_whole(entry["id"]), _text(entry["file_name"]), *size)
    except (KeyError, TypeError, ValueError, AttributeError):
        what = "needs a whole-number 'id' (to 2^53), a 'file_name', and if it has 'height' and 'width', whole numbers there"
        raise UserError(f"{file}: images[{n}]{_id_of(entry)} {what}") from None
    if min(size) < 0:
        raise UserError(f"{file}: image id {image.id} has a negative height or width")
    check_file_name(image.file_name, f"{file}: image id {image.id}")
    return image


def _annotation(entry: Any, n: int, label_of: dict[int, int], image_of: dict[int, int], file: Path) -> AnnotationRow:
    try:
        number, image_id, category_id = _whole(entry.get("id", n)), _whole(entry["image_id"]), _whole(entry["category_id"])
    except (KeyError, TypeError, ValueError, AttributeError):
        what = "needs whole numbers (to 2^53) as 'image_id' and 'category_id', and as 'id' if it has one"
        raise UserError(f"{file}: annotations[{n}]{_id_of(entry)} {what}") from None
    where = f"{file}: annotation {number}"
    if category_id not in label_of:
        known = ", ".join(str(i) for i in list(label_of)[:10]) + (", ..." if len(label_of) > 10 else "")
        message = f"{where} has category_id {category_id}, which 'categories' does not list (it has {known})"
        raise DataError("unknown class", message, annotation=number)
    if image_id not in image_of:
        message = f"{where} has image_id {image_id}, which 'images' does not list"
        raise DataError("unknown image id", message, annotation=number)
    box = _box(entry.get("bbox"))
    if box is None:
        got = reprlib.repr(entry.get("bbox"))
        message = f"{where} (image {image_id}): 'bbox' must be [x, y, width, height] in finite numbers, got {got}"
        raise DataError("unusable box", message, annotation=number)
    try:
        area = box[2] * box[3] if entry.get("area") is None else float(entry["area"])
        crowd = bool(_whole(entry.get("iscrowd") or 0))
    except (TypeError, ValueError, OverflowError):
        area, crowd = math.nan, False
    if not math.isfinite(area):
        message = f"{where} (image {image_id}): 'area' must be a finite number and 'iscrowd' 0 or 1, if given"
        raise DataError("unusable entry", message, annotation=number)
    return AnnotationRow(image_of[image_id], number, label_of[category_id], box, area, crowd)


def _box(value: Any) -> list[float] | None:
    """`value` if it is four finite numbers whose corners and area are finite too."""
    if not isinstance(value, list) or len(value) != 4 or not {type(number) for number in value} <= {int, float}:
        return None
    try:
        x, y, width, height = map(float, value)
    except OverflowError:
        return None
    finite = math.isfinite(x + width) and math.isfinite(y + height) and math.isfinite(width * height)
    return [x, y, width, height] if finite else None


def _whole(value: Any) -> int:
    """A whole number, also one written as 7.0 or "7". Raises TypeError or ValueError."""
    if isinstance(value, float) and not value.is_integer():  # nor are NaN and inf
        raise ValueError
    number = int(value)
    if abs(number) > LARGEST:
        raise ValueError
    return number


def _text(value: Any) -> str:
    """A name; a number is taken as one. Raises ValueError."""
    text = str(value) if isinstance(value, int | float) else value
    if not isinstance(text, str) or not text.strip():
        raise ValueError
    text.encode()  # half of a surrogate pair is a ValueError
    return text


def _id_of(entry: Any) -> str:
    """` (id 7)` where an entry at fault says which it is."""
    return f" (id {reprlib.repr(entry['id'])})" if isinstance(entry, dict) and "id" in entry else ""


def check_file_name(name: str, where: str) -> None:
    """Raises `UserError` for an image file that lies outside the image folder: a data set names only its own files."""
    path = PurePath(name)
    if path.anchor or ".." in path.parts or not path.name or CONTROL.search(name):
        message = f"{where} has the file name {reprlib.repr(name)}, which must be a path inside the image folder"
        raise DataError("unusable file name", message)


def report_odd_boxes(annotations: Annotations) -> None:
    """Says which boxes training will clip or leave out."""
    odd, ids, image_of = annotations.odd_boxes(annotations.sizes), annotations.annotation_ids, annotations.image_of
    for mask, what in (
        (odd["negative box"] | odd["zero-size box"], "have no area and are left out of training"),
        (odd["outside box"], "lie outside their image and are left out of training"),
        (odd["border box"], "reach more than a pixel over their image's border and are clipped"),
    ):
        if mask.any():
            rows = np.flatnonzero(mask)
            named = [f"{ids[row]} in {annotations.file_names[int(image_of[row])]}" for row in rows[:SHOWN]]
            named += ["..."] if len(rows) > SHOWN else []
            say(f"note: {annotations.source}: {len(rows)} of {len(ids)} boxes {what} (annotation {', '.join(named)})")
