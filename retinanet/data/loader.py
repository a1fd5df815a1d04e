"""Which samples make which batch, reading them in worker processes, and putting them together."""

import math
import os
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from retinanet.data.annotations import Annotations
from retinanet.data.images import UnreadableImageError, read_image
from retinanet.errors import UserError
from retinanet.structures import Batch, Target

PAD_MULTIPLE = 32  # the strides of C3..C5 divide it, so that cells of all images lie on one grid
STAND_INS = 20  # neighbours tried in place of an unreadable image


class Transform(Protocol):
    def __call__(self, image: np.ndarray, target: Target, seed: tuple[int, ...]) -> tuple[np.ndarray, Target]: ...


@dataclass
class Sample:
    image: np.ndarray  # uint8 [height, width, 3]
    target: Target
    original_size: tuple[int, int]
    file_name: str
    faults: list[str]
    readable: bool = True


class DetectionDataset(Dataset[Sample]):
    """Sample (epoch, index, round) of a data set, read and transformed; an unreadable image is stood in for by a later one.

    `round` counts the times that an epoch has shown the image before: 0, 1, ... Each looks different.

    With `stand_in=False` (evaluation) an unreadable image is a grey one without objects, so that no image is evaluated
    twice. Either way its name and the reason are in `Sample.faults`.
    """

    def __init__(self, annotations: Annotations, transform: Transform, *, seed: int = 0, stand_in: bool = True) -> None:
        self.annotations, self.transform, self.seed, self.stand_in = annotations, transform, seed, stand_in

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, key: tuple[int, ...]) -> Sample:
        _, index, *_ = key
        faults: list[str] = []
        for shift in range(min(STAND_INS, len(self)) if self.stand_in else 1):
            chosen = (index + shift) % len(self)
            try:
                return self._read(chosen, (self.seed, *key), faults)
            except UnreadableImageError as error:
                faults.append(str(error))
        if self.stand_in:
            raise UserError(f"{len(faults)} images in a row cannot be read; the first: {faults[0]}")
        image_id = int(self.annotations.image_ids[index])
        empty = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), image_id)
        grey = np.full((PAD_MULTIPLE, PAD_MULTIPLE, 3), 128, np.uint8)
        return Sample(grey, empty, (PAD_MULTIPLE, PAD_MULTIPLE), self.annotations.file_names[index], faults, readable=False)

    def _read(self, index: int, seed: tuple[int, ...], faults: list[str]) -> Sample:
        image = read_image(self.annotations.path(index))
        height, width = image.shape[:2]
        expected = tuple(self.annotations.sizes[index].tolist())
        if all(expected) and expected != (height, width):
            raise UnreadableImageError(
                f"{self.annotations.path(index)}: is {width}x{height} upright, but {self.annotations.source} says "
                f"{expected[1]}x{expected[0]}: its boxes would be wrong"
            )
        target = self.annotations.target(index, (height, width))
        try:
            resized, target = self.transform(image, target, seed)
        except UserError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UserError(f"{self.annotations.path(index)}: augmentation failed: {reason}") from error
        return Sample(resized, target, (height, width), self.annotations.file_names[index], faults)


def collate(samples: list[Sample]) -> Batch:
    """Pads to the largest height and width, rounded up to `PAD_MULTIPLE`; one uint8 array, filled once."""
    sizes = torch.tensor([sample.image.shape[:2] for sample in samples])  # [B, 2]
    height, width = (-(-int(side) // PAD_MULTIPLE) * PAD_MULTIPLE for side in sizes.amax(dim=0))
    images = torch.zeros(len(samples), 3, height, width, dtype=torch.uint8)
    for padded, sample in zip(images, samples, strict=True):
        image = torch.from_numpy(np.ascontiguousarray(sample.image))
        padded[:, : image.shape[0], : image.shape[1]] = image.permute(2, 0, 1)
    return Batch(
        images,
        sizes,
        torch.tensor([sample.original_size for sample in samples]),
        [sample.target for sample in samples],
        [sample.file_name for sample in samples],
        [fault for sample in samples for fault in sample.faults],
        [sample.readable for sample in samples],
    )


def _rebuild_target(boxes: np.ndarray, labels: np.ndarray, ignore_boxes: np.ndarray, image_id: int) -> Target:
    return Target(torch.from_numpy(boxes), torch.from_numpy(labels), torch.from_numpy(ignore_boxes), image_id)


def _reduce_target(target: Target) -> tuple[Any, ...]:
    arrays = target.boxes.numpy(), target.labels.numpy(), target.ignore_boxes.numpy()
    return _rebuild_target, (*arrays, target.image_id)


# From a worker each tensor would come as a shared-memory file of its own: three open files an image, out of 1024.
ForkingPickler.register(Target, _reduce_target)


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
        share = batch_size // world_size
        self.mine = slice(rank * share, (rank + 1) * share)

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


def train_loader(dataset: DetectionDataset, sampler: TrainSampler, workers: int, *, pin: bool) -> DataLoader[Sample]:
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
        worker_init_fn=_quiet_worker,
        prefetch_factor=4 if workers else None,
    )


def evaluation_loader(
    annotations: Annotations, transform: Transform, batch_size: int, workers: int, *, rank: int = 0, world_size: int = 1
) -> DataLoader[Sample]:
    """`Batch`es with every image of the data set exactly once over all ranks, sorted by shape: little padding."""
    dataset = DetectionDataset(annotations, transform, stand_in=False)
    order = np.lexsort((annotations.sizes[:, 1], annotations.sizes[:, 0]))[rank::world_size]
    batches = [[(0, int(i), 0) for i in order[n : n + batch_size]] for n in range(0, len(order), batch_size)]
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=collate, worker_init_fn=_quiet_worker)


def choose_workers(asked: int | None, world_size: int) -> int:
    """Loading processes for this rank: as asked, else the cores that its share of the machine has, at most 8."""
    if asked is not None:
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    return max(1, min(8, cores // local))


def _quiet_worker(_: int) -> None:
    """A worker keeps to one core, since OpenCV's threads would fight for the others, and leaves Ctrl-C to the main process."""
    import cv2

    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
