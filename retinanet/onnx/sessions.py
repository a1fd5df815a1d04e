"""What runs the graph of an ONNX file: OpenVINO or onnxruntime."""

import importlib
import importlib.util
import threading
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from retinanet.errors import UserError
from retinanet.precision import choose_device

RUNTIMES = ("auto", "openvino", "onnxruntime")
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
THRESHOLD = "score_threshold"  # with NMS in the graph: an input that may be left out


def import_onnx(*names: str) -> Any:
    """Those packages; returns the last. Raises `UserError` with the command that installs what is missing."""
    try:
        return [importlib.import_module(name) for name in names][-1]
    except ImportError as error:
        missing = error.name or names[0]
        cure = " ".join(PACKAGES) if missing in PACKAGES else missing
        raise UserError(f"ONNX needs packages of its own, and {missing} is missing: pip install {cure}") from None


def choose_runtime(asked: str, device: str | torch.device | None) -> tuple[str, torch.device]:
    """`asked`, or for "auto" OpenVINO where it is installed and the CPU computes; and the device, which is for None cuda
    where both torch and onnxruntime have it. Raises `UserError` for what is not there."""
    if asked not in RUNTIMES:
        raise UserError(f"there is no runtime '{asked}': expected {', '.join(RUNTIMES)}")
    chosen = choose_device(device)
    if chosen.type == "cuda" and asked != "openvino":
        if _installed("onnxruntime") and "CUDAExecutionProvider" in import_onnx("onnxruntime").get_available_providers():
            return "onnxruntime", chosen
        if device is not None:
            raise UserError("the installed onnxruntime runs on the CPU only: pip install onnxruntime-gpu, or take --device cpu")
    elif chosen.type == "cuda" and device is not None:
        raise UserError("OpenVINO runs on the CPU only: take --device cpu, or runtime onnxruntime")
    if asked == "auto":
        asked = "openvino" if _installed("openvino") else "onnxruntime"
    return asked, torch.device("cpu")


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def open_session(path: Path, runtime: str, device: torch.device, precision: str) -> Any:
    """An onnxruntime session, or what looks like one. Raises `UserError` for a file that is none."""
    module = import_onnx(runtime)
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except FileNotFoundError:
        raise UserError(f"weights {path} do not exist") from None
    except OSError as error:
        raise UserError(f"weights {path} cannot be read: {error.strerror}") from None
    if empty:
        raise UserError(f"weights {path} are not an ONNX file: the file is empty")
    try:
        return OpenVinoSession(path, precision) if runtime == "openvino" else _onnxruntime_session(module, path, device)
    except Exception as error:  # both have a dozen kinds, none of them public
        raise UserError(f"weights {path} are damaged, or not an ONNX file ({type(error).__name__})") from None


def _onnxruntime_session(onnxruntime: Any, path: Path, device: torch.device) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what goes wrong comes as an exception too
    cuda = [("CUDAExecutionProvider", {"device_id": device.index or 0})] if device.type == "cuda" else []
    return onnxruntime.InferenceSession(str(path), options, providers=[*cuda, "CPUExecutionProvider"])


@cache
def openvino_core() -> Any:
    """The one Core of this process. It is never let go: OpenVINO tells the system to handle signals on memory of its own, which
    it frees with the Core, so that the next Ctrl-C, or the end of a child process, would write into what is not its any more.
    """
    return import_onnx("openvino").Core()


class OpenVinoSession:
    """OpenVINO behind those methods of onnxruntime's `InferenceSession` that are used here, on the CPU."""

    def __init__(self, path: Path, precision: str) -> None:
        model = openvino_core().read_model(path)
        self._metadata = model.get_rt_info("framework").value if model.has_rt_info("framework") else {}
        self._inputs, self._outputs = (list(map(_described, values)) for values in (model.inputs, model.outputs))
        self._defaults = _threshold_as_input(model)
        reduced = precision == "bf16" or self._metadata.get("precision") == '"int8"'  # and what is not int8 in such a file
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "ENABLE_CPU_PINNING": False,  # or every process would sit on the first cores
            "INFERENCE_PRECISION_HINT": "bf16" if reduced and has_bf16() else "f32",  # left to itself it takes bf16
        }
        self._compiled = openvino_core().compile_model(model, "CPU", settings)
        self._lock = threading.Lock()

    def get_inputs(self) -> list[SimpleNamespace]:
        return self._inputs

    def get_outputs(self) -> list[SimpleNamespace]:
        return self._outputs

    def get_modelmeta(self) -> SimpleNamespace:
        return SimpleNamespace(custom_metadata_map=self._metadata)

    def run(self, names: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        with self._lock:  # it has one request for all threads
            found = self._compiled(self._defaults | feeds)
        return [found[name] for name in names]


def has_bf16() -> bool:
    """Whether OpenVINO computes in it on this CPU."""
    return "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _described(value: Any) -> SimpleNamespace:
    shape = [side.get_length() if side.is_static else None for side in value.partial_shape]
    return SimpleNamespace(name=value.any_name, type=value.element_type.to_string(), shape=shape)


def _threshold_as_input(model: Any) -> dict[str, np.ndarray]:
    """Makes the score threshold of a graph with NMS an input, and returns its default: what may be left out OpenVINO takes
    for a constant."""
    from openvino import opset13

    for node in model.get_ops():
        if node.get_type_name() == "NonMaxSuppression":
            threshold = opset13.parameter([1], np.float32, THRESHOLD)
            threshold.output(0).set_names({THRESHOLD})
            default = node.input_value(4).get_node().data
            node.input(4).replace_source_output(threshold.output(0))
            model.add_parameters([threshold])
            return {THRESHOLD: default.reshape(1)}
    return {}
