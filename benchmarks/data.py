"""JPEG files to the model's input on one core: flip, resize, seven boxes. torchvision's reference pipeline (PIL, float, resize
and normalisation in the model) against ours, which hands out uint8: alone, and with the normalisation that is our model's.
"""

import shutil
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path

import cv2
import torch
from PIL import Image
from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms import functional as tv

from benchmarks.peer import draw_picture
from benchmarks.timing import Case, Options
from benchmarks.training import draw_target
from retinanet.config import AugmentConfig, InputConfig
from retinanet.data.annotations import AnnotationRow, Annotations, ImageRow
from retinanet.data.loader import DetectionDataset, collate
from retinanet.data.transforms import build_augment
from retinanet.model import RetinaNet
from retinanet.structures import Category

ROUNDS = 9
FILES = 8
PIXELS = (480, 640)
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
Pictures = tuple[Tensor, Tensor]  # normalised [B, 3, H, W], boxes [B * N, 4]


def cases(options: Options) -> list[Case]:
    return [_case(size) for size in options.sizes or (800,)]


def draw_files(folder: Path) -> Annotations:
    """`FILES` JPEG files, with the same boxes in all."""
    boxes = draw_target(PIXELS, 1).boxes.tolist()
    for n in range(FILES):
        Image.fromarray(draw_picture(PIXELS, n)).save(folder / f"{n}.jpg", quality=90)
    images = [ImageRow(n, f"{n}.jpg", *PIXELS) for n in range(FILES)]
    rows = [AnnotationRow(n, 0, 0, [x, y, right - x, low - y], 1.0, False) for n in range(FILES) for x, y, right, low in boxes]
    return Annotations.pack("drawn", folder, [Category(1, "thing")], images, rows)


def _case(size: int) -> Case:
    cv2.setNumThreads(0)
    folder = Path(tempfile.mkdtemp())
    annotations = draw_files(folder)
    weakref.finalize(annotations, shutil.rmtree, folder, ignore_errors=True)  # the functions below keep them

    def peer() -> Callable[[], Pictures]:
        transform = GeneralizedRCNNTransform(size, 2 * size, MEAN, STD)

        def read() -> Pictures:
            samples = [_reference_sample(annotations, n) for n in range(FILES)]
            batch, targets = transform([image for image, _ in samples], [{"boxes": boxes} for _, boxes in samples])
            return batch.tensors, torch.cat([target["boxes"] for target in targets])

        return read

    def ours(normalize: bool) -> Callable[[], Pictures]:
        input = InputConfig(short_edge=size, long_edge=2 * size, size_rounding="floor")  # as torchvision
        augment = AugmentConfig(transforms=[{"HorizontalFlip": {"p": 1.0}}])
        dataset = DetectionDataset(annotations, build_augment(augment, input))
        model = RetinaNet(1, "resnet18")

        def read() -> Pictures:
            batch = collate([dataset[0, n] for n in range(FILES)])
            images = model.normalize(batch.images, batch.image_sizes) if normalize else batch.images
            return images, torch.cat([target.boxes for target in batch.targets])

        return read

    names = {"ours, uint8": False, "ours, normalised here": True}
    variants = {"torchvision": peer, **{name: lambda flag=flag: ours(flag) for name, flag in names.items()}}
    return Case(f"JPEG 640x480 to {size} px, {FILES} images", variants, _compare, images=FILES, threads=1)


def _reference_sample(annotations: Annotations, index: int) -> tuple[Tensor, Tensor]:
    """references/detection/presets.py, hflip: flip, PILToTensor, float. The flip always happens, that both do the same."""
    with Image.open(annotations.path(index)) as file:
        image = tv.hflip(file.convert("RGB"))
    boxes = annotations.target(index, PIXELS).boxes.clone()
    boxes[:, [0, 2]] = image.width - boxes[:, [2, 0]]
    return tv.convert_image_dtype(tv.pil_to_tensor(image), torch.float32), boxes


def _compare(peer: Pictures, ours: Pictures) -> dict[str, float]:
    """In grey levels 0..255 (ours rounds when it resizes) and pixels."""
    images, mean, std = ours[0], *(torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    if images.dtype == torch.uint8:
        images = (images / 255 - mean) / std
    inside = peer[0] != 0  # which is padding
    grey = (peer[0] - images).abs() * std * 255
    return {"grey levels on average": float(grey[inside].mean()), "boxes": float((peer[1] - ours[1]).abs().max())}
