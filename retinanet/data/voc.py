"""Pascal VOC XML to `Annotations`."""

import math
from pathlib import Path
from xml.etree import ElementTree

from retinanet.data.annotations import AnnotationRow, Annotations, ImageRow
from retinanet.data.coco import check_file_name
from retinanet.errors import UserError
from retinanet.structures import Category


def load_voc(root: str | Path, image_set: str | Path | None = None) -> Annotations:
    """Reads `root`/Annotations/*.xml with the images in `root`/JPEGImages.

    `image_set` is a text file with an image name a line (ImageSets/Main/train.txt); None takes every XML file.
    Classes are the names in *all* XML files, sorted and numbered from 1, so that every split agrees about them.
    Coordinates are taken as written. `difficult` objects become ignore regions. Raises `UserError` naming the file.
    """
    root = Path(root)
    files = sorted((root / "Annotations").glob("*.xml"))
    if not files:
        raise UserError(f"{root}: a VOC data set has XML files in {root / 'Annotations'}; there are none")
    trees = {file.stem: _parse(file) for file in files}
    names = sorted({_text(o, "name", file) for file in files for o in trees[file.stem].iter("object")})
    categories = [Category(number, name) for number, name in enumerate(names, start=1)]
    label_of = {name: label for label, name in enumerate(names)}
    chosen = list(trees) if image_set is None else _image_names(Path(image_set), trees)
    images: list[ImageRow] = []
    rows: list[AnnotationRow] = []
    for index, stem in enumerate(chosen):
        file, tree = root / "Annotations" / f"{stem}.xml", trees[stem]
        name = (tree.findtext("filename") or "").strip() or f"{stem}.jpg"
        check_file_name(name, str(file))
        images.append(ImageRow(index + 1, name, _side(tree, "height", file), _side(tree, "width", file)))
        for o in tree.iter("object"):
            x1, y1, x2, y2 = _box(o, file)
            box = [x1, y1, x2 - x1, y2 - y1]
            crowd = (o.findtext("difficult") or "0").strip() == "1"
            rows.append(AnnotationRow(index, len(rows) + 1, label_of[_text(o, "name", file)], box, box[2] * box[3], crowd))
    return Annotations.pack(str(image_set or root / "Annotations"), root / "JPEGImages", categories, images, rows)


def _parse(file: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(file).getroot()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # the latter two: an unknown encoding
        raise UserError(f"{file}: not valid XML: {error}") from None


def _image_names(image_set: Path, known: dict[str, ElementTree.Element]) -> list[str]:
    try:
        lines = [line.strip() for line in image_set.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"image set {image_set} cannot be read: {error}") from None
    names = [line if line in known else line.split()[0] for line in lines]  # a name may hold spaces, or a 1 or -1 follow it
    for name in names:
        if name not in known:
            raise UserError(f"{image_set}: '{name}' has no file Annotations/{name}.xml")
    return names


def _text(element: ElementTree.Element, tag: str, file: Path) -> str:
    text = (element.findtext(tag) or "").strip()
    if not text:
        raise UserError(f"{file}: an object has no <{tag}>")
    return text


def _side(tree: ElementTree.Element, side: str, file: Path) -> int:
    text = tree.findtext(f"size/{side}") or "0"
    try:
        return int(float(text))
    except (ValueError, OverflowError):
        raise UserError(f"{file}: <{side}> of <size> must be a number of pixels, got {text!r}") from None


def _box(element: ElementTree.Element, file: Path) -> list[float]:
    try:
        box = [float(element.findtext(f"bndbox/{tag}") or "") for tag in ("xmin", "ymin", "xmax", "ymax")]
    except ValueError:
        box = [math.nan]
    if not all(map(math.isfinite, box)):
        raise UserError(f"{file}: <bndbox> needs numbers in xmin, ymin, xmax and ymax")
    return box
