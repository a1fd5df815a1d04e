"""Pascal VOC XML to `Annotations`."""

import reprlib
from collections.abc import Container
from pathlib import Path
from xml.etree import ElementTree

from tqdm import tqdm

from retinanet.data.annotations import AnnotationRow, Annotations, ImageRow, corner_row
from retinanet.data.coco import check_file_name
from retinanet.data.faults import DataError, Fault, reading
from retinanet.data.files import read_bytes, read_lines
from retinanet.data.images import MANY
from retinanet.errors import UserError
from retinanet.structures import Category

LARGEST_XML = 8 * 2**20  # bytes: 30,000 objects; as a tree it takes twenty times as much
CORNERS = ("xmin", "ymin", "xmax", "ymax")


def load_voc(
    root: str | Path, image_set: str | Path | None = None, *, one_based: bool = False, faults: list[Fault] | None = None
) -> Annotations:
    """Reads `root`/Annotations/*.xml with the images in `root`/JPEGImages; without these folders, `root` holds both.

    `image_set` is a text file with an image name a line (ImageSets/Main/train.txt); None takes every XML file.
    Classes are the names in *all* XML files, sorted and numbered from 1, so that every split agrees about them.
    Coordinates are taken as written; `one_based` moves xmin and ymin by -1, for pixels counted from 1 with the last
    inside. `difficult` objects become ignore regions. Raises `UserError` naming the file; with a list `faults` it is
    noted there and left out instead.
    """
    root = Path(root)
    apart = (root / "Annotations").is_dir()
    folder, image_dir = (root / "Annotations", root / "JPEGImages") if apart else (root, root)
    files = sorted(folder.rglob("*.xml"))
    if not files:
        raise UserError(f"{root}: a VOC data set has XML files in {root / 'Annotations'}; there are none")
    trees: dict[str, ElementTree.Element] = {}  # by the name of the file in `folder`, without .xml
    for file in tqdm(files, "XML files", unit="file", disable=len(files) < MANY):
        with reading(faults, file):
            trees[file.relative_to(folder).with_suffix("").as_posix()] = _parse(file)
    names = sorted({name for tree in trees.values() for o in tree.iter("object") if (name := _name(o))})
    categories = [Category(number, name) for number, name in enumerate(names, start=1)]
    label_of = {name: label for label, name in enumerate(names)}
    images: list[ImageRow] = []
    rows: list[AnnotationRow] = []
    for stem in list(trees) if image_set is None else _image_names(Path(image_set), trees, faults):
        file, tree = folder / f"{stem}.xml", trees[stem]
        with reading(faults, file):
            images.append(_image(tree, stem, len(images) + 1, file))
            for o in tree.iter("object"):
                with reading(faults, file):
                    rows.append(_annotation(o, len(images) - 1, len(rows) + 1, label_of, one_based, file))
    if not names or not images:
        first = f"; the first fault: {faults[0].message}" if faults else ""
        raise UserError(f"{image_set or folder}: no {'images' if names else 'objects'} in it{first}")
    return Annotations.pack(str(image_set or folder), image_dir, categories, images, rows)


def _parse(file: Path) -> ElementTree.Element:
    content = read_bytes(file, LARGEST_XML)
    if b"<!DOCTYPE" in content.replace(b"\0", b""):  # UTF-16 has nulls between; what it declares could grow without end
        raise UserError(f"{file}: has a DOCTYPE, which no VOC file needs and which is not read: take it out")
    try:
        return ElementTree.fromstring(content)
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # the latter two: an unknown encoding
        raise UserError(f"{file}: not valid XML: {error}") from None


def _image_names(image_set: Path, known: Container[str], faults: list[Fault] | None) -> list[str]:
    names = []
    for line in filter(None, read_lines(image_set)):
        name = line if line in known else line.split()[0]  # a name may hold spaces, or a 1 or -1 follow it
        with reading(faults, image_set):
            if name not in known:
                raise UserError(f"{image_set}: '{name}' has no file Annotations/{name}.xml")
            names.append(name)
    return names


def _image(tree: ElementTree.Element, stem: str, number: int, file: Path) -> ImageRow:
    name = (tree.findtext("filename") or "").strip() or f"{stem}.jpg"
    check_file_name(name, str(file))
    return ImageRow(number, name, _side(tree, "height", file), _side(tree, "width", file))


def _name(element: ElementTree.Element) -> str:
    return (element.findtext("name") or "").strip()


def _annotation(
    element: ElementTree.Element, image: int, number: int, label_of: dict[str, int], one_based: bool, file: Path
) -> AnnotationRow:
    name = _name(element)
    if not name:
        raise DataError("unknown class", f"{file}: an object has no <name>")
    corners = [element.findtext(f"bndbox/{tag}") or "" for tag in CORNERS]
    crowd = (element.findtext("difficult") or "0").strip() == "1"
    return corner_row(image, number, label_of[name], corners, f"{file}, a {name}", crowd=crowd, first=int(one_based))


def _side(tree: ElementTree.Element, side: str, file: Path) -> int:
    text = tree.findtext(f"size/{side}") or "0"
    try:
        pixels = int(float(text))
    except (ValueError, OverflowError):
        pixels = -1
    if not 0 <= pixels < 2**31:
        raise UserError(f"{file}: <{side}> of <size> must be a number of pixels, got {reprlib.repr(text)}")
    return pixels
