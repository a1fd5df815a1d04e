"""Which detection is right at each IoU and size that COCO looks at: what all figures of a report are counted from."""

import hashlib
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from retinanet.bounded import check_unfolding
from retinanet.data.annotations import Annotations
from retinanet.errors import UserError
from retinanet.evaluation.coco import LARGEST_AREA
from retinanet.evaluation.matching import Pairs, assign, find_pairs, judge, ranks

IOUS = np.linspace(0.5, 0.95, 10)
AREAS = ((0, LARGEST_AREA), (0, 32**2), (32**2, 96**2), (96**2, LARGEST_AREA))  # pixels: all, small, medium, large
BACKGROUND = 0.1  # IoU: less is no relation
BITS = len(AREAS) * len(IOUS)


class Seen:
    """Detections beside the truth: D of them, by label and the best score first, and A boxes, as `annotations` has them.

    An image is its place among the ids in ascending order, which is COCOeval's.
    """

    def __init__(self, rows: np.ndarray, annotations: Annotations) -> None:
        by_id = np.argsort(annotations.image_ids)
        ids = np.array([category.id for category in annotations.categories])
        by_category = np.argsort(ids)
        label = by_category[np.searchsorted(ids[by_category], rows[:, 6])]
        order = np.lexsort((rows[:, 0], -rows[:, 5], label))  # stable
        rows = rows[order]
        self.annotations = annotations
        self.image_at = by_id  # [I]: the place in `annotations`
        self.label = label[order]  # [D]
        self.image = np.searchsorted(annotations.image_ids[by_id], rows[:, 0])  # [D]
        self.boxes, self.score = rows[:, 1:5], rows[:, 5]  # [D, 4], [D]
        self.area = self.boxes[:, 2] * self.boxes[:, 3]  # [D]
        self.truth_image = np.argsort(by_id)[annotations.image_of]  # [A]
        self.outside, self.ignored = self.beyond(*AREAS[0])  # [D], [A]
        truth = annotations.coco_boxes, self.truth_image, annotations.crowd
        self.pairs = find_pairs(self.boxes, self.image, *truth, BACKGROUND)  # of whatever classes

    @property
    def classes(self) -> int:
        return len(self.annotations.categories)

    def beyond(self, smallest: float, largest: float) -> tuple[np.ndarray, np.ndarray]:
        """Detections [D] bool of other sizes, and boxes [A] bool that need not be found: crowds, and of other sizes."""
        outside, other = ((area < smallest) | (area > largest) for area in (self.area, self.annotations.areas))
        return outside, other | self.annotations.crowd

    @property
    def same_class(self) -> np.ndarray:
        """Which of the `pairs` are of one class, [P] bool."""
        return self.label[self.pairs.detection] == self.annotations.labels[self.pairs.box]

    @property
    def rank(self) -> np.ndarray:
        """How many of its image and class have a better score, [D]."""
        return ranks(self.score, self.image * self.classes + self.label)

    def pairs_where(self, kept: np.ndarray) -> Pairs:
        return Pairs(*(column[kept] for column in self.pairs))

    def fingerprint(self) -> str:
        """The same for the same images, classes and boxes, in whatever order the annotations come."""
        truth = self.annotations
        order = np.lexsort((*truth.coco_boxes.T, truth.labels, self.truth_image))
        digest = hashlib.sha256(json.dumps([category.name for category in truth.categories]).encode())
        columns = truth.coco_boxes, truth.areas, truth.labels, self.truth_image, truth.crowd
        for array in (truth.image_ids[self.image_at], *(column[order] for column in columns)):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


@dataclass
class Matches:
    """What the twelve numbers are counted from: D detections in the order of `Seen` and A boxes of I images, K classes."""

    classes: int
    images: int
    fingerprint: str
    image: np.ndarray  # [D] in 0..I-1
    label: np.ndarray  # [D] in 0..K-1, ascending
    rank: np.ndarray  # [D]: how many of its image and class have a better score
    hits: np.ndarray  # [D, 4, 10] bool: right, by size and IoU
    counted: np.ndarray  # [D, 4, 10] bool: right or wrong
    truth_image: np.ndarray  # [A]
    truth_label: np.ndarray  # [A]
    sought: np.ndarray  # [A, 4] bool: to be found, by size


def find_matches(seen: Seen) -> tuple[Matches, np.ndarray]:
    """COCOeval's matches within each class; and the box [D] that each detection found at IoU 0.5, of whatever size."""
    truth = seen.annotations
    pairs, rank = seen.pairs_where(seen.same_class & (seen.pairs.iou >= IOUS[0])), seen.rank
    hits, counted = np.zeros((2, len(rank), len(AREAS), len(IOUS)), bool)
    sought = np.zeros((len(truth.labels), len(AREAS)), bool)
    boxes = np.empty(0)
    for n in tqdm(range(BITS), "matches", leave=False, delay=2):
        area, iou = divmod(n, len(IOUS))
        outside, ignored = seen.beyond(*AREAS[area])
        found = assign(pairs, rank, truth.crowd, ignored, IOUS[iou])
        hits[:, area, iou], counted[:, area, iou] = judge(found, ignored, outside)
        sought[:, area] = ~ignored
        boxes = boxes if n else found
    places = seen.image, seen.label, rank, hits, counted, seen.truth_image, truth.labels, sought
    return Matches(seen.classes, len(truth), seen.fingerprint(), *places), boxes


def write_matches(path: Path, matches: Matches) -> None:
    """A NumPy archive of some 20 bytes for each detection, uncompressed."""
    columns = {name: getattr(matches, name).astype(np.int32) for name in ("image", "label", "truth_image", "truth_label")}
    columns |= {name: np.packbits(getattr(matches, name).reshape(-1, BITS), axis=1) for name in ("hits", "counted")}
    columns["rank"] = matches.rank.clip(0, 255).astype(np.uint8)  # 100 is beyond all that counts
    columns["sought"] = matches.sought
    columns["about"] = np.array([str(matches.classes), str(matches.images), matches.fingerprint])
    np.savez(path, **columns)  # type: ignore[arg-type]


def read_matches(path: Path) -> Matches:
    """What `write_matches` wrote. Raises `UserError` for a file that is none, or is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            check_unfolding(archive, path)
        with np.load(path, allow_pickle=False) as file:
            held = {name: file[name] for name in file.files}
        classes, images, fingerprint = held.pop("about").tolist()
        most = {"image": int(images), "truth_image": int(images), "label": int(classes), "truth_label": int(classes)}
        shapes = {"sought": (len(AREAS),), "hits": (BITS // 8,), "counted": (BITS // 8,)}
        for name, column in held.items():
            length = len(held["truth_image" if name in ("truth_image", "truth_label", "sought") else "image"])
            limit = most.get(name, 256)
            fits = column.shape == (length, *shapes.get(name, ())) and column.dtype.kind in ("b" if name == "sought" else "iu")
            if not fits or (column.size and not 0 <= column.min() <= column.max() < limit):
                raise ValueError(f"'{name}' is not what it should be")
        for name in ("hits", "counted"):
            held[name] = np.unpackbits(held[name], axis=1).view(bool).reshape(-1, len(AREAS), len(IOUS))
        return Matches(int(classes), int(images), fingerprint, **held)
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot be read: {error}; write the report again") from None
