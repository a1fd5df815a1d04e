"""What the readers of text files share: bounded reading, names that stay in their folder, lists of classes."""

import csv
import os
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Any

import yaml

from retinanet.bounded import read_bounded
from retinanet.data.coco import LARGEST, check_categories, check_file_name
from retinanet.errors import UserError
from retinanet.structures import Category

LARGEST_TEXT = 64 * 2**20  # bytes: more is no list of images and no image's labels
LARGEST_YAML = 4 * 2**20  # bytes: 100,000 names of classes; its reader is slow
YAML = (".yaml", ".yml")


def read_bytes(file: Path, largest: int | None = None) -> bytes:
    """The content of a file of at most `largest` bytes, 64 MB if None. Raises `UserError`."""
    try:
        return read_bounded(file, largest or LARGEST_TEXT)
    except (OSError, ValueError) as error:  # ValueError: a null in the name
        raise UserError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def read_lines(file: Path, largest: int | None = None) -> list[str]:
    """The lines of a UTF-8 text, stripped; line n is at n - 1. Raises `UserError`."""
    try:
        return [line.strip() for line in read_bytes(file, largest).decode("utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text: {error}") from None


def read_yaml(file: Path) -> dict[str, Any]:
    """A YAML mapping, all values as the text that stands there: a class may be called `no`. Raises `UserError`."""
    try:
        raw = yaml.load(read_bytes(file, LARGEST_YAML), Loader=yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{file}: expected 'key: value' lines")
    return raw


def read_classes(file: Path) -> list[Category]:
    """Classes, by ascending id, of a data.yaml (`names`), a CSV file (`name,id`) or a text file (a name a line, from 0).

    Raises `UserError` for a name or an id that is none or stands there twice.
    """
    pairs: Iterable[tuple[Any, Any]]
    try:
        if file.suffix == ".csv":
            expected = "a line 'name,id' for each class"
            pairs = [(row[-1], ",".join(row[:-1])) for row in csv.reader(read_lines(file)) if row]
        elif file.suffix in YAML:
            expected = "'names' with the classes, a list or 'number: name' lines"
            names = read_yaml(file).get("names")
            pairs = enumerate(names) if isinstance(names, list) else names.items()  # type: ignore[union-attr]
        else:
            expected = "a class name a line"
            pairs = enumerate("\n".join(read_lines(file)).rstrip().split("\n"))
        categories = [Category(int(number), name.strip()) for number, name in pairs]
        if not categories or not all(c.name.encode() and 0 <= c.id <= LARGEST for c in categories):
            raise ValueError  # as half of a surrogate pair is, when it is encoded
    except (TypeError, ValueError, AttributeError, csv.Error):
        raise UserError(f"{file}: expected {expected}, ids being whole numbers from 0") from None
    return check_categories(categories, file)


def exists(path: Path) -> bool:
    """Also False for a name that no file can have, where `Path.exists` raises."""
    return os.path.exists(path)  # noqa: PTH110


def name_inside(folder: Path, path: Path, where: str) -> str:
    """`path` as the name of a file in `folder`; links are not resolved. Raises `UserError` if it leads out of it."""
    name = PurePath(os.path.relpath(path, folder)).as_posix()
    check_file_name(name, where)
    return name
