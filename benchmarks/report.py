"""Rows of measures as a Markdown table, as JSON and as a chart."""

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import Row
from retinanet.results import write_json


def seconds_text(seconds: float | None) -> str:
    """Three digits and a unit; empty for None."""
    if seconds is None:
        return ""
    scale, unit = next(((s, u) for s, u in ((1, "s"), (1e3, "ms")) if seconds * s >= 1), (1e6, "us"))
    return f"{seconds * scale:.3g} {unit}" if seconds * scale < 1000 else f"{seconds * scale:.0f} {unit}"


def time_text(row: Row, name: str, seconds: float | None) -> str:
    speed = f" ({row.images / seconds:.3g} images/s)" if row.images and seconds else ""
    return f"{name} {seconds_text(seconds)}{speed}".strip()


def ratio_text(row: Row) -> str:
    if row.is_bound:
        return f"at least {row.ratio:.2f}"
    return "-" if row.ratio is None else f"{row.ratio:.2f} ({row.ratio_low:.2f} .. {row.ratio_high:.2f})"


def floor_text(row: Row) -> str:
    """The time at the machine's measured peak, and its share of ours."""
    if row.floor_seconds is None or not row.seconds:
        return "-"
    return f"{seconds_text(row.floor_seconds)}, {100 * row.floor_seconds / row.seconds:.0f} %"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "measure": lambda row: f"{row.measure}: {row.case}",
    "peer": lambda row: time_text(row, row.peer, row.peer_seconds),
    "ours": lambda row: time_text(row, row.variant, row.seconds),
    "peer / ours (quartiles)": ratio_text,
    "extra memory, MiB": lambda row: "-" if row.mib is None else f"{row.peer_mib or 0:.0f} -> {row.mib:.0f}",
    "floor / ours": floor_text,
    "differences": lambda row: ", ".join(f"{name} {value:.4g}" for name, value in row.differences.items()) or "-",
}


def table(rows: list[Row]) -> str:
    cells = [list(COLUMNS), ["---"] * len(COLUMNS), *([text(row) for text in COLUMNS.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def header_text(header: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in header["versions"].items())
    peaks = ", ".join(f"{name} {value / 1e9:.3g}" for name, value in header["peaks"].items())
    return (
        f"`{header['command']}`, {header['date']}\n"
        f"{header['processor']}, {header['cores']} cores, {header['threads']} threads, {header['memory_gib']} GiB; "
        f"load average {header['load_average'][0]}\n{versions}\n"
        f"measured peaks in GFLOP/s (copy: GB/s): {peaks}"
    )


def write_report(path: Path, header: dict[str, Any], rows: list[Row]) -> None:
    """JSON: {"header", "rows"}; seconds, MiB, and all times of all rounds."""
    write_json(path, {"header": header, "rows": [finite(asdict(row)) for row in rows]})


def finite(value: Any) -> Any:
    """The same with None for what JSON has no word for: NaN and infinity."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_chart(path: Path, rows: list[Row]) -> None:
    """A bar for each row that has a ratio: how many times as fast as the peer, with the quartiles."""
    from matplotlib.figure import Figure

    shown = [row for row in reversed(rows) if row.ratio is not None]
    low, ratios, high = np.array([(row.ratio_low, row.ratio, row.ratio_high) for row in shown], float).reshape(-1, 3).T
    figure = Figure(figsize=(9, 1.2 + 0.4 * len(shown)), layout="constrained")
    axes = figure.subplots()
    names = [f"{row.measure}: {row.case}\n{row.variant} : {row.peer}" for row in shown]
    axes.barh(names, ratios, xerr=[ratios - low, high - ratios], color="tab:blue", capsize=3)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("the peer's time / ours (median and quartiles of the rounds)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
