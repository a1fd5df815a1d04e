"""The core that all measures share: variants timed in turns, peak memory in a process of its own, one row a comparison.

Times on shared machines drift by a factor of two. Every variant is therefore called once in each round, and what counts is
the ratio of two times of the same round.
"""

import ctypes
import gc
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.machine import count_flop, floor_seconds, synchronize
from retinanet.errors import UserError

MIB = 2**20


@dataclass(frozen=True)
class Options:
    """What the command line says. None and () leave the choice to the measure."""

    rounds: int | None = None
    device: str = "cpu"
    sizes: tuple[int, ...] = ()
    backbone: str | None = None
    memory: bool = True  # measure peak memory too, in processes of their own
    config: str | None = None  # the last four: of time_to_ap and accuracy
    overrides: tuple[str, ...] = ()
    target: float = 0.85
    limit: float = 5.0


@dataclass
class Case:
    """Variants that do the same work. Each builds the function that is timed, or raises `UserError` if it cannot be had."""

    name: str
    variants: dict[str, Callable[[], Callable[[], Any]]]
    compare: Callable[[Any, Any], dict[str, float]]  # the peer's first result and ours
    peers: int = 1  # so many of the variants, the first ones, are the peer's
    images: int = 0  # in a call, where images a second mean something
    dtypes: dict[str, str] = field(default_factory=dict)  # of variants that do not compute in fp32
    flop_of: str = ""  # the variant whose operations are counted, for the floor
    bytes: float = 0.0  # that have to be moved at least
    threads: int | None = None  # of torch; None: as they are
    warmup: int = 1


@dataclass
class Row:
    """One of our variants against a peer. `ratio` is peer / ours by time: above 1 ours is faster."""

    measure: str
    case: str
    peer: str
    variant: str
    images: int = 0  # in a call
    peer_seconds: float | None = None  # of a call, medians
    seconds: float | None = None
    ratio: float | None = None  # median of the ratios of each round, with its quartiles
    ratio_low: float | None = None
    ratio_high: float | None = None
    is_bound: bool = False  # the peer was stopped: the true ratio is larger
    peer_mib: float | None = None  # peak memory, see `peak_memory`
    mib: float | None = None
    gflop: float | None = None
    floor_seconds: float | None = None  # what this machine needs at its measured peak
    differences: dict[str, float] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=dict)


def interleaved(
    functions: dict[str, Callable[[], Any]], rounds: int, warmup: int = 1, device: str = "cpu"
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of each function in each round, and what its first call returned. Every round begins with another one."""
    names = list(functions)
    times: dict[str, list[float]] = {name: [] for name in names}
    first: dict[str, Any] = {}
    for number in tqdm(range(-warmup, rounds), desc="rounds", leave=False, disable=None):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            synchronize(device)
            start = time.perf_counter()
            result = functions[name]()
            synchronize(device)
            seconds = time.perf_counter() - start
            first.setdefault(name, result)
            if number >= 0:
                times[name].append(seconds)
    return times, first


def summarize(row: Row, peer: Sequence[float], ours: Sequence[float]) -> Row:
    """Fills in medians and ratios from the seconds of the rounds, in the same order."""
    row.peer_seconds, row.seconds = float(np.median(peer)), float(np.median(ours))
    row.ratio_low, row.ratio, row.ratio_high = np.percentile(np.divide(peer, ours), (25, 50, 75)).tolist()
    row.times = {row.peer: list(peer), row.variant: list(ours)}
    return row


def measured(measure: str, options: Options) -> list[Row]:
    """The rows of the module `measure`."""
    module = import_module(f"benchmarks.{measure}")
    return run_cases(measure, options) if hasattr(module, "cases") else module.measure(options)


def measured_apart(measure: str, options: Options) -> list[Row]:
    """The rows of a measure, taken in a process of its own: what one leaves in the allocator changes the times of the next
    (memory that is there already costs nothing, and fresh pages half of some calls)."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measured, measure, options).result()


def run_cases(measure: str, options: Options) -> list[Row]:
    """Rows of each of our variants against each peer, for the cases of the module `measure`."""
    module, rows = import_module(f"benchmarks.{measure}"), []
    for index, case in enumerate(module.cases(options)):
        print(f"{measure}: {case.name}", flush=True)
        threads = torch.get_num_threads()
        torch.set_num_threads(case.threads or threads)
        functions = build(case)
        times, results = interleaved(functions, options.rounds or module.ROUNDS, case.warmup, options.device)
        flop = count_flop(functions[case.flop_of]) if case.flop_of else 0.0
        torch.set_num_threads(threads)
        names = list(functions)
        del functions
        mib = {name: peak_memory(measure, options, index, name) if options.memory else None for name in names}
        for name in names[case.peers :]:
            for peer in names[: case.peers]:
                row = Row(measure, case.name, peer, name, case.images, peer_mib=mib[peer], mib=mib[name])
                row.differences = case.compare(results[peer], results[name])
                row.gflop = flop / 1e9 or None
                row.floor_seconds = floor_seconds(flop, case.bytes, case.dtypes.get(name, "fp32"), options.device)
                rows.append(summarize(row, times[peer], times[name]))
    return rows


def build(case: Case) -> dict[str, Callable[[], Any]]:
    """Its functions; one of ours that this machine cannot have is left out, with the reason."""
    functions: dict[str, Callable[[], Any]] = {}
    for name, make in case.variants.items():
        try:
            functions[name] = make()
        except UserError as error:
            if len(functions) < case.peers:
                raise
            print(f"{name}: skipped: {error}", flush=True)
    return functions


def peak_memory(measure: str, options: Options, index: int, variant: str) -> float | None:
    """MiB at the peak of the warm-up and one more call, beyond what was there before them, in a fresh process: what a step
    leaves for the next one, such as gradients, counts too. None where the system does not tell (Linux's /proc does)."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak_memory_here, measure, options, index, variant).result()


def _peak_memory_here(measure: str, options: Options, index: int, variant: str) -> float | None:
    case: Case = import_module(f"benchmarks.{measure}").cases(options)[index]
    torch.set_num_threads(case.threads or torch.get_num_threads())
    once = case.variants[variant]()

    def call() -> None:
        for _ in range(case.warmup + 1):
            once()

    if torch.device(options.device).type != "cuda":
        return resident_peak(call)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def resident_peak(call: Callable[[], Any]) -> float | None:
    """MiB by which this process grows at most during `call`; None where the system does not tell."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system, or the call would use it unseen
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak becomes what is resident now
    except (AttributeError, OSError):
        return None
    before = _peak_kib()
    call()
    return (_peak_kib() - before) / 1024


def _peak_kib() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0])
