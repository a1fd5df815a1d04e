"""Pascal VOC XML to `Annotations`."""

from pathlib import Path
from xml.etree import ElementTree

from retinanet.data.annotations import AnnotationRow, Annotations, ImageRow
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
    names = sorted({_text(o, "name", root) for tree in trees.values() for o in tree.iter("object")})
    categories = [Category(number, name) for number, name in enumerate(names, start=1)]
    label_of = {name: label for label, name in enumerate(names)}
    chosen = list(trees) if image_set is None else _image_names(Path(image_set), trees)
    images: list[ImageRow] = []
    rows: list[AnnotationRow] = []
    for index, stem in enumerate(chosen):
        file, tree = root / "Annotations" / f"{stem}.xml", trees[stem]
        height, width = (int(float(tree.findtext(f"size/{side}") or 0)) for side in ("height", "width"))
        images.append(ImageRow(index + 1, tree.findtext("filename") or f"{stem}.jpg", height, width))
        for o in tree.iter("object"):
            x1, y1, x2, y2 = _box(o, file)
            box = [x1, y1, x2 - x1, y2 - y1]
            crowd = (o.findtext("difficult") or "0").strip() == "1"
            rows.append(AnnotationRow(index, len(rows) + 1, label_of[_text(o, "name", file)], box, box[2] * box[3], crowd))
    return Annotations.pack(str(image_set or root / "Annotations"), root / "JPEGImages", categories, images, rows)


def _parse(file: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(file).getroot()
    except ElementTree.ParseError as error:
        raise UserError(f"{file}: not valid XML: {error}") from None


def _image_names(image_set: Path, known: dict[str, ElementTree.Element]) -> list[str]:
    try:
        names = [line.split()[0] for line in image_set.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"image set {image_set} cannot be read: {error}") from None
    for name in names:
        if name not in known:
            raise UserError(f"{image_set}: '{name}' has no file Annotations/{name}.xml")
    return names


def _text(element: ElementTree.Element, tag: str, file: Path) -> str:
    text = (element.findtext(tag) or "").strip()
    if not text:
        raise UserError(f"{file}: an object has no <{tag}>")
    return text


def _box(element: ElementTree.Element, file: Path) -> list[float]:
    try:
        return [float(element.findtext(f"bndbox/{tag}") or "") for tag in ("xmin", "ymin", "xmax", "ymax")]
    except ValueError:
        raise UserError(f"{file}: <bndbox> needs numbers in xmin, ymin, xmax and ymax") from None
