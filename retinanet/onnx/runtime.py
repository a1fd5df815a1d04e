"""A detector in an ONNX file: what its metadata say, and a runtime in the place of the network."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from retinanet.anchors import STRIDES
from retinanet.boxes import rescale_boxes
from retinanet.config import InputConfig, PostprocessConfig
from retinanet.errors import UserError
from retinanet.onnx.sessions import THRESHOLD, OpenVinoSession, choose_runtime, has_bf16, open_session
from retinanet.postprocess import build_postprocessor
from retinanet.structures import Category, Detections, Predictions, check_names

FORMAT = 1
MARK = "retinanet_format"  # the key by which a file of ours is known
KEYS = {MARK, "class_names", "category_ids", "input", "thresholds", "postprocess", "nms", "strides", "precision", "ap_loss"}
INPUTS = ["images", "image_sizes"]
RAW_OUTPUTS = ["cls_logits", "box_deltas", "anchors"]
NMS_OUTPUTS = ["image_index", "boxes", "scores", "labels"]


@dataclass(frozen=True)
class OnnxHeader:
    """What stands in the file beside the graph. `input`'s mean and std do not: they are in the graph."""

    categories: tuple[Category, ...]
    input: InputConfig
    postprocess: PostprocessConfig
    thresholds: dict[str, float]  # best-F1 score by class name
    nms: bool
    strides: tuple[int, ...] = STRIDES  # of the pyramid's levels
    precision: Literal["fp32", "int8"] = "fp32"
    ap_loss: float | None = None  # of an int8 file, if measured: by how many AP points it is worse than its fp32 twin

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
            "precision": self.precision,
            "ap_loss": self.ap_loss,
        }
        return {key: json.dumps(value, ensure_ascii=False) for key, value in content.items()}

    @classmethod
    def from_metadata(cls, metadata: dict[str, str], where: str) -> "OnnxHeader":
        """Raises `UserError` for a file of another origin, of a newer version, or a damaged one."""
        if MARK not in metadata:
            raise UserError(f"{where} is no detector of this project (it lacks '{MARK}'): make one with tools/export.py")
        try:
            content = {key: json.loads(value) for key, value in metadata.items() if key in KEYS}
            if content[MARK] > FORMAT:
                raise UserError(f"{where} was written by a newer version of this project (format {content[MARK]})")
            names, ids = content["class_names"], content["category_ids"]
            categories = tuple(Category(int(id), str(name)) for id, name in zip(ids, names, strict=True))
            check_names(categories, where)
            return cls(
                categories,
                InputConfig.model_validate(content["input"]),
                PostprocessConfig.model_validate(content["postprocess"]),
                {str(name): float(score) for name, score in content["thresholds"].items()},
                bool(content["nms"]),
                tuple(map(int, content.get("strides", STRIDES))),
                "int8" if content.get("precision", "fp32") == "int8" else "fp32",
                content.get("ap_loss"),
            )
        except (KeyError, TypeError, ValueError, AttributeError, ValidationError) as error:
            raise UserError(f"{where}: its metadata are damaged ({type(error).__name__})") from None


class Found(NamedTuple):
    """What a graph with NMS puts out: sorted by image, then by falling score."""

    image_index: Tensor  # [N] int64
    boxes: Tensor  # [N, 4], in pixels of the resized image
    scores: Tensor  # [N]
    labels: Tensor  # [N] int64


