"""The door: any supported format in, `Annotations` out."""

from pathlib import Path
from typing import Any

from retinanet.config import DatasetConfig
from retinanet.data.annotations import Annotations
from retinanet.data.coco import load_coco, report_odd_boxes
from retinanet.data.csv_rows import CLASS_FILE, load_csv
from retinanet.data.faults import Fault
from retinanet.data.files import exists
from retinanet.data.images import EXTENSIONS
from retinanet.data.voc import load_voc
from retinanet.data.yolo import load_yolo
from retinanet.distributed import say
from retinanet.errors import UserError
from retinanet.structures import shortened

FORMAT_OF = {".json": "coco", ".csv": "csv", ".yaml": "yolo", ".yml": "yolo"}
LOOKED_FOR = "COCO's *.json, *.csv, YOLO's data.yaml or .txt labels in labels/ or beside the images, VOC's Annotations/*.xml"


def load_path(path: str | Path, annotations: str | Path | None = None, **settings: Any) -> Annotations:
    """`load_dataset` of a path, with `DatasetConfig`'s other keys as `settings`; of a data.yaml all parts are read."""
    return load_dataset(DatasetConfig(path=str(path), annotations=annotations and str(annotations), **settings))


def load_dataset(config: DatasetConfig, faults: list[Fault] | None = None) -> Annotations:
    """Reads the data set that a config's `data.train`, `data.val` or `data.test` names. Raises `UserError`.

    With a list `faults` what is wrong with single entries is noted there, and these are left out instead.
    """
    kind, root, file = find_dataset(config)
    classes = Path(config.classes) if config.classes else None
    if config.one_based and kind != "voc":
        raise UserError(f"{config.path}: one_based is for voc, and this is {kind}")
    if classes and kind not in ("yolo", "csv"):
        raise UserError(f"{config.path}: classes is for yolo and csv, and this is {kind}, which names them itself")
    if kind == "voc":
        annotations = load_voc(root, file, one_based=config.one_based, faults=faults)
    elif kind == "yolo":
        annotations = load_yolo(root, file, part=config.part, classes=classes, faults=faults)
    elif kind == "csv":
        annotations = load_csv(file or root, root, classes=classes, faults=faults)
    else:
        annotations = load_coco(file or root, root, faults)
        if file is not None and config.annotations is None:
            annotations.image_dir = _image_dir(file, annotations.file_names[0])
    if config.format == "auto":
        say(f"{config.path}: {kind}, from {annotations.source}, images in {annotations.image_dir}")
    if faults is None:
        report_odd_boxes(annotations)
    return annotations


def find_dataset(config: DatasetConfig) -> tuple[str, Path, Path | None]:
    """Format, folder, and the file that holds or lists the annotations, where there is one. Raises `UserError`."""
    path, file = Path(config.path), Path(config.annotations) if config.annotations else None
    if file is None and path.is_file():
        above = [*path.parents][:3] if path.suffix == ".txt" else []  # an image set lies in ImageSets/Main
        root = next((folder for folder in above if (folder / "Annotations").is_dir()), path.parent)
        return _format_of(path, root, config), root, path
    if not path.is_dir():
        raise UserError(f"data path {path} is not a folder{'' if file else ', nor a file'}")
    if file is not None:
        return _format_of(file, path, config), path, file
    found = [(kind, file) for kind, file in _candidates(path) if config.format in ("auto", kind)]
    if not found and config.format in ("voc", "yolo"):
        return config.format, path, None  # the reader says what is missing
    if not found:
        raise UserError(f"{path}: no data set found in it; looked for {LOOKED_FOR}")
    if len(found) > 1:
        names = shortened([str(file or f"{kind} files") for kind, file in found])
        raise UserError(f"{path}: more than one data set could be meant: {names}; give one of the files as path, or set format")
    return found[0][0], path, found[0][1]


def _format_of(file: Path, root: Path, config: DatasetConfig) -> str:
    """Of the file that holds or lists the annotations."""
    if config.format != "auto":
        return config.format
    if file.suffix == ".txt":
        return "voc" if (root / "Annotations").is_dir() else "yolo"
    if file.suffix.lower() not in FORMAT_OF:
        raise UserError(
            f"{file}: the format cannot be told by this name: set format, or give a .json, .csv, .yaml or .txt file"
        )
    return FORMAT_OF[file.suffix.lower()]


def _candidates(folder: Path) -> list[tuple[str, Path | None]]:
    """What could be the data set of a folder: formats, each with its file if it has one for all."""
    files = [file for suffix in FORMAT_OF for file in sorted(folder.glob(f"*{suffix}")) if file.name != CLASS_FILE]
    files += sorted(folder.glob("annotations/*.json"))
    found: list[tuple[str, Path | None]] = [(FORMAT_OF[file.suffix], file) for file in files]
    if any((folder / "Annotations").rglob("*.xml")) or any(folder.glob("*.xml")):
        found.append(("voc", None))
    stems = {file.stem for file in folder.glob("*.txt")}
    beside = any(file.stem in stems and file.suffix.lower() in EXTENSIONS for file in folder.iterdir())
    apart = (folder / "labels").is_dir() or (folder.name == "images" and (folder.parent / "labels").is_dir())
    if (beside or apart) and "yolo" not in dict(found):
        found.append(("yolo", None))
    return found


def _image_dir(file: Path, image: str) -> Path:
    """The folder of the images of a COCO file that came alone: where the first lies, as exporters and COCO lay them out."""
    name = file.stem.removeprefix("instances_")
    folders = (file.parent / "images", file.parent / name, file.parent.parent / name, file.parent.parent / "images")
    return next((folder for folder in folders if exists(folder / image)), file.parent)
