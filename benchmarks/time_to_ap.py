"""Wall time until the validation AP50 reaches a target: `tools/train.py CONFIG`, then torchvision's model in its reference loop
(fp32, without averaged weights) on the same data, batches, steps, optimizer and schedule.

One run each. Both validate after the same steps, and validation counts for both; Python's start and imports count for ours
alone. The peer is stopped at `limit` times our time: then the ratio is a lower bound.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.reference import evaluate_peer, initial_peer, load, train_peer
from benchmarks.timing import Options, Row
from retinanet.errors import UserError

TRAIN = Path(__file__).parent.parent / "tools" / "train.py"


class Run(NamedTuple):
    reached: bool
    seconds: float  # until then, or until its end
    ap50: float  # the best until then
    step: int


def measure(options: Options) -> list[Row]:
    ours = run_ours(options)
    peer = run_peer(options, options.limit * ours.seconds if ours.reached else float("inf"))
    row = Row("time_to_ap", f"{Path(str(options.config)).stem}, AP50 {options.target:g}", "torchvision fp32", "ours")
    row.seconds, row.peer_seconds = ours.seconds, peer.seconds
    row.differences = {"our AP50": ours.ap50, "at step": ours.step, "the peer's AP50": peer.ap50, "its step": peer.step}
    if ours.reached:
        row.ratio = row.ratio_low = row.ratio_high = peer.seconds / ours.seconds
        row.is_bound = not peer.reached
    for whose, run in (("we have", ours), ("the peer has", peer)):
        if not run.reached:
            told = f"within {run.seconds / ours.seconds:.1f} x our time" if ours.reached else "at the end of the run"
            print(f"{whose} not reached AP50 {options.target:g} {told}: {run.ap50:.3f}")
    return [row]


def run_ours(options: Options) -> Run:
    """The program as a user starts it, stopped as with Ctrl-C when its validation says that the target is reached."""
    start, best, step = time.perf_counter(), 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        settings = [options.config, *options.overrides, f"output_dir={folder}", "--device", options.device]
        command = [sys.executable, *map(str, [TRAIN, *settings])]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                if ": validation AP" in line and best < options.target:
                    seconds = time.perf_counter() - start
                    metrics = json.loads(Path(folder, "metrics.json").read_text(encoding="utf-8"))
                    step, best = metrics["step"], max(best, metrics["AP50"] or 0.0)
                    if best >= options.target:
                        process.terminate()  # it ends its step and saves
    if step == 0 or (process.returncode and best < options.target):
        raise UserError(f"tools/train.py {options.config} ended without a validation, or with an error: see above")
    return Run(best >= options.target, seconds, best, step)


def run_peer(options: Options, limit: float) -> Run:
    """In this process, at most `limit` seconds and the step that is under way then."""
    start, best, step = time.perf_counter(), 0.0, 0
    config, annotations, validation, steps, every = load(options.config, options.overrides)
    peer = initial_peer(config, options.device)
    for step in train_peer(peer, config, annotations, steps, "fp32"):
        seconds = time.perf_counter() - start
        is_over = step == steps or seconds > limit
        if step % every == 0 or is_over:
            best = max(best, evaluate_peer(peer, config, validation, "fp32")["AP50"] or 0.0)
            print(f"torchvision: step {step}: AP50 {100 * best:.1f}", flush=True)
        if is_over or best >= options.target:
            break
    return Run(best >= options.target, time.perf_counter() - start, best, step)
