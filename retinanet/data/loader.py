"""Reading samples, in loading processes, and putting them together to batches."""

import math
from dataclasses import dataclass
from functools import partial
from multiprocessing.reduction import ForkingPickler
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from retinanet.data.annotations import Annotations
from retinanet.data.cache import PictureCache
from retinanet.data.images import Size, UnreadableImageError, read_image, read_reduced
from retinanet.data.sampling import TrainSampler
from retinanet.data.workers import PATIENCE, plan_loading, quiet_worker
from retinanet.distributed import say
from retinanet.errors import UserError
from retinanet.structures import Batch, Target

PAD_MULTIPLE = 32  # the strides of C3..C5 divide it, so that cells of all images lie on one grid
COMPILED_MULTIPLE = 128  # where the model is compiled, once for each size
STAND_INS = 20  # neighbours tried in place of an unreadable image


class Transform(Protocol):
    largest: Size  # sides that no result exceeds

    def result_size(self, size: Size, seed: tuple[int, ...]) -> Size:
        """What a picture of this (height, width) becomes."""
        ...

    def __call__(self, image: np.ndarray, target: Target, seed: tuple[int, ...], size: Size) -> tuple[np.ndarray, Target]:
        """`size` is what the boxes refer to: the picture's own, or that in full of one decoded smaller."""
        ...


@dataclass
class Sample:
    image: np.ndarray  # uint8 [height, width, 3]
    target: Target
    original_size: tuple[int, int]
    file_name: str
    faults: list[str]
    readable: bool = True

    @classmethod
    def to_look_at(cls, image: np.ndarray, original_size: Size) -> "Sample":
        """A picture without truth, resized from `original_size`."""
        return cls(image, Target.empty(), original_size, "", [])


class DetectionDataset(Dataset[Sample]):
    """Sample (epoch, index, round) of a data set, read and transformed; an unreadable image is stood in for by a later one.

    `round` counts the times that an epoch has shown the image before: 0, 1, ... Each looks different.

    With `stand_in=False` (evaluation) an unreadable image is a grey one without objects, so that no image is evaluated
    twice. Either way its name and the reason are in `Sample.faults`.

    With `reduced` pictures are decoded no larger than `transform` needs them, with a `cache` they are taken from there.
    """

    def __init__(
        self,
        annotations: Annotations,
        transform: Transform,
        *,
        seed: int = 0,
        stand_in: bool = True,
        reduced: bool = False,
        cache: PictureCache | None = None,
    ) -> None:
        self.annotations, self.transform, self.seed, self.stand_in = annotations, transform, seed, stand_in
        self.reduced, self.cache = reduced, cache

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
        grey = np.full((PAD_MULTIPLE, PAD_MULTIPLE, 3), 128, np.uint8)
        return Sample(
            grey,
            Target.empty(image_id),
            (PAD_MULTIPLE, PAD_MULTIPLE),
            self.annotations.file_names[index],
            faults,
            readable=False,
        )

    def _read(self, index: int, seed: tuple[int, ...], faults: list[str]) -> Sample:
        image, (height, width) = self._picture(index, seed)
        expected = tuple(self.annotations.sizes[index].tolist())
        if all(expected) and expected != (height, width):
            raise UnreadableImageError(
                f"{self.annotations.path(index)}: is {width}x{height} upright, but {self.annotations.source} says "
                f"{expected[1]}x{expected[0]}: its boxes would be wrong"
            )
        target = self.annotations.target(index, (height, width))
        try:
            resized, target = self.transform(image, target, seed, (height, width))
        except UserError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UserError(f"{self.annotations.path(index)}: augmentation failed: {reason}") from error
        return Sample(resized, target, (height, width), self.annotations.file_names[index], faults)

    def _picture(self, index: int, seed: tuple[int, ...]) -> tuple[np.ndarray, Size]:
        """And its size in full."""
        if self.reduced:
            return read_reduced(self.annotations.path(index), lambda size: self.transform.result_size(size, seed))
        image = self.cache.read(index) if self.cache is not None else None
        if image is None:
            image = read_image(self.annotations.path(index))
        return image, (image.shape[0], image.shape[1])