class OnnxModel(nn.Module):
    """A session of onnxruntime or OpenVINO that is called as `RetinaNet` is. `load_onnx` makes one.

    `input_size` is the one (height, width) of a graph of fixed shape, which also takes one image at a time; else None.
    """

    def __init__(self, session: Any, header: OnnxHeader, device: torch.device, precision: str = "fp32") -> None:
        super().__init__()
        self.session, self.header, self.device, self.precision = session, header, device, precision
        self.num_classes = len(header.categories)
        self.score_threshold: float | None = None  # with NMS in the graph; None: the file's own
        height, width = session.get_inputs()[0].shape[2:]
        self.input_size = (height, width) if isinstance(height, int) and isinstance(width, int) else None

    @property
    def description(self) -> str:
        """What computes, in which precision, and what that cost when it was measured."""
        loss = self.header.ap_loss
        cost = "" if loss is None else f" (AP {-loss:+.1f} points against fp32)"
        runtime = "OpenVINO" if isinstance(self.session, OpenVinoSession) else "onnxruntime"
        return f"run by {runtime} in {self.precision}{cost}"

    def forward(self, images: Tensor, image_sizes: Tensor) -> Predictions | Found:
        """`images` uint8 [B, 3, H, W], padded to multiples of 32; `image_sizes` [B, 2] before padding."""
        if self.input_size is None:
            return self._run(images, image_sizes)
        parts = [self._run(*one) for one in zip(images.split(1), image_sizes.split(1), strict=True)]
        if self.header.nms:
            shifted = [part._replace(image_index=part[0] + n) for n, part in enumerate(parts)]
            return Found(*(torch.cat(values) for values in zip(*shifted, strict=True)))
        logits, deltas = (torch.cat([part[n] for part in parts]) for n in (0, 1))
        return parts[0]._replace(cls_logits=logits, box_deltas=deltas)

    def feeds(self, images: Tensor, image_sizes: Tensor) -> dict[str, np.ndarray]:
        """What the graph takes: `images` with more or less padding where it wants them of one size."""
        if self.input_size is not None:
            (height, width), largest = self.input_size, image_sizes.amax(dim=0).tolist()
            if largest[0] > height or largest[1] > width:
                raise UserError(f"the ONNX file takes images up to {height}x{width}, got {largest[0]}x{largest[1]}")
            images = F.pad(images, (0, width - images.shape[-1], 0, height - images.shape[-2]))  # a negative number crops
        return {"images": images.cpu().numpy(), "image_sizes": image_sizes.cpu().numpy()}

    def _run(self, images: Tensor, image_sizes: Tensor) -> Any:
        feeds = self.feeds(images, image_sizes)
        if self.header.nms:
            if self.score_threshold is not None:
                feeds[THRESHOLD] = np.array([self.score_threshold], np.float32)
            outputs = self._outputs(NMS_OUTPUTS, feeds)
            return Found(*(torch.from_numpy(values).to(images.device) for values in outputs))
        outputs = self._outputs(RAW_OUTPUTS, feeds)
        logits, deltas, anchors = (torch.from_numpy(values).to(images.device) for values in outputs)
        height, width = feeds["images"].shape[-2:]
        cells = [-(-height // stride) * -(-width // stride) for stride in self.header.strides]
        per_cell = len(anchors) // sum(cells)
        return Predictions(logits, deltas, anchors, [per_cell * count for count in cells])

    def _outputs(self, names: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        try:
            return self.session.run(names, feeds)
        except Exception as error:  # the runtimes have a dozen kinds, none of them public
            reason = " ".join(str(error).split())[-300:]  # OpenVINO says last what is wrong
            raise UserError(f"the ONNX file fails on images {list(feeds['images'].shape)}: {reason}") from error

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


def load_onnx(
    path: str | Path, device: str | torch.device | None = None, *, runtime: str = "auto", precision: str = "auto"
) -> OnnxModel:
    """A file that `tools/export.py` wrote. Raises `UserError` in one line when it is none, or is damaged.

    `device` None: cuda where both torch and onnxruntime have it, else the CPU. `runtime`: "openvino", "onnxruntime", or
    "auto", OpenVINO where it is installed and the CPU computes. `precision`: "auto" is the file's own, fp32 or int8; with
    OpenVINO an fp32 file may also compute in "bf16".
    """
    name, chosen = choose_runtime(runtime, device)
    session = open_session(Path(path), name, chosen, precision)
    where = f"weights {path}"
    header = OnnxHeader.from_metadata(session.get_modelmeta().custom_metadata_map, where)
    names = [[value.name for value in values] for values in (session.get_inputs(), session.get_outputs())]
    if names != [INPUTS, NMS_OUTPUTS if header.nms else RAW_OUTPUTS]:
        raise UserError(f"{where}: the graph's inputs or outputs are not those that its metadata promise")
    return OnnxModel(session, header, chosen, _precision(precision, header.precision, name, where))


def _precision(asked: str, own: str, runtime: str, where: str) -> str:
    if asked in ("auto", own):
        return own
    if asked == "int8":
        raise UserError(f"{where} compute in fp32: an int8 file comes from tools/export.py --int8 --calibrate PHOTOS")
    if asked != "bf16" or own == "int8":
        raise UserError(f"{where} compute in {own}, not in {asked}")
    if runtime != "openvino":
        raise UserError(f"{where} compute in fp32 with onnxruntime: bf16 takes OpenVINO (pip install openvino)")
    if not has_bf16():
        raise UserError(f"{where}: this CPU does not compute in bf16, take precision fp32")
    return asked
