"""CSV files of keras-retinanet to `Annotations`: `path,x1,y1,x2,y2,class` a line; `path,,,,,` is an image without objects."""

import csv
import reprlib
from pathlib import Path

from retinanet.data.annotations import AnnotationRow, Annotations, ImageRow, corner_row
from retinanet.data.faults import DataError, Fault, reading
from retinanet.data.files import LARGEST_TEXT, name_inside, read_classes, read_lines
from retinanet.errors import UserError, did_you_mean
from retinanet.structures import Category

CLASS_FILE = "classes.csv"


def load_csv(
    file: Path, image_dir: Path | None = None, *, classes: Path | None = None, faults: list[Fault] | None = None
) -> Annotations:
    """Reads a CSV file without a header line. Paths count from `image_dir`, or else from the file's own folder.

    Classes are those of `classes` (`name,id` a line) or of a classes.csv beside the file, or else the names found,
    sorted and numbered from 1. An annotation's id is its line. Image sizes stay unknown (0). Raises `UserError` naming
    the line; with a list `faults` it is noted there and left out instead.
    """
    image_dir = image_dir or file.parent
    class_file = classes or file.parent / CLASS_FILE
    categories = read_classes(class_file) if classes or class_file.exists() else []
    try:
        reader = csv.reader(read_lines(file, 16 * LARGEST_TEXT))  # ten million boxes and more
        lines = [(reader.line_num, [field.strip() for field in row]) for row in reader if row]
    except csv.Error as error:
        raise UserError(f"{file}: not a CSV file: {error}") from None
    if not categories:
        names = sorted({row[5] for _, row in lines if len(row) == 6} - {""})
        categories = [Category(number, name) for number, name in enumerate(names, start=1)]
    label_of = {category.name: label for label, category in enumerate(categories)}
    index_of: dict[str, int] = {}
    rows: list[AnnotationRow] = []
    for number, row in lines:
        with reading(faults, file):
            where = f"{file}, line {number}"
            if len(row) != 6:
                raise DataError(
                    "unusable entry", f"{where}: expected path,x1,y1,x2,y2,class, got {reprlib.repr(','.join(row))}"
                )
            name = name_inside(image_dir, image_dir / row[0], where)
            index = index_of.setdefault(name, len(index_of))
            if any(row[1:]):
                rows.append(_annotation(index, number, row, where, label_of))
    images = [ImageRow(index + 1, name, 0, 0) for name, index in index_of.items()]
    if not images or not categories:
        raise UserError(f"{file}: no {'objects' if images else 'images'} in it")
    return Annotations.pack(str(file), image_dir, categories, images, rows)


def _annotation(image: int, number: int, row: list[str], where: str, label_of: dict[str, int]) -> AnnotationRow:
    name = row[5]
    if name not in label_of:
        message = f"{where}: class {name!r} is not in the list of classes.{did_you_mean(name, label_of)}"
        raise DataError("unknown class", message, annotation=number)
    return corner_row(image, number, label_of[name], row[1:5], where)
