"""Trained detectors by name: where their files are, what they are published to reach, and how they become ours.

A file is downloaded once, compared with the digest that its publisher put into its name, converted, and kept as a
checkpoint in the cache. torchvision's digests are 8 digits of the sha256. detectron2's are 6 of the md5, by the word of its
MODEL_ZOO.md: enough to find a damaged file, no proof of its origin, for which https has to stand. The conversion finds what
is missing or has another shape, in any of them.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from retinanet.backbone import IMAGENET
from retinanet.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from retinanet.download import download, file_digest
from retinanet.errors import UserError, did_you_mean
from retinanet.structures import Category
from retinanet.weights import detectron2, mmdet, torchvision
from retinanet.weights.files import read_state_dict
from retinanet.weights.layout import COCO_CATEGORIES, Imported


@dataclass(frozen=True)
class ZooEntry:
    """`ap` is COCO val2017 box AP as published by `source`; `digest` is the beginning of the file's, with its algorithm."""

    url: str
    source: str
    ap: float
    megabytes: int
    licence: str
    digest: tuple[str, str]

    @property
    def file_name(self) -> str:
        return self.url.rsplit("/", 1)[1]


TORCHVISION = "https://download.pytorch.org/models"
DETECTRON2 = "https://dl.fbaipublicfiles.com/detectron2/COCO-Detection"
# torchvision says of its weights that terms may follow from the data they were trained on, and names no licence of their own.
TERMS = "BSD-3-Clause code"
ZOO = {
    "retinanet_resnet50_fpn_v2": ZooEntry(
        f"{TORCHVISION}/retinanet_resnet50_fpn_v2_coco-5905b1c5.pth", "torchvision", 41.5, 146, TERMS, ("sha256", "5905b1c5")
    ),
    "retinanet_resnet50_fpn": ZooEntry(
        f"{TORCHVISION}/retinanet_resnet50_fpn_coco-eeacb38b.pth", "torchvision", 36.4, 130, TERMS, ("sha256", "eeacb38b")
    ),
    "detectron2_retinanet_r50_1x": ZooEntry(
        f"{DETECTRON2}/retinanet_R_50_FPN_1x/190397773/model_final_bfca0b.pkl",
        "detectron2", 37.4, 145, "CC BY-SA 3.0", ("md5", "bfca0b"),
    ),
    "detectron2_retinanet_r50_3x": ZooEntry(
        f"{DETECTRON2}/retinanet_R_50_FPN_3x/190397829/model_final_5bd44e.pkl",
        "detectron2", 38.7, 145, "CC BY-SA 3.0", ("md5", "5bd44e"),
    ),
    "detectron2_retinanet_r101_3x": ZooEntry(
        f"{DETECTRON2}/retinanet_R_101_FPN_3x/190397697/model_final_971ab9.pkl",
        "detectron2", 40.4, 217, "CC BY-SA 3.0", ("md5", "971ab9"),
    ),
}  # fmt: skip
DEFAULT = "retinanet_resnet50_fpn_v2"
CONVERSION = 1  # counted up when an importer makes something else of a file: kept checkpoints are then made anew


def load_weights(source: str | Path) -> Checkpoint:
    """A detector by its checkpoint's path or by a name of the zoo. Raises `UserError`."""
    name = str(source)
    if name not in ZOO or Path(name).is_file():
        if not Path(name).exists() and not Path(name).suffix and Path(name).name == name:
            if name in IMAGENET:
                raise UserError(f"'{name}' is a backbone, no detector: set model.backbone_weights={name}")
            near = did_you_mean(name, ZOO) or f" In the zoo are {', '.join(ZOO)}."
            raise UserError(f"weights '{name}' are neither a file nor in the zoo.{near}")
        return load_checkpoint(name)
    converted = cache_folder() / f"{name}.{CONVERSION}.pt"
    if converted.exists():
        return load_checkpoint(converted)
    entry = ZOO[name]
    checkpoint = import_file(fetch(name, entry), entry.source).checkpoint()
    save_checkpoint(converted, checkpoint)
    print(f"{name}: converted from {entry.source}'s file, kept as {converted}", flush=True)
    return checkpoint


def cache_folder() -> Path:
    """Where downloads are kept: RETINANET_CACHE, else a folder in the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "retinanet"
    return Path(os.environ.get("RETINANET_CACHE") or default)


def fetch(name: str, entry: ZooEntry) -> Path:
    """The downloaded file of a zoo entry, its digest checked. Raises `UserError` saying where to put it by hand."""
    path = cache_folder() / entry.file_name
    algorithm, digest = entry.digest
    by_hand = f"get {entry.url} elsewhere and put it at {path}"
    if path.exists():
        if not file_digest(path, algorithm).startswith(digest):
            raise UserError(f"{path} is damaged or another file, its {algorithm} does not begin with {digest}: remove it")
        return path
    try:
        print(f"downloading {name} ({entry.megabytes} MB, {entry.source}, {entry.licence}): {entry.url}", flush=True)
        download(entry.url, path, entry.digest, largest=2 * entry.megabytes << 20)
    except (OSError, UserError, HTTPException) as error:  # no network, connection broken off, wrong digest, no space
        raise UserError(f"{name} could not be downloaded ({error}); {by_hand}") from None
    return path


def import_file(path: str | Path, source: str, *, classes: list[str] | None = None, bn_eps: float | None = None) -> Imported:
    """A file of torchvision, detectron2 or mmdet, read without executing anything. Raises `UserError` naming the file.

    `classes` are the names of a detector that was not trained on COCO; `bn_eps` overrules the BatchNorm epsilon.
    """
    path = Path(path)
    state = read_state_dict(path)
    if bn_eps is None and source == "torchvision":
        bn_eps = torchvision.published_eps(file_digest(path, "sha256"))
    eps = 1e-5 if bn_eps is None else bn_eps
    first = 1 if source == "torchvision" else 0  # slot 0 is background there
    named = tuple(Category(n, name) for n, name in enumerate(classes, start=first)) if classes else COCO_CATEGORIES
    try:
        imported = IMPORTERS[source](state, categories=named, bn_eps=eps)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    imported.where = str(path)
    return imported


IMPORTERS: dict[str, Callable[..., Imported]] = {
    "torchvision": torchvision.import_torchvision_state,
    "detectron2": detectron2.import_detectron2_state,
    "mmdet": mmdet.import_mmdet_state,
}
