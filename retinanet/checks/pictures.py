"""One look at every picture: can it be read, how large is it, of what kind, and what does it look like."""

import hashlib
import os
import warnings
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from retinanet.data.annotations import Annotations
from retinanet.data.faults import Fault
from retinanet.data.images import UnreadableImageError, lies_down, opened, to_rgb

THUMBNAIL = 8, 9  # height, width: nine greys in a row have eight differences, 64 in all
REDUCED = 64  # pixels a side that JPEG is decoded to at least: with less the thumbnail would depend on the size
PLAIN = {"RGB", "L", "P", "1"}  # modes that lose nothing by becoming 8-bit RGB


class Look(NamedTuple):
    """What one picture is; `size` is (0, 0) where it cannot be read."""

    findings: list[Fault]
    size: tuple[int, int] = (0, 0)  # (height, width), upright
    digest: int = 0  # of the file's bytes, 64 bits
    thumbnail: bytes = bytes(THUMBNAIL[0] * THUMBNAIL[1])  # grey


@dataclass
class Pictures:
    """What the I pictures of a data set are, in a hundred bytes each."""

    sizes: np.ndarray  # [I, 2] int64 (height, width), upright; 0 where unreadable
    digests: np.ndarray  # [I] uint64
    thumbnails: np.ndarray  # [I, 8, 9] uint8


def look_at_all(annotations: Annotations, name: str) -> tuple[Pictures, list[Fault]]:
    """Reads every picture once, on all cores.

    In threads, for decoding leaves Python's lock: processes were no faster, and would copy the annotations.
    """
    count, findings = len(annotations), list[Fault]()
    found = Pictures(np.zeros((count, 2), np.int64), np.zeros(count, np.uint64), np.zeros((count, *THUMBNAIL), np.uint8))
    with warnings.catch_warnings(action="ignore"), ThreadPool(os.cpu_count()) as pool:  # filters are common to all threads
        looks = pool.imap(lambda n: look_at(annotations.path(n), annotations.sizes[n].tolist()), range(count))
        for index, look in enumerate(tqdm(looks, f"reading {name}", count, unit="image")):
            findings += look.findings
            found.sizes[index], found.digests[index] = look.size, look.digest
            found.thumbnails[index] = np.frombuffer(look.thumbnail, np.uint8).reshape(THUMBNAIL)
    return found, findings


def look_at(path: Path, listed: list[int]) -> Look:
    """Decodes the picture as training does, but JPEG at an eighth of its size. `listed`: [height, width], 0 if unknown."""
    try:
        with opened(path) as image:
            content = path.read_bytes()
            stored, mode = (image.height, image.width), image.mode
            turned = lies_down(image)
            reduced = image.draft(None, (max(REDUCED, image.width // 8), max(REDUCED, image.height // 8)))
            picture = to_rgb(image)
    except UnreadableImageError as error:
        return Look([Fault(_why(error.__context__), str(path), None, str(error))])
    size = (stored[::-1] if turned else stored) if reduced else picture.shape[:2]
    findings = []
    if all(listed) and tuple(listed) != size:
        kind = "rotated size" if turned and tuple(listed) == size[::-1] else "size mismatch"
        message = f"{size[1]} x {size[0]} pixels, but annotated as {listed[1]} x {listed[0]}"
        findings.append(Fault(kind, str(path), None, message))
    if mode not in PLAIN:
        findings.append(Fault("converted image", str(path), None, f"Pillow's mode {mode}"))
    grey = Image.fromarray(picture).convert("L").resize(THUMBNAIL[::-1], Image.Resampling.BOX)
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return Look(findings, size, int.from_bytes(digest), grey.tobytes())


def _why(error: BaseException | None) -> str:
    """The kind of what Pillow raised."""
    if isinstance(error, FileNotFoundError):
        return "missing image"
    if isinstance(error, Image.DecompressionBombError):
        return "huge image"
    return "truncated image" if "truncated" in str(error).lower() else "unreadable image"
