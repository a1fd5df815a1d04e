"""A detector in an ONNX file: what its metadata say, and onnxruntime in the place of the network."""

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from retinanet.anchors import STRIDES
from retinanet.boxes import rescale_boxes
from retinanet.config import InputConfig, PostprocessConfig
from retinanet.errors import UserError
from retinanet.postprocess import build_postprocessor
from retinanet.precision import choose_device
from retinanet.structures import Category, Detections, Predictions

FORMAT = 1
MARK = "retinanet_format"  # the key by which a file of ours is known
INPUTS = ["images", "image_sizes"]
RAW_OUTPUTS = ["cls_logits", "box_deltas", "anchors"]
NMS_OUTPUTS = ["image_index", "boxes", "scores", "labels"]
THRESHOLD = "score_threshold"  # with NMS in the graph: an input that may be left out
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def import_onnx(*names: str) -> Any:
    """Those of `PACKAGES`, a tuple if several. Raises `UserError` with the command that installs what is missing."""
    try:
        modules = tuple(importlib.import_module(name) for name in names)
    except ImportError as error:
        missing = f"{error.name or names[0]} is missing"
        raise UserError(f"ONNX needs packages of its own, and {missing}: pip install {' '.join(PACKAGES)}") from None
    return modules if len(modules) > 1 else modules[0]


@dataclass(frozen=True)
class OnnxHeader:
    """What stands in the file beside the graph. `input`'s mean and std do not: they are in the graph."""

    categories: tuple[Category, ...]
    input: InputConfig
    postprocess: PostprocessConfig
    thresholds: dict[str, float]  # best-F1 score by class name
    nms: bool
    strides: tuple[int, ...] = STRIDES  # of the pyramid's levels

    def to_metadata(self) -> dict[str, str]:
        """JSON by key, for `metadata_props`."""
        content = {
            MARK: FORMAT,
            "class_names": [category.name for category in self.categories],
            "category_ids": [category.id for category in self.categories],
            "input": self.input.model_dump(mode="json", exclude={"mean", "std"}),
            "thresholds": self.thresholds,
            "postprocess": self.postprocess.model_dump(mode="json"),
            "nms": self.nms,
            "strides": self.strides,
        }
        return {key: json.dumps(value, ensure_ascii=False) for key, value in content.items()}

    @classmethod
    def from_metadata(cls, metadata: dict[str, str], where: str) -> "OnnxHeader":
        """Raises `UserError` for a file of another origin, of a newer version, or a damaged one."""
        if MARK not in metadata:
            raise UserError(f"{where} is no detector of this project (it lacks '{MARK}'): make one with tools/export.py")
        try:
            content = {key: json.loads(value) for key, value in metadata.items() if key in cls._keys()}
            if content[MARK] > FORMAT:
                raise UserError(f"{where} was written by a newer version of this project (format {content[MARK]})")
            names, ids = content["class_names"], content["category_ids"]
            return cls(
                tuple(Category(int(id), str(name)) for id, name in zip(ids, names, strict=True)),
                InputConfig.model_validate(content["input"]),
                PostprocessConfig.model_validate(content["postprocess"]),
                {str(name): float(score) for name, score in content["thresholds"].items()},
                bool(content["nms"]),
                tuple(map(int, content.get("strides", STRIDES))),
            )
        except (KeyError, TypeError, ValueError, AttributeError, ValidationError) as error:
            raise UserError(f"{where}: its metadata are damaged ({type(error).__name__})") from None

    @staticmethod
    def _keys() -> set[str]:
        return {MARK, "class_names", "category_ids", "input", "thresholds", "postprocess", "nms", "strides"}


class Found(NamedTuple):
    """What a graph with NMS puts out: sorted by image, then by falling score."""

    image_index: Tensor  # [N] int64
    boxes: Tensor  # [N, 4], in pixels of the resized image
    scores: Tensor  # [N]
    labels: Tensor  # [N] int64


