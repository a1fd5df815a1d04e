"""What differs between one process and many (torchrun), in one place. With one process every function is a no-op."""

import importlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from retinanet.errors import printable
from retinanet.precision import choose_device

Result = TypeVar("Result")
COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # longer than any validation of one rank while the others wait


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def say(message: str) -> None:
    """Prints once, whatever the number of ranks."""
    if is_main():
        print(printable(message), flush=True)


@contextmanager
def process_group(device: str | None = None) -> Iterator[torch.device]:
    """Joins the ranks that torchrun started, if it did; yields this rank's device and leaves the group at the end."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = choose_device(device)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", local_rank if chosen.index is None else chosen.index)
        torch.cuda.set_device(chosen)
    if "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1:
        # DDP imports it, and imported while a group exists, it keeps that group for ever: gloo's threads then outlive the
        # interpreter, and can abort the process at its end.
        importlib.import_module("torch._dynamo")
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        store, number, size = next(dist.rendezvous("env://"))
        start = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')} with {size}"
        store = dist.PrefixStore(start, store)  # torchrun's outlives a restart, and gloo would find the dead ranks in it
        dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=COLLECTIVE_TIMEOUT)
    try:
        yield chosen
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of `value` over all ranks, on every rank; in place."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def gather_to_main(value: Any) -> list[Any]:
    """Every rank's `value`, in order of rank, on rank 0; an empty list elsewhere. Any picklable object."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.gather_object(value, gathered if is_main() else None)
    return gathered if is_main() else []


def share_from_main(value: Any) -> Any:
    """Rank 0's `value` on every rank."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def copy_from_main(tensors: Iterable[Tensor]) -> None:
    """Rank 0's values in the tensors of all ranks; in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def main_first(action: Callable[[], Result]) -> Result:
    """`action` on rank 0, then on the others, which find what it left on the disk. All ranks must call this."""
    result = action() if is_main() else None
    share_from_main(None)
    return action() if result is None else result
