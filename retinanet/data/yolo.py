"""YOLO's text files to `Annotations`, laid out as ultralytics does (https://docs.ultralytics.com/datasets/detect/).

The label file of a picture, in `labels/` where that is in `images/`, or beside it, has for each object a line
`class cx cy width height`, in shares of the picture's sides. A line `class x1 y1 x2 y2 x3 y3 ...` is an outline, whose
box is taken.
"""

import glob
import math
import os
import reprlib
from collections.abc import Iterator
from pathlib import Path, PurePath

from tqdm import tqdm

from retinanet.data.annotations import AnnotationRow, Annotations, ImageRow, corner_row
from retinanet.data.faults import DataError, Fault, reading
from retinanet.data.files import YAML, exists, name_inside, read_classes, read_lines, read_yaml
from retinanet.data.images import EXTENSIONS, MANY, read_sizes
from retinanet.distributed import say
from retinanet.errors import UserError

PARTS = ("train", "val", "test")
CLASS_FILES = ("classes.txt", "obj.names", "labels/classes.txt")
SLACK = 0.01  # how far ultralytics lets shares lie outside 0..1


def load_yolo(
    root: Path,
    listing: Path | None = None,
    *,
    part: str | None = None,
    classes: Path | None = None,
    faults: list[Fault] | None = None,
) -> Annotations:
    """Reads the pictures that `listing` names, a data.yaml or a text file, or else all in `root`, and their labels.

    `part` is train, val or test of the data.yaml; None takes all. Classes are those of `classes`, else of the data.yaml
    or a classes.txt in `root`; category ids are YOLO's numbers. Raises `UserError` naming file and line; with a list
    `faults` such lines are noted there and left out instead.
    """
    if listing is not None and listing.suffix in YAML:
        root, entries, class_file = listing.parent, _entries(listing, part), classes or listing
    else:
        entries = [listing or root]
        class_file = classes or next((root / name for name in CLASS_FILES if (root / name).exists()), root / CLASS_FILES[0])
    categories = read_classes(class_file)
    label_of = {float(category.id): label for label, category in enumerate(categories)}
    names = list(dict.fromkeys(name for entry in entries for name in _pictures(entry, root, faults)))
    if not names:
        raise UserError(f"{listing or root}: no pictures in {', '.join(map(str, entries))}")
    sizes = read_sizes([root / name for name in names], faults)
    images = [ImageRow(n, name, *size) for n, (name, size) in enumerate(zip(names, sizes.tolist(), strict=True), start=1)]
    rows: list[AnnotationRow] = []
    unlabelled: list[Fault] = []
    for index, image in enumerate(tqdm(images, "labels", unit="image", disable=len(images) < MANY)):
        file = label_file(root / image.file_name)
        if not exists(file):
            unlabelled.append(Fault("missing label file", str(root / image.file_name), None, f"there is no {file}"))
            continue
        with reading(faults, file):
            for number, line in enumerate(read_lines(file), start=1):
                with reading(faults, file):
                    if line and image.height:
                        where = f"{file}, line {number}"
                        label, corners = _parse(line, where, image, label_of)
                        rows.append(corner_row(index, len(rows) + 1, label, corners, where))
    if len(unlabelled) == len(images):
        raise UserError(f"{listing or root}: no picture has a label file; looked for {label_file(root / names[0])}")
    if faults is not None:
        faults += unlabelled
    elif unlabelled:
        say(f"note: {listing or root}: {len(unlabelled)} of {len(images)} pictures have no label file and count as empty")
    return Annotations.pack(str(listing or root), root, categories, images, rows)


def swapped(name: PurePath) -> PurePath:
    """images/train/a.jpg -> labels/train/a.txt; a.jpg -> a.txt."""
    parts = list(name.parts)
    if "images" in parts[:-1]:
        parts[len(parts) - 2 - parts[-2::-1].index("images")] = "labels"
    return PurePath(*parts).with_suffix(".txt")


def label_file(picture: Path) -> Path:
    """Where the labels are, or would be."""
    beside, apart = picture.with_suffix(".txt"), Path(swapped(picture))
    return beside if exists(beside) else apart


def _parse(line: str, where: str, image: ImageRow, label_of: dict[float, int]) -> tuple[int, list[float]]:
    """Label and xyxy corners in pixels."""
    try:
        number, *shares = map(float, line.split())
    except ValueError:
        number, shares = math.nan, []
    if len(shares) < 4 or len(shares) % 2:
        raise DataError("unusable box", f"{where}: expected 'class cx cy width height', got {reprlib.repr(line)}")
    if not all(-SLACK <= share <= 1 + SLACK for share in shares):  # nor is NaN
        raise DataError("unusable box", f"{where}: {reprlib.repr(line)} are no shares of the picture's sides, from 0 to 1")
    if number not in label_of:
        raise DataError("unknown class", f"{where}: class {number:g} is none of the {len(label_of)} that have a name")
    if len(shares) > 4:
        xs, ys = shares[::2], shares[1::2]
        x1, y1, x2, y2 = min(xs), min(ys), max(xs), max(ys)
    else:
        cx, cy, width, height = shares
        x1, y1, x2, y2 = cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2
    return label_of[number], [x1 * image.width, y1 * image.height, x2 * image.width, y2 * image.height]


def _entries(file: Path, part: str | None) -> list[Path]:
    """The folders and lists of pictures that a data.yaml names: of one part, or of all. They stay in its own folder.

    A `path` that does not exist is that of another machine, or counts from ultralytics' own folder: then it is the file's.
    """
    raw = read_yaml(file)
    base = file.parent / path if isinstance(path := raw.get("path"), str) else file.parent
    base = base if exists(base) else file.parent
    found = []
    for key in PARTS if part is None else (part,):
        value = raw.get(key) or []
        for entry in value if isinstance(value, list) else [value]:
            if not isinstance(entry, str):
                raise UserError(f"{file}: '{key}' must name a folder or a text file of pictures, or be a list of such names")
            inner = base / entry.removeprefix("../")  # Roboflow's ../train/images lies beside the file itself
            path = inner if exists(inner) else base / entry
            if os.path.relpath(path, file.parent) != ".":
                name_inside(file.parent, path, f"{file}: '{key}'")
            if exists(path):
                found.append(path)
            elif part is None:
                say(f"note: {file}: '{key}' names {path}, which does not exist")
            else:
                raise UserError(f"{file}: '{key}' names {path}, which does not exist")
    if not found:
        raise UserError(f"{file}: expected {' or '.join(PARTS if part is None else (part,))} with a folder of pictures")
    return found


def _pictures(entry: Path, root: Path, faults: list[Fault] | None) -> Iterator[str]:
    """Names relative to `root` of the pictures in a folder, or in a text file with one a line."""
    if entry.is_dir():
        for name in sorted(glob.glob("**/*", root_dir=entry, recursive=True)):  # noqa: PTH207 - follows linked folders
            if PurePath(name).suffix.lower() in EXTENSIONS:
                yield name_inside(root, entry / name, str(entry))
        return
    for number, line in enumerate(read_lines(entry), start=1):
        with reading(faults, entry):
            if line:
                beside = entry.parent / line  # as ultralytics reads ./images/a.jpg
                name = name_inside(root, beside if exists(beside) else root / line, f"{entry}, line {number}")
                if not exists(root / name):
                    raise DataError("missing image", f"{entry}, line {number}: {root / name} does not exist", file=root / name)
                yield name
