"""The int8 twin of an ONNX file, by onnxruntime's static quantisation."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
from tqdm import tqdm

from retinanet.data.images import UnreadableImageError, read_image, resize, resized_size
from retinanet.data.loader import Sample, collate
from retinanet.distributed import say
from retinanet.errors import UserError
from retinanet.onnx.export import finish, quiet
from retinanet.onnx.runtime import OnnxHeader, OnnxModel, load_onnx
from retinanet.onnx.sessions import import_onnx

LEAST = 20  # pictures: the ranges seen in fewer are easily too narrow


def quantize_onnx(source: Path, target: Path, pictures: Sequence[Path]) -> None:
    """Writes `target`, which computes the convolutions of `source` in int8: weights by output channel, inputs in the ranges
    that they have in `pictures`. The subnets' last convolutions, and what follows them, stay in floating point.

    Unreadable pictures are named and left out. Raises `UserError` when fewer than `LEAST` remain.
    """
    onnx, quantization = import_onnx("onnx"), import_onnx("onnxruntime.quantization")
    model = load_onnx(source, "cpu", runtime="onnxruntime")
    if model.precision == "int8":
        raise UserError(f"{source} is an int8 file already")
    convolutions = [node for node in onnx.load(source).graph.node if node.op_type == "Conv"]
    feeds = _feeds(model, pictures)
    with TemporaryDirectory(dir=target.parent) as folder, quiet():
        draft = Path(folder, "draft.onnx")
        quantization.quantize_static(
            source,
            draft,
            SimpleNamespace(get_next=lambda: next(feeds, None)),
            op_types_to_quantize=["Conv"],
            nodes_to_exclude=[node.name for node in convolutions if ".final." in node.input[1]],
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            extra_options={"OpTypesToExcludeOutputQuantization": ["Conv"]},  # OpenVINO: 1.15 times as fast (ResNet-50)
        )
        _write(onnx.load(draft), replace(model.header, precision="int8"), target)


def save_ap_loss(path: Path, points: float) -> None:
    """Puts it into an int8 file's header, so that whoever loads the file is told."""
    onnx = import_onnx("onnx")
    proto = onnx.load(path)
    header = OnnxHeader.from_metadata({entry.key: entry.value for entry in proto.metadata_props}, str(path))
    _write(proto, replace(header, ap_loss=round(points, 2)), path)


def _write(proto: Any, header: OnnxHeader, path: Path) -> None:
    finish(proto, header)
    draft = path.with_name(f"{path.name}.part")
    draft.write_bytes(proto.SerializeToString())
    draft.replace(path)


def _feeds(model: OnnxModel, pictures: Sequence[Path]) -> Iterator[dict[str, np.ndarray]]:
    """What the graph is given for each picture."""
    used = 0
    for path in tqdm(pictures, "calibrate", unit="image", leave=False):
        try:
            image = read_image(path)
        except UnreadableImageError as error:
            say(f"warning: left out: {error}")
            continue
        used += 1
        settings, size = model.header.input, (image.shape[0], image.shape[1])
        edges = settings.short_edge, settings.long_edge, settings.size_rounding
        small = resize(image, resized_size(size, *edges, largest=model.input_size))
        batch = collate([Sample.to_look_at(small, size)])
        yield model.feeds(batch.images, batch.image_sizes)
    if used < LEAST:
        raise UserError(f"{used} readable pictures are too few to calibrate on: give {LEAST} or more, better 200")