def collate(samples: list[Sample], multiple: int = PAD_MULTIPLE) -> Batch:
    """Pads to the largest height and width, rounded up to a `multiple` of 32; one uint8 array, filled once."""
    sizes = torch.tensor([sample.image.shape[:2] for sample in samples])  # [B, 2]
    height, width = (_round_up(int(side), multiple) for side in sizes.amax(dim=0))
    images = np.zeros((len(samples), 3, height, width), np.uint8)
    for padded, sample in zip(images, samples, strict=True):
        image = sample.image
        padded[:, : image.shape[0], : image.shape[1]] = image.transpose(2, 0, 1)
    return Batch(
        torch.from_numpy(images),
        sizes,
        torch.tensor([sample.original_size for sample in samples]),
        [sample.target for sample in samples],
        [sample.file_name for sample in samples],
        [fault for sample in samples for fault in sample.faults],
        [sample.readable for sample in samples],
    )


def _round_up(side: int, multiple: int) -> int:
    return -(-side // multiple) * multiple


def _rebuild_target(boxes: np.ndarray, labels: np.ndarray, ignore_boxes: np.ndarray, image_id: int) -> Target:
    return Target(torch.from_numpy(boxes), torch.from_numpy(labels), torch.from_numpy(ignore_boxes), image_id)


def _reduce_target(target: Target) -> tuple[Any, ...]:
    arrays = target.boxes.numpy(), target.labels.numpy(), target.ignore_boxes.numpy()
    return _rebuild_target, (*arrays, target.image_id)


# From a worker each tensor would come as a shared-memory file of its own: three open files an image, out of 1024.
ForkingPickler.register(Target, _reduce_target)


def train_loader(
    dataset: DetectionDataset, sampler: TrainSampler, workers: int, *, pin: bool, multiple: int = PAD_MULTIPLE
) -> DataLoader[Sample]:
    """This rank's `Batch`es, padded to a `multiple` of 32; says how they are loaded."""
    share = sampler.mine.stop - sampler.mine.start
    loader = _loader(dataset, sampler, share, workers, pin, multiple)
    ahead = f"{loader.prefetch_factor} batches ahead each, " if loader.num_workers else ""
    pinned, cache = "pinned" if pin else "not pinned", dataset.cache or "none"
    say(f"loading: {loader.num_workers} process(es) a rank, {ahead}{pinned}, cache: {cache}")
    return loader


def evaluation_loader(
    annotations: Annotations,
    transform: Transform,
    batch_size: int,
    workers: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    pin: bool = False,
    reduced: bool = False,
    first: int = 0,
) -> DataLoader[Sample]:
    """`Batch`es, from the `first` on, with every image of the data set exactly once over all ranks, sorted by shape: little
    padding."""
    dataset = DetectionDataset(annotations, transform, stand_in=False, reduced=reduced)
    order = np.lexsort((annotations.sizes[:, 1], annotations.sizes[:, 0]))[rank::world_size]
    batches = [[(0, int(i), 0) for i in order[n : n + batch_size]] for n in range(first * batch_size, len(order), batch_size)]
    return _loader(dataset, batches, batch_size, workers, pin, PAD_MULTIPLE)


def _loader(
    dataset: DetectionDataset, batches: Any, batch_size: int, workers: int, pin: bool, multiple: int
) -> DataLoader[Sample]:
    image_bytes = 3 * math.prod(_round_up(side, multiple) for side in dataset.transform.largest)
    workers, ahead = plan_loading(workers, batch_size * image_bytes)
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=partial(collate, multiple=multiple),
        pin_memory=pin,
        generator=torch.Generator(),  # or the workers' seed is drawn from the run's, which a resumed one does once more
        worker_init_fn=quiet_worker,
        prefetch_factor=ahead if workers else None,
        timeout=PATIENCE if workers else 0,
    )
