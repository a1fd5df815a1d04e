"""Which samples make which batch: the order of an epoch, repeats of rare classes, and each rank's part."""

import math
from collections import Counter
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from retinanet.data.annotations import Annotations


def repeat_factors(annotations: Annotations, threshold: float) -> np.ndarray:
    """How often an epoch shows each image, at least once on average: [I] float64 (Gupta et al. 2019, LVIS, appendix B.1).

    That of a class is sqrt(threshold / share of images that have it), that of an image is its rarest class's.
    """
    image_of = annotations.image_of
    useful = ~annotations.crowd & (annotations.coco_boxes[:, 2:] > 0).all(axis=1)
    images, labels = np.unique(np.stack([image_of, annotations.labels])[:, useful], axis=1)  # each class once in an image
    share = np.bincount(labels) / len(annotations)
    factors = np.ones(len(annotations))
    np.maximum.at(factors, images, np.sqrt(threshold / share[labels]))
    return factors


def _drawn(factors: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random order in which image i comes floor or ceil of factors[i] times, factors[i] on average.

    One random number cuts the line of all fractions at every whole number: like a coin for each image, but their sum is
    the same in every epoch to within one.
    """
    order = rng.permutation(len(factors))
    whole, fraction = np.divmod(factors[order], 1)
    cuts = np.floor(np.concatenate([[0], np.cumsum(fraction)]) + rng.random())
    return rng.permutation(np.repeat(order, (whole + np.diff(cuts)).astype(np.int64)))


def epoch_length(num_images: int, factors: np.ndarray | None) -> int:
    """Images that an epoch shows."""
    return num_images if factors is None else math.ceil(factors.sum())


def epoch_batches(
    num_images: int,
    batch_size: int,
    seed: int,
    epoch: int,
    portrait: np.ndarray | None,
    factors: np.ndarray | None = None,
) -> np.ndarray:
    """The global batches of an epoch, [steps, batch_size] indices, from (seed, epoch) alone.

    Every image comes at least once, or with `repeat_factors` so often; the last batch is filled up from the start of the
    order. With `portrait`, [I] bool, batches hold one kind only, but for what is left over of both kinds.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(num_images) if factors is None else _drawn(factors, rng)
    if portrait is not None:
        full: list[np.ndarray] = []
        rest: list[np.ndarray] = []
        for kind in (True, False):
            members = order[portrait[order] == kind]
            cut = len(members) // batch_size * batch_size
            full.append(members[:cut])
            rest.append(members[cut:])
        order = np.concatenate(full + rest)
    steps = -(-epoch_length(num_images, factors) // batch_size)
    batches = np.resize(order, (steps, batch_size))  # repeats the order as often as needed
    return batches[rng.permutation(steps)]


class TrainSampler(Sampler[list[tuple[int, ...]]]):
    """This rank's part of every global batch from `start_step` to `total_steps`, as lists of (epoch, index, round)."""

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        *,
        seed: int,
        start_step: int,
        total_steps: int,
        rank: int = 0,
        world_size: int = 1,
        portrait: np.ndarray | None = None,
        factors: np.ndarray | None = None,
    ) -> None:
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.portrait, self.factors = portrait, factors
        self.start_step, self.total_steps = start_step, total_steps
        first, end = (-(-r * batch_size // world_size) for r in (rank, rank + 1))
        self.mine = slice(first, end)  # 8 on 3 ranks: 3 + 3 + 2

    def __len__(self) -> int:
        return self.total_steps - self.start_step

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        steps_per_epoch = -(-epoch_length(self.num_images, self.factors) // self.batch_size)
        known_epoch, batches, shown = -1, np.empty((0, 0), np.int64), Counter[int]()
        for step in range(self.start_step, self.total_steps):
            epoch, position = divmod(step, steps_per_epoch)
            if epoch != known_epoch:
                batches = epoch_batches(self.num_images, self.batch_size, self.seed, epoch, self.portrait, self.factors)
                known_epoch, shown = epoch, Counter(batches[:position].ravel().tolist())
            keys: list[tuple[int, ...]] = []
            for index in batches[position].tolist():
                keys.append((epoch, index, shown[index]))
                shown[index] += 1
            yield keys[self.mine]
