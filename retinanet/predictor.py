"""The front door for inference: a checkpoint in, pictures in, detections out."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from retinanet.checkpoint import Checkpoint
from retinanet.config import InputConfig, PostprocessConfig
from retinanet.data.images import read_image, resize, resized_size, to_rgb
from retinanet.data.loader import COMPILED_MULTIPLE, PAD_MULTIPLE, Sample, collate
from retinanet.distributed import say
from retinanet.errors import UserError
from retinanet.inference import detect_batches, prepare
from retinanet.inputs import read_ahead
from retinanet.model import RetinaNet
from retinanet.onnx.runtime import OnnxModel, load_onnx
from retinanet.postprocess import build_postprocessor
from retinanet.precision import choose_device, choose_precision
from retinanet.structures import Category, Detections
from retinanet.test_time import AUGMENTED, PLAIN, Look, fuse, mirror_boxes
from retinanet.tiling import Region, Tiling
from retinanet.weights.zoo import load_weights

Item = TypeVar("Item")
Picture = str | Path | Image.Image | np.ndarray | Tensor
DEFAULT_SCORE = 0.5


class Predictor:
    """A trained detector, ready to use.

    `score_threshold`: None takes the checkpoint's best threshold of each class (0.5 for a class without one).
    `tile`: pictures larger than this many pixels a side are looked at in tiles, which share `overlap` of a side, and as a
    whole; each tile is resized by `input` as a picture would be. `tta`: every picture, or tile, is looked at six times,
    mirrored and at three sizes, and the boxes are fused. `precision`: fp32, bf16, fp16, or auto: bf16 where the hardware
    computes with it. `compile`: by torch.compile, which takes a minute for each size of pictures and pays on a GPU.
    """

    def __init__(
        self,
        model: RetinaNet | OnnxModel,
        categories: Sequence[Category],
        *,
        input: InputConfig | None = None,
        postprocess: PostprocessConfig | None = None,
        thresholds: dict[str, float] | None = None,
        score_threshold: float | None = None,
        device: str | torch.device | None = None,
        precision: str = "auto",
        compile: bool = False,
        tile: int | None = None,
        overlap: float = 0.2,
        tta: bool = False,
    ) -> None:
        if score_threshold is not None and not 0 <= score_threshold <= 1:
            raise UserError(f"the score threshold must lie in 0..1, got {score_threshold:g}")
        if len(categories) != model.num_classes:
            raise UserError(f"the model has {model.num_classes} classes, but {len(categories)} categories are given")
        self.device = choose_device(device)
        self.precision = model.precision if isinstance(model, OnnxModel) else choose_precision(precision, self.device)
        self.model = prepare(model.eval().to(self.device), self.precision, compile=compile)
        self._multiple = COMPILED_MULTIPLE if compile else PAD_MULTIPLE
        self.input = input or InputConfig()
        self.categories = tuple(categories)
        self.tiling = None if tile is None else Tiling(tile, overlap)
        self.tta = tta
        self.postprocess = postprocess or PostprocessConfig()
        if score_threshold is None:
            limits = [(thresholds or {}).get(category.name, DEFAULT_SCORE) for category in categories]
        else:
            limits = [score_threshold] * len(categories)
            least = min(self.postprocess.score_threshold, score_threshold)
            self.postprocess = self.postprocess.model_copy(update={"score_threshold": least})
        self.thresholds = torch.tensor(limits)  # [K]
        build = model.postprocessor if isinstance(model, OnnxModel) else build_postprocessor
        self._postprocess = build(self.postprocess, self.categories)
        self._largest = model.input_size if isinstance(model, OnnxModel) else None

    @classmethod
    def load(
        cls,
        weights: str | Path,
        *,
        device: str | torch.device | None = None,
        precision: str = "auto",
        runtime: str = "auto",
        **options: Any,
    ) -> "Predictor":
        """From the path of a checkpoint or of an ONNX file (.onnx), or a name of the zoo. Raises `UserError` when it cannot
        be had. `runtime` and `precision` of an ONNX file: see `load_onnx`. `options`: `score_threshold`, `tile`, `overlap`,
        `tta`."""
        if Path(weights).suffix.lower() == ".onnx":
            model = load_onnx(weights, device, runtime=runtime, precision=precision)
            say(f"{weights}: {model.description}")
            return cls.from_onnx(model, **options)
        if runtime != "auto":
            raise UserError(f"runtime='{runtime}' is for ONNX files, which {weights} is not")
        if precision == "int8":
            raise UserError(
                f"int8 takes an ONNX file, made with: python tools/export.py --weights {weights} --out NAME.onnx --dynamic "
                "--int8 --calibrate PHOTOS"
            )
        return cls.from_checkpoint(load_weights(weights), device=device, precision=precision, **options)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, **options: Any) -> "Predictor":
        return cls(
            checkpoint.build(),
            checkpoint.categories,
            input=checkpoint.config.input,
            postprocess=checkpoint.config.postprocess,
            thresholds=checkpoint.thresholds,
            **options,
        )

    @classmethod
    def from_onnx(cls, model: OnnxModel, **options: Any) -> "Predictor":
        if model.input_size is not None:
            height, width = model.input_size
            say(
                f"note: this ONNX file has one fixed size, so that every picture is shrunk or padded to {height}x{width}; "
                "one exported with --dynamic finds what the checkpoint finds"
            )
        header = model.header
        return cls(
            model,
            header.categories,
            input=header.input,
            postprocess=header.postprocess,
            thresholds=header.thresholds,
            device=model.device,
            **options,
        )

    @overload
    def __call__(self, images: Picture, batch_size: int = 8) -> Detections: ...
    @overload
    def __call__(self, images: list[Picture], batch_size: int = 8) -> list[Detections]: ...
    def __call__(self, images: Picture | list[Picture], batch_size: int = 8) -> Detections | list[Detections]:
        """Objects in a picture, or in each of a list: a path, PIL image, RGB array [H, W, 3] uint8 or tensor [3, H, W]
        (uint8, or float in 0..1). Boxes are in pixels of the picture, upright. Raises `UnreadableImageError`."""
        if isinstance(images, list):
            threads = 4 if all(isinstance(image, str | Path) for image in images) else 1  # a PIL image may be there twice
            jobs = (partial(to_array, image) for image in images)
            pictures = read_ahead(jobs, batch_size if self.tiling is None else 1, threads)
            return list(self.stream((picture.result() for picture in pictures), batch_size))
        return next(self.stream([to_array(images)], batch_size))

    def stream(self, images: Iterable[np.ndarray], batch_size: int = 8) -> Iterator[Detections]:
        """Detections of RGB uint8 arrays [H, W, 3], one after the other, `batch_size` of them in a forward."""
        if batch_size < 1:
            raise UserError(f"the batch size must be at least 1, got {batch_size}")
        parts = _parts(images, batch_size if self.tiling is None else 1)  # tiles of one picture fill batches
        return (found for part in parts for found in self._detect(part, batch_size))

    def _detect(self, images: list[np.ndarray], batch_size: int) -> Iterator[Detections]:
        """What is found in each of a few pictures. Of their regions and looks a batch at a time is resized and in memory."""
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        regions = [self.tiling.regions(size) if self.tiling else [(0, 0, size[1], size[0])] for size in sizes]
        found: list[list[list[Detections]]] = [[[] for _ in mine] for mine in regions]  # by picture, region, look
        looks = AUGMENTED if self.tta else PLAIN  # the outer loop: a batch of one scale needs little padding
        todo = [(n, r, look) for look in looks for n, mine in enumerate(regions) for r in range(len(mine))]
        batches = (
            collate([self._sample(images[n], regions[n][r], look) for n, r, look in part], self._multiple)
            for part in _parts(todo, batch_size)
        )
        answers = detect_batches(self.model, batches, self._postprocess, device=self.device)
        each = (detections for _, batch, _ in answers for detections in batch)
        for (n, r, look), detections in zip(todo, each, strict=True):
            found[n][r].append(_placed(detections, regions[n][r], look))
        for mine, size in zip(found, sizes, strict=True):
            yield self._together(mine, size)

    def _together(self, found: list[list[Detections]], size: tuple[int, int]) -> Detections:
        """One picture's detections above the thresholds, from those of its regions and looks."""
        agnostic, most = self.postprocess.class_agnostic, self.postprocess.max_detections
        fused = [fuse(looks, max_detections=most, class_agnostic=agnostic) if self.tta else looks[0] for looks in found]
        parts = [part.above(self.thresholds) for part in fused]
        if self.tiling is None:
            return parts[0]
        return self.tiling.merge(parts, size, nms_threshold=self.postprocess.nms_threshold, class_agnostic=agnostic)

    def _sample(self, image: np.ndarray, region: Region, look: Look) -> Sample:
        x1, y1, x2, y2 = region
        size = y2 - y1, x2 - x1
        short, long = (max(1, round(edge * look.scale)) for edge in (self.input.short_edge, self.input.long_edge))
        new_size = resized_size(size, short, long, self.input.size_rounding, largest=self._largest)
        small = resize(image[y1:y2, x1:x2], new_size)
        return Sample.to_look_at(small[:, ::-1] if look.mirrored else small, size)


