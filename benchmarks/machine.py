"""The machine under the measures: what it is, what it reaches at best, and how much work a function is."""

import functools
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PACKAGES = {"albumentations", "faster-coco-eval", "numpy", "onnxruntime", "opencv-python-headless", "openvino"}
PACKAGES |= {"pillow", "pycocotools", "retinanet", "torch", "torchvision"}
REPEATS = 5  # the best of so many


def header(device: str) -> dict[str, Any]:
    """Hardware, versions, command and time, for the head of a report."""
    is_cuda = torch.device(device).type == "cuda"
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": torch.cuda.get_device_name(device) if is_cuda else _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "versions": {"python": platform.python_version()}
        | {found.name.lower(): found.version for found in distributions() if found.name.lower() in PACKAGES},
        "peaks": peaks(device),
    }


def _processor() -> str:
    try:
        found = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = []
    return found[0] if found else platform.processor() or platform.machine()


@functools.cache
def peaks(device: str) -> dict[str, float]:
    """The best that was seen here: operations a second of matrix products and of convolutions (NHWC, 256 to 256 channels,
    3x3, those of the heads), by dtype, and bytes a second of copying."""
    side, height, width = (1024, 100, 136) if torch.device(device).type == "cpu" else (8192, 400, 544)
    found = {}
    for name, dtype in DTYPES.items():
        matrix = torch.randn(side, side, device=device, dtype=dtype)
        found[f"matmul_{name}"] = 2 * side**3 / _best(functools.partial(torch.mm, matrix, matrix), device)
        image, weight = (
            torch.randn(shape, device=device, dtype=dtype).to(memory_format=torch.channels_last)
            for shape in ((1, 256, height, width), (256, 256, 3, 3))
        )
        call = functools.partial(F.conv2d, image, weight, padding=1)
        found[f"conv_{name}"] = 2 * 256 * 256 * 9 * height * width / _best(call, device)
    block = torch.zeros(2**26, device=device)  # 256 MiB: in no cache
    target = torch.empty_like(block)
    found["copy"] = 2 * block.nbytes / _best(lambda: target.copy_(block), device)
    return found


@torch.inference_mode()
def _best(call: Callable[[], Any], device: str) -> float:
    seconds = []
    for _ in range(REPEATS + 1):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def synchronize(device: str) -> None:
    """Waits for the GPU, which works on while Python goes ahead."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def floor_seconds(flop: float, bytes: float, dtype: str, device: str) -> float | None:
    """The time that this work takes at the measured peaks: arithmetic or memory, whichever takes longer. None without work,
    or without a measured peak of the dtype."""
    if dtype not in DTYPES or not (flop or bytes):
        return None
    best = peaks(device)
    return max(flop / max(best[f"matmul_{dtype}"], best[f"conv_{dtype}"]), bytes / best["copy"])


def count_flop(call: Callable[[], Any]) -> float:
    """Operations of the matrix products and convolutions in a call, backward included; a multiply-add is two."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())
