"""`Annotations` to COCO, VOC, YOLO and CSV files; and the pieces of these that predictions are written with too."""

import csv
import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Literal
from xml.sax.saxutils import escape

import numpy as np
import yaml
from tqdm import tqdm

from retinanet.data.annotations import Annotations, PackedStrings
from retinanet.data.csv_rows import CLASS_FILE
from retinanet.data.files import exists
from retinanet.data.images import EXTENSIONS, MANY, known_sizes
from retinanet.data.voc import CORNERS
from retinanet.data.yolo import swapped
from retinanet.distributed import say
from retinanet.errors import UserError
from retinanet.structures import Category

Format = Literal["coco", "voc", "yolo", "csv"]
Parts = Mapping[str, Annotations]  # by name: train, val, test; "" if there is only one

NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def voc_xml(file_name: str, size: tuple[int, int], objects: Iterable[tuple[str, Sequence[float], bool]]) -> str:
    """A VOC annotation of an image of (height, width) `size` with (name, xyxy, difficult) objects; decimals are kept.

    What XML cannot hold (control characters) becomes U+FFFD.
    """
    height, width = size
    lines = [
        "<annotation>",
        f"  <filename>{_xml_text(file_name)}</filename>",
        f"  <size><width>{width}</width><height>{height}</height><depth>3</depth></size>",
    ]
    for name, box, difficult in objects:
        corners = "".join(f"<{tag}>{_number(at)}</{tag}>" for tag, at in zip(CORNERS, box, strict=True))
        entry = f"<name>{_xml_text(name)}</name><difficult>{int(difficult)}</difficult><bndbox>{corners}</bndbox>"
        lines.append(f"  <object>{entry}</object>")
    return "\n".join([*lines, "</annotation>\n"])


def _xml_text(text: str) -> str:
    return escape(NOT_XML.sub("\ufffd", text))


def yolo_line(label: int, box: Sequence[float], size: tuple[int, int], score: float | None = None) -> str:
    """`label cx cy w h [score]`, in shares of the image, of an xyxy box in pixels of one of (height, width) `size`."""
    x1, y1, x2, y2 = map(float, box)
    shares = ((x1 + x2) / 2 / size[1], (y1 + y2) / 2 / size[0], (x2 - x1) / size[1], (y2 - y1) / size[0])
    return " ".join([str(label), *map(_number, shares), *([] if score is None else [_number(score)])])


def _number(value: float) -> str:
    """Nine digits: a hundred-thousandth of a pixel in pictures up to 10,000 a side."""
    return f"{value:.9g}"


