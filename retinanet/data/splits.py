"""A data set in parts that have each class in the same shares, and no picture in two of them."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from retinanet.data.annotations import Annotations
from retinanet.data.images import MANY
from retinanet.errors import UserError


def split_images(annotations: Annotations, shares: Mapping[str, float], seed: int = 0) -> dict[str, np.ndarray]:
    """Image indices of each part, ascending, for `Annotations.select`. The same seed gives the same parts.

    Iterative stratification (Sechidis et al. 2011): the class that fewest images have is dealt out first, each image to
    the part that lacks most of it; of each class the first goes to the first part, the training's. Images of the same
    bytes stay together. No part is empty. Raises `UserError` if there are fewer different images than parts, or one
    cannot be read.
    """
    group_of = _same_images(annotations)  # [I]
    images = np.bincount(group_of)  # [G]
    if len(images) < len(shares):
        raise UserError(f"{annotations.source}: {len(images)} different images cannot be split into {len(shares)} parts")
    has = np.zeros((len(images), len(annotations.categories)), bool)  # [G, K]
    has[group_of[annotations.image_of[~annotations.crowd]], annotations.labels[~annotations.crowd]] = True
    part_of = _deal(has, images, np.array(list(shares.values())), np.random.default_rng(seed))
    _fill_empty(part_of, has, len(shares))
    return {name: np.flatnonzero(part_of[group_of] == part) for part, name in enumerate(shares)}


def _deal(has: np.ndarray, images: np.ndarray, shares: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[G] part of each group, of which there are so many `images` [G], and which `has` [G, K] classes."""
    lacking = shares[:, None] * (has * images[:, None]).sum(axis=0)  # [S, K] images with the class
    room = shares * images.sum()  # [S]
    part_of = np.full(len(images), -1)
    trained = np.zeros(has.shape[1], bool)
    order = rng.permutation(len(images))

    def put(group: int, part: int) -> None:
        part_of[group] = part
        lacking[part] -= has[group] * images[group]
        room[part] -= images[group]

    while (left := has[part_of < 0].sum(axis=0)).any():
        rarest = np.where(left > 0, left, len(images) + 1).argmin()
        for group in order[(part_of[order] < 0) & has[order, rarest]]:
            new = (has[group] & ~trained).any()
            trained |= has[group] & new
            put(group, 0 if new else int(np.lexsort((room, lacking[:, rarest]))[-1]))
    for group in order[part_of[order] < 0]:  # those without objects
        put(group, int(room.argmax()))
    return part_of


def _fill_empty(part_of: np.ndarray, has: np.ndarray, parts: int) -> None:
    """Gives each empty part an image of the fullest: one whose classes are left there, or else without objects."""
    for part in range(parts):
        if not (part_of == part).any():
            of_fullest = np.flatnonzero(part_of == np.bincount(part_of).argmax())
            having = has[of_fullest].sum(axis=0)  # [K]
            spare = [having[classes].min() if classes.any() else 1.5 for classes in has[of_fullest]]
            part_of[of_fullest[int(np.argmax(spare))]] = part


def _same_images(annotations: Annotations) -> np.ndarray:
    """[I] number of the group of files with the same bytes. Only files of the same size are read."""
    paths = [annotations.path(index) for index in range(len(annotations))]

    def digest(path: Path, size: int) -> tuple[int, bytes]:
        with path.open("rb") as stream:
            return size, hashlib.file_digest(stream, "blake2b").digest() if times[size] > 1 else str(path).encode()

    try:
        sizes = [path.stat().st_size for path in paths]
        times = Counter(sizes)
        with ThreadPoolExecutor(8) as pool:
            found = pool.map(digest, paths, sizes)
            keys = list(tqdm(found, "comparing images", len(paths), unit="image", disable=len(paths) < MANY))
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from None
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.array([numbers[key] for key in keys], np.int64)
