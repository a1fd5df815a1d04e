"""What was found, written: pictures and videos with boxes, and the forms that other programs read."""

import csv
import math
import re
from collections import Counter, deque
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from retinanet.data.writers import voc_xml, yolo_line
from retinanet.distributed import gather_to_main, is_main, say
from retinanet.errors import UserError
from retinanet.inputs import Frame, Source
from retinanet.results import to_entries, to_rows, write_entries
from retinanet.structures import Category, Detections
from retinanet.visualize import contact_sheet, draw_detections

FORMATS = ("json", "coco", "yolo", "voc", "csv", "crops")
LARGEST_JPEG = 65_500  # pixels a side
BEHIND = 8  # pictures that wait to be written
SHEET_SIZE = 12  # pictures on the page that shows some of them
CSV_FIELDS = ("image_id", "file_name", "frame", "time", "category_id", "category_name", "x", "y", "width", "height", "score")


class Outputs:
    """Writes to `folder`, in `formats`, what was found in one picture after the other, in a thread of its own; `close`
    writes what holds all of them. Each raises what went wrong since.

    `inputs` are never written over, although `folder` may be their own. Files are named in their order, on every rank alike.
    """

    def __init__(
        self,
        folder: Path,
        categories: Sequence[Category],
        *,
        formats: Collection[str] = ("json",),
        pictures: bool = True,
        sheet: bool = False,
        inputs: Sequence[Source] = (),
    ) -> None:
        self.folder, self.categories, self.formats, self.pictures = folder, categories, formats, pictures
        self.class_folders = folder_names(categories)
        self._inputs = {Path(source.name).resolve() for source in inputs}
        self._stems, self._stem_of = set[str](), dict[Source, str]()
        self._sheet = folder / f"{self._free('sheet', '.jpg')}.jpg"
        self._to_show, self._shown = SHEET_SIZE if sheet and is_main() else 0, list[np.ndarray]()
        for source in inputs:
            self._stem(source)
        self._entries: list[dict[str, Any]] = []
        self.objects = 0  # known once it is closed
        self._source: Source | None = None  # the video at hand, and the pictures in its file of boxes
        self._written = 0
        self._writer: Any = None
        self._thread, self._waiting = ThreadPoolExecutor(1), deque[Future[None]]()
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, frame: Frame, detections: Detections) -> None:
        self._waiting.append(self._thread.submit(self._add, frame, detections))
        while len(self._waiting) > BEHIND:
            self._waiting.popleft().result()

    def _add(self, frame: Frame, detections: Detections) -> None:
        names = {category.id: category.name for category in self.categories}
        entries = to_entries(to_rows(frame.image_id, detections), {frame.image_id: frame.source.name}, names)
        stem = self._stem(frame.source)
        if frame.number is None:
            suffix = suffix_for(frame.image)
            if suffix == ".png" and (self.folder / f"{stem}.png").resolve() in self._inputs:
                stem = self._free(stem, suffix)
            if self.pictures:
                save_picture(draw_detections(frame.image, detections), self.folder / f"{stem}{suffix}")
        else:
            entries = [entry | {"frame": frame.number, "time": round(frame.time, 3)} for entry in entries]
            if self._source != frame.source:
                self._end_video()
                self._source = frame.source
            if self.pictures:
                picture = draw_detections(frame.image, detections, min_side=1)  # at its own size
                self._write_frame(frame, picture, self.folder / f"{stem}.mp4")
            stem = self._free(f"{stem}_{frame.number:06d}", "")
        self._write_labels(frame, detections, stem)
        self._entries += entries
        if len(detections) and len(self._shown) < self._to_show:
            self._shown.append(draw_detections(frame.image, detections))

    def _stem(self, source: Source) -> str:
        if source not in self._stem_of:
            stem = Path(source.name).stem
            self._stem_of[source] = self._free(stem.replace(":", "_"), ".mp4") if source.is_video else self._free(stem, ".jpg")
        return self._stem_of[source]

    def _free(self, stem: str, suffix: str) -> str:
        """The stem, numbered where it is taken: by another picture, or with `suffix` by an input."""
        name, n = stem, 2
        while name in self._stems or (self.folder / f"{name}{suffix}").resolve() in self._inputs:
            name, n = f"{stem}_{n}", n + 1
        self._stems.add(name)
        return name

    def _write_labels(self, frame: Frame, detections: Detections, stem: str) -> None:
        size = frame.image.shape[0], frame.image.shape[1]
        boxes, scores, labels = (values.tolist() for values in detections.numpy())
        if "yolo" in self.formats:
            lines = [yolo_line(label, box, size, score) for label, box, score in zip(labels, boxes, scores, strict=True)]
            _write(self.folder / "yolo" / f"{stem}.txt", "".join(f"{line}\n" for line in lines))
        if "voc" in self.formats:
            objects = [(name, box, False) for name, box in zip(detections.names, boxes, strict=True)]
            _write(self.folder / "voc" / f"{stem}.xml", voc_xml(Path(frame.source.name).name, size, objects))
        if "crops" in self.formats:
            for n, (label, box) in enumerate(zip(labels, boxes, strict=True), start=1):
                x1, y1, x2, y2 = (max(0, value) for value in (*map(math.floor, box[:2]), *map(math.ceil, box[2:])))
                if (crop := frame.image[y1:y2, x1:x2]).size:
                    save_picture(crop, self.folder / "crops" / self.class_folders[label] / f"{stem}_{n}{suffix_for(crop)}")

    def _write_frame(self, frame: Frame, picture: np.ndarray, path: Path) -> None:
        import cv2

        if self._writer is None:
            size = picture.shape[1], picture.shape[0]
            self._writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), frame.fps, size)
            if not self._writer.isOpened():
                raise UserError(f"{path}: this OpenCV cannot write such a video; --no-pictures does without")
        # A camera's picture stands for those missed before it too, or the video would run faster than what it shows.
        due = round(frame.time * frame.fps) - self._written if frame.source.camera is not None else 0
        for _ in range(max(0, due) + 1):
            self._writer.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
            self._written += 1

    def _end_video(self) -> None:
        if self._writer is not None:
            self._writer.release()
        self._writer, self._written = None, 0

    def close(self) -> None:
        """Writes the files that hold everything, after an interrupt what was found until then. With many ranks all must
        call this; the first one writes what all of them found, in the pictures' order, and a page of its own."""
        self._thread.shutdown()
        self._end_video()
        parts = gather_to_main(self._entries)
        entries = sorted((entry for part in parts for entry in part), key=itemgetter("image_id"))
        self.objects = len(entries)
        common = self.formats if is_main() else ()
        if "json" in common:
            write_entries(self.folder / "detections.json", entries)
        if "coco" in common:
            keys = ("image_id", "category_id", "bbox", "score")
            write_entries(self.folder / "coco.json", [{key: entry[key] for key in keys} for entry in entries])
        if "csv" in common:
            write_csv(self.folder / "detections.csv", entries)
        if self._shown:
            save_picture(contact_sheet(self._shown), self._sheet)
        for written in self._waiting:
            written.result()


def folder_names(categories: Sequence[Category]) -> list[str]:
    """A folder's name for each class: its letters, digits, - and _ only, so that none leads elsewhere; else with its id."""
    safe = [re.sub(r"[^\w-]", "_", category.name)[:60].strip("_") for category in categories]
    times = Counter(map(str.lower, safe))  # many file systems do not tell A from a
    return [n if n and times[n.lower()] == 1 else f"{n or 'class'}_{c.id}" for n, c in zip(safe, categories, strict=True)]


def suffix_for(picture: np.ndarray) -> str:
    return ".jpg" if max(picture.shape) <= LARGEST_JPEG else ".png"


def save_picture(picture: np.ndarray, path: Path) -> None:
    """Writes JPEG, or PNG, as the suffix says."""
    if path.suffix == ".png":
        say(f"{path}: PNG, because a JPEG holds no more than {LARGEST_JPEG} pixels a side")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, quality=92)


def write_csv(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Frame and time are empty for still pictures."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, CSV_FIELDS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(entry | dict(zip(("x", "y", "width", "height"), entry["bbox"], strict=True)) for entry in entries)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