def write_dataset(parts: Parts, kind: Format, out: Path, images: Literal["link", "copy", "none"] = "link") -> Counter[str]:
    """Writes a data set, whose `parts` have the same classes. Images without objects stay.

    Images are hard-linked (copied where the file system cannot), copied, or left where they are under their names.
    Returns how many of what the format cannot hold. Raises `UserError` if `out` is not empty, images are missing, or the
    format cannot tell two class names apart.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists and is no empty folder: name another, or remove it")
    paths = [data.path(index) for data in parts.values() for index in range(len(data))]
    if images != "none" and (missing := [path for path in paths if not exists(path)]):
        raise UserError(f"{len(missing)} of {len(paths)} images are missing, the first is {missing[0]}")
    lost: Counter[str] = Counter()
    categories = _fitting_categories(parts, kind, lost)
    names = [data.file_names[index] for data in parts.values() for index in range(len(data))]
    if images != "none":
        names = [f"images/{name}" if kind == "csv" else name for name in _new_names(names)]
    elif kind in ("voc", "yolo") and len({_stem(name) for name in names}) < len(names):
        raise UserError(
            f"{kind} names its files after the images, some of which differ in their ending only: link or copy them"
        )
    fitting: dict[str, Annotations] = {}
    for part, data in parts.items():
        here, names = names[: len(data)], names[len(data) :]
        sizes = known_sizes(data, again=kind == "yolo")  # whose shares are of the real size
        fitting[part] = replace(data, categories=categories, sizes=sizes, file_names=PackedStrings(here))
    out.mkdir(parents=True, exist_ok=True)
    if kind == "coco":
        write_coco(fitting, out)
    else:
        {"voc": _write_voc, "yolo": _write_yolo, "csv": _write_csv}[kind](fitting, out, lost)
    for part, data in parts.items() if images != "none" else ():
        for index in _each(data, "images"):
            target = out / _image_folder(kind, part) / fitting[part].file_names[index]
            _place(data.path(index), target, images == "link")
    return +lost


def _each(things: Sized, what: str) -> Iterable[int]:
    return tqdm(range(len(things)), what, unit="image", disable=len(things) < MANY)


def _stem(name: str) -> str:
    return PurePath(name).with_suffix("").as_posix()


def _image_folder(kind: Format, part: str) -> str:
    return {"coco": "images", "voc": "JPEGImages", "yolo": f"images/{part or 'train'}", "csv": ""}[kind]


def _place(source: Path, target: Path, link: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        (os.link if link else shutil.copyfile)(source.resolve(), target)
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(source, target)


def _new_names(names: list[str]) -> list[str]:
    """For each image a name that differs from all others by more than its ending or case: without folders, if these are
    not needed for that; else with, and numbered where they do not do.
    """
    paths = [PurePath(NOT_XML.sub("_", name.strip())) for name in names]
    if len({path.stem.casefold() for path in paths}) == len(paths):
        return [path.name for path in paths]
    taken: set[str] = set()
    for n, path in enumerate(paths):
        number = 2
        while _stem(str(paths[n])).casefold() in taken:
            paths[n], number = path.with_stem(f"{path.stem}_{number}"), number + 1
        taken.add(_stem(str(paths[n])).casefold())
    return [path.as_posix() for path in paths]


def _fitting_categories(parts: Parts, kind: Format, lost: Counter[str]) -> tuple[Category, ...]:
    """The classes under the names and ids that they have when the format is read again."""
    categories = next(iter(parts.values())).categories
    if kind == "coco":
        return categories
    names = [" ".join(NOT_XML.sub("\ufffd", category.name).split()) for category in categories]
    if len(set(names)) < len(names):
        raise UserError(f"{kind} cannot tell all of these class names apart: {', '.join(repr(c.name) for c in categories)}")
    ids = range(len(names)) if kind == "yolo" else [category.id for category in categories]
    if kind == "voc":
        used = sorted({names[label] for data in parts.values() for label in np.unique(data.labels)})
        ids = [used.index(name) + 1 if name in used else -1 for name in names]
        lost["classes without objects"] = ids.count(-1)
    fitting = tuple(map(Category, ids, names))
    lost["class ids or names, which change"] = sum(
        new != old for new, old in zip(fitting, categories, strict=True) if new.id >= 0
    )
    return fitting


def _objects(data: Annotations, index: int, kind: Format, lost: Counter[str]) -> Iterator[tuple[int, list[float], bool]]:
    """(label, xyxy, crowd) of what the format holds of an image; the rest is counted."""
    height, width = data.sizes[index].tolist()
    for row in range(data.offsets[index], data.offsets[index + 1]):
        x, y, w, h = data.coco_boxes[row].tolist()
        box, crowd = [x, y, x + w, y + h], bool(data.crowd[row])
        lost["areas other than width x height"] += not math.isclose(data.areas[row], w * h, rel_tol=1e-3)
        if kind != "voc" and crowd:
            lost["crowd or difficult regions"] += 1
            continue
        if kind == "yolo":
            inside = [min(max(v, 0), side) for v, side in zip(box, (width, height) * 2, strict=True)]
            lost["boxes reaching over the border, cut there"] += any(
                abs(a - b) > 1e-3 for a, b in zip(box, inside, strict=True)
            )
            box = inside
        if kind != "voc" and (box[2] <= box[0] or box[3] <= box[1]):
            lost["boxes without area"] += 1
            continue
        yield int(data.labels[row]), box, crowd


def write_coco(parts: Parts, out: Path) -> None:
    """A JSON file for each part in the folder `out`."""
    for part, data in parts.items():
        _write(out / f"{part or 'annotations'}.json", json.dumps(data.to_coco(), ensure_ascii=False))


def _write_voc(parts: Parts, out: Path, lost: Counter[str]) -> None:
    for part, data in parts.items():
        for index in _each(data, "XML files"):
            name = data.file_names[index]
            objects = ((data.categories[label].name, box, crowd) for label, box, crowd in _objects(data, index, "voc", lost))
            _write(out / "Annotations" / f"{_stem(name)}.xml", voc_xml(name, tuple(data.sizes[index]), objects))
        if part:
            stems = "".join(f"{_stem(data.file_names[index])}\n" for index in range(len(data)))
            _write(out / "ImageSets" / "Main" / f"{part}.txt", stems)


def _write_yolo(parts: Parts, out: Path, lost: Counter[str]) -> None:
    folders = {part or "train": _image_folder("yolo", part) for part in parts}
    if "val" not in folders:
        folders["val"] = folders["train"]
        say("note: data.yaml names the training pictures as val too, for ultralytics wants one: a split makes one of its own")
    for part, data in parts.items():
        for index in _each(data, "labels"):
            name = PurePath(_image_folder("yolo", part), data.file_names[index])
            lost["images of a kind that is not looked for"] += name.suffix.lower() not in EXTENSIONS
            lines = (yolo_line(label, box, tuple(data.sizes[index])) for label, box, _ in _objects(data, index, "yolo", lost))
            _write(out / swapped(name), "".join(f"{line}\n" for line in lines))
    names = {category.id: category.name for category in next(iter(parts.values())).categories}
    _write(out / "data.yaml", yaml.safe_dump(folders | {"names": names}, sort_keys=False, allow_unicode=True))


def _write_csv(parts: Parts, out: Path, lost: Counter[str]) -> None:
    for part, data in parts.items():
        with (out / f"{part or 'annotations'}.csv").open("w", encoding="utf-8", newline="") as stream:
            rows = csv.writer(stream)
            for index in _each(data, "rows"):
                name = data.file_names[index]
                found = [
                    [name, *map(_number, box), data.categories[label].name]
                    for label, box, _ in _objects(data, index, "csv", lost)
                ]
                rows.writerows(found or [[name, "", "", "", "", ""]])
    with (out / CLASS_FILE).open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows((category.name, category.id) for category in next(iter(parts.values())).categories)


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
