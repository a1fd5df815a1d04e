"""Tiny training runs in processes of their own: started, watched, compared."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import REPOSITORY

from faults import child
from faults.child import Fault
from retinanet.checkpoint import Checkpoint, load_checkpoint
from retinanet.config import parse_config, save_config

STEPS = 12
LIMIT = 240  # seconds after which a process counts as hung: a run takes two to ten
KILLED = -signal.SIGKILL

# Processes are forked from one that has everything imported: a run takes two seconds instead of seven.
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["retinanet.training", "retinanet.evaluation.run", "torch.utils.tensorboard", "albumentations"])


@dataclass(frozen=True)
class Ended:
    """A process that came to its end."""

    code: int
    log: str

    def lines(self, *words: str) -> list[str]:
        """Those of the log that hold all `words`."""
        return [line for line in self.log.splitlines() if all(word in line for word in words)]


@dataclass(frozen=True)
class Run:
    """A run of `tools/train.py CONFIG`, in `folder`; with two ranks under torchrun."""

    config: Path
    folder: Path
    ranks: int = 1

    def start(self, *faults: Fault, resume: bool = True, options: tuple[str, ...] = (), restarts: int = 0) -> Ended:
        """Waits for the end of one start, in which `faults` happen. There is never a traceback."""
        arguments = [str(REPOSITORY / "tools" / "train.py"), str(self.config), f"output_dir={self.folder}", *options]
        arguments += ["--resume"] if resume else []
        with tempfile.NamedTemporaryFile(suffix=".log") as file:  # elsewhere than the run, whose disk may be full
            log = Path(file.name)
            code = self._alone(arguments, faults, log) if self.ranks == 1 else self._torchrun(arguments, faults, log, restarts)
            ended = Ended(code, log.read_text(errors="replace"))
        # What a killed process leaves behind complains of the connection that broke; that is Python's, and nobody's mistake.
        orphans = ended.log.count("resource_sharer.py") if any(fault.action == "kill" for fault in faults) else 0
        assert ended.log.count("Traceback") <= orphans, ended.log
        return ended

    def finish(self) -> Ended:
        """Goes on to the end."""
        ended = self.start()
        assert ended.code == 0, ended.log
        assert ended.lines("finished: ") or ended.lines("this run is finished"), ended.log
        return ended

    def load(self, name: str = "last.pt") -> Checkpoint:
        return load_checkpoint(self.folder / name)

    def _alone(self, arguments: list[str], faults: tuple[Fault, ...], log: Path) -> int:
        process = _server.Process(target=child.run, args=(arguments, list(faults), str(log)))
        process.start()
        process.join(LIMIT)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise AssertionError(f"no end after {LIMIT} seconds: {log.read_text(errors='replace')}")
        return process.exitcode

    def _torchrun(self, arguments: list[str], faults: tuple[Fault, ...], log: Path, restarts: int) -> int:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.ranks}"]
        environment = {"FAULTS": child.dumps(faults), "FAULT_LOG": str(log), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [*launcher, f"--max-restarts={restarts}", child.__file__, *arguments],
            env={**os.environ, **environment, "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # torchrun's own report of a rank that failed is a traceback by intent
        )
        try:
            return process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun takes its ranks along
            process.wait(60)
            raise AssertionError(f"no end after {LIMIT} seconds: {log.read_text(errors='replace')}") from None


def write_config(folder: Path, data: dict[str, str], workers: int = 1) -> Path:
    """Twelve steps on images of 64 pixels: saved every two, validated every six; everything is trained and averaged."""
    config = {
        "model": {
            "backbone": "resnet18",
            "backbone_weights": "none",
            "norm": "batch",
            "freeze_stages": 0,
            "fpn_channels": 8,
            "head_convs": 0,
            "anchors": {"sizes": [16, 32, 64, 128, 256], "scales": [1.0], "ratios": [1.0]},
        },
        "input": {"short_edge": 64, "long_edge": 96},
        "data": {"train": data, "val": data, "workers": workers},
        "train": {
            "batch_size": 2,
            "max_steps": STEPS,
            "precision": "fp32",
            "optimizer": "adamw",
            "learning_rate": 1e-3,
            "ema_decay": 0.9,
            "save_every_steps": 2,
            "validate_every_steps": 6,
            "log_every_steps": 1,
        },
        "seed": 3,
    }
    save_config(parse_config(config), folder / "config.yaml")
    return folder / "config.yaml"


def assert_same_run(run: Run, whole: Run) -> None:
    """Both ended in the same state, to the last bit: weights, averages, optimizer, schedule, random numbers, metrics."""
    for name in ("last.pt", "best.pt"):
        assert_same(content(run.load(name)), content(whole.load(name)), name)
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (run.folder, whole.folder)]
    assert metrics[0] == metrics[1]


def assert_same_weights(run: Run, whole: Run) -> None:
    """The same training, whatever could be written down of it."""
    ours, theirs = (content(one.load()) for one in (run, whole))
    for key in ("model", "ema"):
        assert_same(ours[key], theirs[key], key)
    assert_same(ours["training"]["optimizer"], theirs["training"]["optimizer"], "optimizer")


def content(checkpoint: Checkpoint) -> dict[str, Any]:
    """All of it but what two runs may differ in: their folder, and the time that they took."""
    training = {key: value for key, value in (checkpoint.training or {}).items() if key != "minutes"}
    return {
        "categories": checkpoint.categories,
        "model": checkpoint.model,
        "ema": checkpoint.ema,
        "thresholds": checkpoint.thresholds,
        "training": training,
    }


def assert_same(a: Any, b: Any, where: str = "content") -> None:
    """Bitwise the same tensors at the same places of the same containers."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key, value in a.items():
            assert_same(value, b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for n, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}[{n}]")
    elif isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), where
        assert torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)), where
    else:
        assert a == b, where
