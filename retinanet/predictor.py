"""The front door for inference: a checkpoint in, pictures in, detections out."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from retinanet.checkpoint import Checkpoint
from retinanet.config import InputConfig, PostprocessConfig
from retinanet.data.images import read_image, resize, resized_size, to_rgb
from retinanet.data.loader import Sample, collate
from retinanet.errors import UserError
from retinanet.inference import detect_batches
from retinanet.model import RetinaNet
from retinanet.onnx.runtime import OnnxModel, load_onnx
from retinanet.postprocess import build_postprocessor
from retinanet.precision import choose_device, choose_precision
from retinanet.structures import Category, Detections, Target
from retinanet.weights.zoo import load_weights

Picture = str | Path | Image.Image | np.ndarray | Tensor
DEFAULT_SCORE = 0.5


class Predictor:
    """A trained detector, ready to use.

    `score_threshold`: None takes the checkpoint's best threshold of each class (0.5 for a class without one).
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
    ) -> None:
        if score_threshold is not None and not 0 <= score_threshold <= 1:
            raise UserError(f"the score threshold must lie in 0..1, got {score_threshold:g}")
        if len(categories) != model.num_classes:
            raise UserError(f"the model has {model.num_classes} classes, but {len(categories)} categories are given")
        self.device = choose_device(device)
        self.precision = choose_precision(precision, self.device)
        self.model = model.eval().to(self.device).to(memory_format=torch.channels_last)
        self.input = input or InputConfig()
        self.categories = tuple(categories)
        postprocess = postprocess or PostprocessConfig()
        known = thresholds or {}
        if score_threshold is None:
            limits = [known.get(category.name, DEFAULT_SCORE) for category in categories]
        else:
            limits = [score_threshold] * len(self.categories)
            postprocess = postprocess.model_copy(update={"score_threshold": min(postprocess.score_threshold, score_threshold)})
        self.thresholds = torch.tensor(limits)  # [K]
        if isinstance(model, OnnxModel):
            self._largest, self._postprocess = model.input_size, model.postprocessor(postprocess, self.categories)
        else:
            self._largest, self._postprocess = None, build_postprocessor(postprocess, self.categories)

    @classmethod
    def load(
        cls,
        weights: str | Path,
        *,
        device: str | torch.device | None = None,
        score_threshold: float | None = None,
        precision: str = "auto",
    ) -> "Predictor":
        """From the path of a checkpoint or of an ONNX file (.onnx), or a name of the zoo. Raises `UserError` when it cannot
        be had."""
        if Path(weights).suffix.lower() == ".onnx":
            return cls.from_onnx(load_onnx(weights, device), score_threshold=score_threshold, precision=precision)
        return cls.from_checkpoint(load_weights(weights), device=device, score_threshold=score_threshold, precision=precision)

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
    def from_onnx(cls, model: OnnxModel, *, score_threshold: float | None = None, precision: str = "auto") -> "Predictor":
        if precision not in ("auto", "fp32"):
            raise UserError(f"an ONNX file computes in fp32, not in {precision}")
        header = model.header
        return cls(
            model,
            header.categories,
            input=header.input,
            postprocess=header.postprocess,
            thresholds=header.thresholds,
            score_threshold=score_threshold,
            device=model.device,
            precision="fp32",
        )

    @overload
    def __call__(self, images: Picture, batch_size: int = 8) -> Detections: ...
    @overload
    def __call__(self, images: list[Picture], batch_size: int = 8) -> list[Detections]: ...
    def __call__(self, images: Picture | list[Picture], batch_size: int = 8) -> Detections | list[Detections]:
        """Objects in a picture, or in each of a list: a path, PIL image, RGB array [H, W, 3] uint8 or tensor [3, H, W]
        (uint8, or float in 0..1). Boxes are in pixels of the picture, upright. Raises `UnreadableImageError`."""
        if isinstance(images, list):
            return list(self.stream((to_array(image) for image in images), batch_size))
        return next(self.stream([to_array(images)], 1))

    def stream(self, images: Iterable[np.ndarray], batch_size: int = 8) -> Iterator[Detections]:
        """Detections of RGB uint8 arrays [H, W, 3], one after the other, `batch_size` of them in a forward."""
        if batch_size < 1:
            raise UserError(f"the batch size must be at least 1, got {batch_size}")
        return self._stream(images, batch_size)

    def _stream(self, images: Iterable[np.ndarray], batch_size: int) -> Iterator[Detections]:
        batches = (collate([self._sample(image) for image in part]) for part in _parts(images, batch_size))
        for _, detections, _ in detect_batches(
            self.model, batches, self._postprocess, device=self.device, precision=self.precision
        ):
            yield from (found.above(self.thresholds) for found in detections)

    def _sample(self, image: np.ndarray) -> Sample:
        size = (image.shape[0], image.shape[1])
        edges = self.input.short_edge, self.input.long_edge, self.input.size_rounding
        small = resize(image, resized_size(size, *edges, largest=self._largest))
        nothing = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
        return Sample(small, nothing, size, "", [])


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


def _parts(items: Iterable[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    part: list[np.ndarray] = []
    for item in items:
        part.append(item)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part
