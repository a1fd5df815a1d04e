"""What runs in the process under test: a tool as its command line starts it, on a narrow backbone, with faults laid out.

Started by `faults.runs`, or as a script by torchrun: `child.py tools/train.py ARGUMENTS` with the faults in $FAULTS.
"""

import json
import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

NARROW = 8  # times fewer channels: a checkpoint of 3 MB instead of 180, so that a run is bound by neither disk nor compute


@dataclass(frozen=True)
class Fault:
    """`action`, a function below, at a moment: in step `step` of this process (from 0), before its backward pass, or just
    before the `file`-th time that this process opens a file of `folder` for writing, renames or removes one there."""

    action: str
    step: int = -1
    file: int = -1
    folder: str = ""
    delay: float = 0.0  # seconds from that moment, in which the process goes on
    path: str = ""  # the file or folder that `action` is about
    steps: int = 1  # `action` comes in so many steps in a row
    rank: int = 0

    def due(self, step: int) -> bool:
        return self.step <= step < self.step + self.steps


def kill(_: Fault) -> None:
    """This process, at once; under torchrun the whole group, its agent first."""
    agent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
    ranks = [] if agent is None else Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    for process in [agent, *(int(number) for number in ranks if int(number) != os.getpid()), os.getpid()]:
        if process is not None:
            os.kill(process, signal.SIGKILL)


def kill_rank(_: Fault) -> None:
    """This rank alone, and only in the life of the group that no restart began."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        os.kill(os.getpid(), signal.SIGKILL)


def kill_loader(_: Fault) -> None:
    for process in multiprocessing.active_children():
        process.kill()


def terminate(_: Fault) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt(_: Fault) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def delete(fault: Fault) -> None:
    Path(fault.path).unlink()


def garble(fault: Fault) -> None:
    Path(fault.path).write_bytes(b"no picture any more")


def fill_disk(fault: Fault) -> None:
    """Until the last byte. A later call with the same path finds the disk as full as it was."""
    with Path(fault.path).open("ab", buffering=0) as file:
        try:
            for size in (1 << 16, 1):
                while file.write(b"\0" * size):
                    pass
        except OSError:
            pass


def small_files_only(_: Fault) -> None:
    """No file may grow beyond 64 kB: writing fails as on a full disk, with another number (EFBIG)."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))


def make_immutable(fault: Fault) -> None:
    """A folder in which no file can be made, renamed or removed, not even by root."""
    subprocess.run(["chattr", "+i", fault.path], check=True)


DONE_TO_IT = (kill, kill_rank, kill_loader, terminate, interrupt)
DONE_TO_FILES = (delete, garble, fill_disk, small_files_only, make_immutable)
ACTIONS = {action.__name__: action for action in (*DONE_TO_IT, *DONE_TO_FILES)}
# Beside them "poison", a loss that is not a number, and "slow", a reader of images that sleeps for `delay`.


def run(arguments: list[str], faults: list[Fault], log: str) -> None:
    """`python ARGUMENTS`, with stdout and stderr in the file `log`. Does not return."""
    with Path(log).open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if multiprocessing.parent_process() is not None:  # a child of the fork server would have its loaders start from there
        multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    narrow_backbone()
    faults = [fault for fault in faults if fault.rank == int(os.environ.get("RANK", "0"))]
    _watch_files([fault for fault in faults if fault.file >= 0])
    _watch_steps([fault for fault in faults if fault.step >= 0])
    _slow_reader(next((fault.delay for fault in faults if fault.action == "slow"), 0.0))
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


def _act(fault: Fault) -> None:
    if fault.delay:
        timer = threading.Timer(fault.delay, ACTIONS[fault.action], [fault])
        timer.daemon = True
        timer.start()
    else:
        ACTIONS[fault.action](fault)


def _watch_steps(faults: list[Fault]) -> None:
    from retinanet.criterion import LossSums, RetinaNetLoss

    sums, step = RetinaNetLoss.sums, -1

    def watched(self: RetinaNetLoss, *args: Any) -> LossSums:
        nonlocal step
        losses = sums(self, *args)
        if not torch.is_grad_enabled():
            return losses  # validation
        step += 1
        for fault in faults:
            if fault.due(step) and fault.action == "poison":
                losses = losses._replace(loss_cls=losses.loss_cls * float("nan"))
            elif fault.due(step):
                _act(fault)
        return losses

    RetinaNetLoss.sums = watched  # type: ignore[method-assign]


def _watch_files(faults: list[Fault]) -> None:
    """Python tells an audit hook of every file before it touches it."""
    main, count = os.getpid(), 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        changes = event in ("os.rename", "os.remove") or (event == "open" and isinstance(args[1], str) and args[1][0] in "wxa")
        if not faults or not changes or os.getpid() != main or not str(args[0]).startswith(faults[0].folder):
            return
        count += 1
        for fault in faults:
            if fault.file == count - 1:
                _act(fault)

    sys.addaudithook(hook)


def _slow_reader(seconds: float) -> None:
    from retinanet.data import loader

    read_image = loader.read_image

    def slow(*args: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return read_image(*args, **options)

    loader.read_image = slow


def narrow_backbone() -> None:
    """torchvision's ResNet-18 with `NARROW` times fewer channels in each stage."""
    import torchvision
    from torchvision.models.resnet import BasicBlock, ResNet

    class Narrow(ResNet):
        def _make_layer(self, block: Any, planes: int, *args: Any, **options: Any) -> Any:
            return super()._make_layer(block, planes // NARROW, *args, **options)

    def narrow(weights: None = None, norm_layer: Any = None) -> Narrow:
        assert weights is None
        return Narrow(BasicBlock, [2, 2, 2, 2], norm_layer=norm_layer)

    torchvision.models.resnet18 = narrow


def dumps(faults: tuple[Fault, ...]) -> str:
    return json.dumps([asdict(fault) for fault in faults])


if __name__ == "__main__":
    run(sys.argv[1:], [replace(Fault(""), **fault) for fault in json.loads(os.environ["FAULTS"])], os.environ["FAULT_LOG"])
