"""What torch's allocators, loaders and collectives raise, as one line."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from retinanet.config import Config
from retinanet.errors import RunError, UserError

ALLOCATOR = "can't allocate memory"  # of the CPU: a plain RuntimeError
COLLECTIVES = ("gloo", "NCCL", "closed by peer", "reset by peer", "Broken pipe", "Socket")  # DDP's are RuntimeErrors too
WAITED = ("Timed out waiting", "timed out", "timeout")


class LostRanksError(RunError):
    """Another rank ended, or never came."""


@contextmanager
def explained(config: Config) -> Iterator[None]:
    """Turns such an error inside into a `UserError` (memory: the same would happen again) or a `RunError`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        message = " ".join(str(error).split())
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or ALLOCATOR in message:
            raise UserError(f"out of memory ({message[:120] or 'MemoryError'}); {memory_advice(config)}") from error
        if "DataLoader timed out" in message:
            raise RunError(f"{message} waiting for images: is the disk or the network that holds them stuck?") from error
        many = int(os.environ.get("WORLD_SIZE", "1")) > 1
        if isinstance(error, dist.DistError) or (many and any(sign in message for sign in COLLECTIVES)):
            raise LostRanksError(_lost_ranks(message)) from error
        raise


def memory_advice(config: Config) -> str:
    """The settings that save memory, with their present values and about what each would save."""
    train, model = config.train, config.model
    edges = config.augment.short_edges
    key, edge = ("augment.short_edges up to", max(edges)) if edges else ("input.short_edge", config.input.short_edge)
    smaller = max(32, round(0.8 * edge / 32) * 32)
    advice = []
    if train.accumulate_steps < train.batch_size:
        advice.append(f"train.accumulate_steps {train.accumulate_steps} -> {2 * train.accumulate_steps} (half, same results)")
    if train.batch_size > 1:
        advice.append(f"train.batch_size {train.batch_size} -> {train.batch_size // 2} (half)")
    advice.append(f"{key} {edge} -> {smaller} ({1 - (smaller / edge) ** 2:.0%} less)")
    if train.precision in ("fp32", "auto"):
        advice.append(f"train.precision {train.precision} -> bf16 (half, if it is fp32 now)")
    if model.freeze_stages < 5:
        advice.append(f"model.freeze_stages {model.freeze_stages} -> {model.freeze_stages + 1} (those of one stage more)")
    return (
        f"most of it are activations, and these save of them about: {'; '.join(advice)}. "
        f"In a validation: evaluation.batch_size {config.evaluation.batch_size}"
    )


def _lost_ranks(message: str) -> str:
    who = f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}"
    if any(sign in message for sign in WAITED):
        return (
            f"{who} waited for the other ranks in vain ({message[:160]}): one of them is stuck or "
            "gone; see what each printed last, and where it is with py-spy dump --pid"
        )
    return f"{who} lost the other ranks ({message[:160]}): one of them ended; its own error, above or on its machine, says why"