def _placed(detections: Detections, region: Region, look: Look) -> Detections:
    """A region's detections in pixels of the whole picture, upright."""
    x1, y1, x2, _ = region
    boxes = mirror_boxes(detections.boxes, x2 - x1) if look.mirrored else detections.boxes
    return replace(detections, boxes=boxes + boxes.new_tensor([x1, y1, x1, y1]))


def to_array(picture: Picture) -> np.ndarray:
    """Any picture that `Predictor` takes, as RGB uint8 [H, W, 3]. Raises `UserError` for anything else."""
    if isinstance(picture, str | Path):
        return read_image(picture)
    if isinstance(picture, Image.Image):
        return to_rgb(picture)
    if isinstance(picture, Tensor):
        return _from_tensor(picture)
    if isinstance(picture, np.ndarray):
        return _from_array(picture)
    raise UserError(f"a picture must be a path, PIL image, array or tensor, got {type(picture).__name__}")


def _from_tensor(picture: Tensor) -> np.ndarray:
    if picture.ndim != 3 or picture.shape[0] != 3 or not picture.numel():
        raise UserError(f"a picture tensor must be [3, height, width], got {list(picture.shape)}")
    if picture.is_floating_point():
        low, high = (float(value) for value in picture.aminmax())
        if not (low >= -0.5 and high <= 1.5):  # resizing overshoots a little; NaN is in no range
            raise UserError(f"a float picture tensor must lie in 0..1, got {low:g}..{high:g}; pass uint8 for 0..255")
        picture = (picture * 255).round().clamp(0, 255).to(torch.uint8)
    if picture.dtype != torch.uint8:
        raise UserError(f"a picture tensor must be uint8, or float in 0..1, got {picture.dtype}")
    return picture.detach().permute(1, 2, 0).contiguous().cpu().numpy()


def _from_array(picture: np.ndarray) -> np.ndarray:
    channels = picture.shape[2] if picture.ndim == 3 else 1
    if picture.dtype != np.uint8 or picture.ndim not in (2, 3) or channels not in (1, 3, 4) or not picture.size:
        raise UserError(f"a picture array must be uint8 [height, width, 3], got {picture.dtype} {list(picture.shape)}")
    if channels == 3:
        return picture
    return to_rgb(Image.fromarray(picture.reshape(picture.shape[:2]) if channels == 1 else picture))


def _parts(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    rest = iter(items)
    while part := list(islice(rest, size)):
        yield part
