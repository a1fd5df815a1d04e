"""Pictures decoded once, for all epochs and all loading processes."""

import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from retinanet.data.annotations import Annotations
from retinanet.data.images import MANY, UnreadableImageError, read_image, read_sizes
from retinanet.data.workers import available_memory, local_ranks
from retinanet.errors import UserError

MOST = 0.8  # of the memory that is left


class PictureCache:
    """The pictures of a data set as `read_image` gives them, in one tensor that the loading processes share: forked ones
    have the same pages, others get it from torch as shared memory. Decoded, because decoding is what takes the time:
    the system keeps the files in memory anyway.

    Raises `UserError` if the pictures do not fit into memory.
    """

    def __init__(self, annotations: Annotations) -> None:
        from tqdm import tqdm

        paths = [annotations.path(index) for index in range(len(annotations))]
        self.sizes = read_sizes(paths, faults=[])  # 0 where unreadable
        self.offsets = np.concatenate([[0], np.cumsum(3 * self.sizes.prod(axis=1))])
        total, ranks, left = int(self.offsets[-1]), local_ranks(), available_memory()
        if left is not None and total * ranks > MOST * left:
            times = f"{ranks} times " if ranks > 1 else ""
            raise UserError(
                f"data.cache: {len(paths)} decoded pictures take {times}{total / 1e9:.3g} GB, but memory has "
                f"{left / 1e9:.3g} GB left, of which {MOST:.0%} may be used: leave data.cache out, or store smaller pictures"
            )
        self.pixels = torch.empty(total, dtype=torch.uint8)

        def fill(index: int) -> bool:
            try:
                self._place(index)[:] = read_image(paths[index])
            except UnreadableImageError:
                return False
            return True

        with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor(8) as pool:  # threads would undo each other's
            done = pool.map(fill, range(len(paths)))
            self.filled = np.array(list(tqdm(done, "data.cache", len(paths), unit="image", disable=len(paths) < MANY)), bool)

    def __str__(self) -> str:
        return f"{self.filled.sum()} pictures in {len(self.pixels) / 1e6:.3g} MB"

    def read(self, index: int) -> np.ndarray | None:
        """A copy of picture `index`, uint8 [height, width, 3]; None if it could not be read: reading it again tells why."""
        return self._place(index).copy() if self.filled[index] else None

    def _place(self, index: int) -> np.ndarray:
        height, width = self.sizes[index]
        return self.pixels[self.offsets[index] : self.offsets[index + 1]].numpy().reshape(height, width, 3)
