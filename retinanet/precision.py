"""What this machine computes on, which number format it is fast at, and the autocast that uses it."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from retinanet.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(asked: str | torch.device | None) -> torch.device:
    """`asked`, or for None cuda where there is one, else the CPU. Raises `UserError` for one that is not there."""
    cards = torch.cuda.device_count()
    try:
        device = torch.device(asked or ("cuda" if cards else "cpu"))
    except RuntimeError:
        raise UserError(f"there is no device '{asked}': expected cpu, cuda, cuda:1 ...") from None
    if device.type == "cuda" and (device.index or 0) >= cards:
        raise UserError(f"device {device} is not there: torch {torch.__version__} finds {cards} CUDA device(s)")
    return device


def choose_precision(asked: str, device: torch.device) -> str:
    """`asked`, or for "auto" bf16 where the hardware computes with it, else fp32."""
    if asked not in ("auto", *DTYPES):
        raise UserError(f"there is no precision '{asked}': expected auto, fp32, bf16 or fp16")
    if asked != "auto":
        return asked
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "cpu" and _cpu_has_bf16() else "fp32"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Convolutions in `precision`; fp32 leaves everything as it is."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


def _cpu_has_bf16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
