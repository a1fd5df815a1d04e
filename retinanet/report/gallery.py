"""The worst findings with their pictures: a crop around each as a JPEG inside the page."""

import base64
import io
from collections.abc import Iterator
from itertools import product, zip_longest
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from retinanet.data.annotations import Annotations
from retinanet.data.images import UnreadableImageError, read_image

MOST = 96  # findings shown
LARGEST = 6_000_000  # characters of all pictures together, as they stand in the page
SIDE = 480  # pixels of a crop's longer side
CONTEXT = 2.4  # a crop is so many times as large as what it shows,
LEAST = 96  # ... and no smaller than this, so that one sees where it is
QUALITIES = (75, 55, 35)  # of the JPEG, until it is small enough


def build_gallery(findings: list[dict[str, Any]], annotations: Annotations) -> list[dict[str, Any]]:
    """At most `MOST` findings, as many of each kind as there are, the worst first. Each with `picture` (a data URI), `size`
    (width, height) and its boxes in the crop's pixels; or with `problem`, why there is no picture.

    Only pictures that are shown are read, each once.
    """
    chosen = _fair(findings)
    index_of = {int(image_id): n for n, image_id in enumerate(annotations.image_ids)}
    shown: dict[int, dict[str, Any]] = {}
    by_image = sorted(range(len(chosen)), key=lambda n: chosen[n]["image_id"])
    image, last, problem = None, None, ""
    for n in tqdm(by_image, "pictures", unit="finding", leave=False, delay=2):
        finding = chosen[n]
        if finding["image_id"] != last:
            last, path = finding["image_id"], annotations.path(index_of[finding["image_id"]])
            try:
                image = read_image(path)
            except UnreadableImageError as error:
                image, problem = None, str(error).removeprefix(f"{path}: ")
        shown[n] = finding | ({"problem": problem} if image is None else _crop(finding, image, LARGEST // len(chosen)))
    return [shown[n] for n in range(len(chosen))]


def _fair(findings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first `MOST` in turns of kinds; then together by kind, in order."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for finding in findings:
        kinds.setdefault(finding["kind"], []).append(finding)
    turns = [finding for turn in zip_longest(*kinds.values()) for finding in turn if finding is not None][:MOST]
    return sorted(turns, key=lambda finding: [*kinds].index(finding["kind"]))


def _crop(finding: dict[str, Any], image: np.ndarray, largest: int) -> dict[str, Any]:
    height, width = image.shape[:2]
    boxes = np.array([box for box in (finding["box"], finding["truth"]) if box is not None], np.float64)
    begin, end = boxes[:, :2].min(axis=0), (boxes[:, :2] + boxes[:, 2:]).max(axis=0)
    half = np.maximum((end - begin).max() * CONTEXT, LEAST) / 2
    whole = np.array([width, height])
    middle = ((begin + end) / 2).clip(0, whole)  # a box of a stranger's file may lie anywhere
    x1, y1 = np.floor((middle - half).clip(0, whole - 1)).astype(int)
    x2, y2 = np.ceil((middle + half).clip([x1 + 1, y1 + 1], whole)).astype(int)
    picture = Image.fromarray(image[y1:y2, x1:x2])
    scale = min(1.0, SIDE / max(picture.size))
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))

    def moved(box: list[float] | None) -> list[float] | None:
        return box and [round(float(v), 1) for v in (np.array(box) - [x1, y1, 0, 0]) * scale]

    uri = next(uri for uri in _encoded(picture.resize(size, Image.Resampling.LANCZOS)) if len(uri) <= largest)
    return {"picture": uri, "size": size, "box": moved(finding["box"]), "truth": moved(finding["truth"])}


def _encoded(picture: Image.Image) -> Iterator[str]:
    """Data URIs, each smaller than the one before."""
    for halved, quality in product(range(5), QUALITIES):
        file = io.BytesIO()
        size = max(1, picture.width >> halved), max(1, picture.height >> halved)
        picture.resize(size).save(file, "JPEG", quality=quality)
        yield f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