class OnnxModel(nn.Module):
    """An onnxruntime session that is called as `RetinaNet` is. `load_onnx` makes one.

    `input_size` is the one (height, width) of a graph of fixed shape, which also takes one image at a time; else None.
    """

    def __init__(self, session: Any, header: OnnxHeader, device: torch.device) -> None:
        super().__init__()
        self.session, self.header, self.device = session, header, device
        self.num_classes = len(header.categories)
        self.score_threshold: float | None = None  # with NMS in the graph; None: the file's own
        height, width = session.get_inputs()[0].shape[2:]
        self.input_size = (height, width) if isinstance(height, int) and isinstance(width, int) else None

    def forward(self, images: Tensor, image_sizes: Tensor) -> Predictions | Found:
        """`images` uint8 [B, 3, H, W], padded to multiples of 32; `image_sizes` [B, 2] before padding."""
        if self.input_size is None:
            return self._run(images, image_sizes)
        images = self._padded(images, image_sizes)
        parts = [self._run(*one) for one in zip(images.split(1), image_sizes.split(1), strict=True)]
        if self.header.nms:
            shifted = [part._replace(image_index=part[0] + n) for n, part in enumerate(parts)]
            return Found(*(torch.cat(values) for values in zip(*shifted, strict=True)))
        logits, deltas = (torch.cat([part[n] for part in parts]) for n in (0, 1))
        return parts[0]._replace(cls_logits=logits, box_deltas=deltas)

    def _padded(self, images: Tensor, image_sizes: Tensor) -> Tensor:
        """`images` with more or less padding, as large as the graph wants them."""
        assert self.input_size is not None
        (height, width), largest = self.input_size, image_sizes.amax(dim=0).tolist()
        if largest[0] > height or largest[1] > width:
            raise UserError(f"the ONNX file takes images up to {height}x{width}, got {largest[0]}x{largest[1]}")
        return F.pad(images, (0, width - images.shape[-1], 0, height - images.shape[-2]))  # a negative number crops

    def _run(self, images: Tensor, image_sizes: Tensor) -> Any:
        feeds = {"images": images.cpu().numpy(), "image_sizes": image_sizes.cpu().numpy()}
        if self.header.nms:
            if self.score_threshold is not None:
                feeds[THRESHOLD] = np.array([self.score_threshold], np.float32)
            outputs = self._outputs(NMS_OUTPUTS, feeds)
            return Found(*(torch.from_numpy(values).to(images.device) for values in outputs))
        outputs = self._outputs(RAW_OUTPUTS, feeds)
        logits, deltas, anchors = (torch.from_numpy(values).to(images.device) for values in outputs)
        cells = [-(-images.shape[-2] // stride) * -(-images.shape[-1] // stride) for stride in self.header.strides]
        per_cell = len(anchors) // sum(cells)
        return Predictions(logits, deltas, anchors, [per_cell * count for count in cells])

    def _outputs(self, names: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        try:
            return self.session.run(names, feeds)
        except Exception as error:  # onnxruntime has a dozen kinds, none of them public
            first = str(error).strip().splitlines()[0][:300]
            raise UserError(f"the ONNX file fails on images {list(feeds['images'].shape)}: {first}") from error

    def postprocessor(self, config: PostprocessConfig, categories: Sequence[Category]) -> Callable[..., list[Detections]]:
        """What is left to do to the outputs. With NMS in the graph nothing but the score threshold can be changed."""
        own = self.header.postprocess
        if not self.header.nms:
            return build_postprocessor(config, categories)
        if config.model_copy(update={THRESHOLD: own.score_threshold}) != own:
            raise UserError("this ONNX file has its NMS inside, with settings of its own: export it without --nms")
        self.score_threshold = config.score_threshold
        return Parting(categories)


class Parting:
    """The images' detections apart, in pixels of the originals: all that is left when NMS is in the graph."""

    def __init__(self, categories: Sequence[Category]) -> None:
        self.categories = tuple(categories)

    def __call__(self, found: Found, image_sizes: Tensor, original_sizes: Tensor | None = None) -> list[Detections]:
        originals = image_sizes if original_sizes is None else original_sizes
        detections = []
        for n, (size, original) in enumerate(zip(image_sizes.tolist(), originals.tolist(), strict=True)):
            mine = found.image_index == n
            boxes = rescale_boxes(found.boxes[mine], tuple(size), tuple(original))
            detections.append(Detections(boxes, found.scores[mine], found.labels[mine], self.categories))
        return detections


def load_onnx(path: str | Path, device: str | torch.device | None = None) -> OnnxModel:
    """A file that `tools/export.py` wrote. Raises `UserError` in one line when it is none, or is damaged.

    `device` None: cuda where both torch and onnxruntime have it, else the CPU.
    """
    runtime = import_onnx("onnxruntime")
    chosen = choose_device(device)
    if chosen.type == "cuda" and "CUDAExecutionProvider" not in runtime.get_available_providers():
        if device is not None:
            raise UserError("the installed onnxruntime runs on the CPU only: pip install onnxruntime-gpu, or take --device cpu")
        chosen = torch.device("cpu")
    session = _session(runtime, Path(path), chosen)
    header = OnnxHeader.from_metadata(session.get_modelmeta().custom_metadata_map, f"weights {path}")
    names = [[value.name for value in values] for values in (session.get_inputs(), session.get_outputs())]
    if names != [INPUTS, NMS_OUTPUTS if header.nms else RAW_OUTPUTS]:
        raise UserError(f"weights {path}: the graph's inputs or outputs are not those that its metadata promise")
    return OnnxModel(session, header, chosen)


def _session(runtime: Any, path: Path, device: torch.device) -> Any:
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except FileNotFoundError:
        raise UserError(f"weights {path} do not exist") from None
    except OSError as error:
        raise UserError(f"weights {path} cannot be read: {error.strerror}") from None
    if empty:
        raise UserError(f"weights {path} are not an ONNX file: the file is empty")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what goes wrong comes as an exception too
    cuda = [("CUDAExecutionProvider", {"device_id": device.index or 0})] if device.type == "cuda" else []
    try:
        return runtime.InferenceSession(str(path), options, providers=[*cuda, "CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a dozen kinds, none of them public
        raise UserError(f"weights {path} are damaged, or not an ONNX file ({type(error).__name__})") from None
