"""The runs of an ablation as a table, complete or not, beside what the paper published; and whether its order is found."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np

from laboratory.ablation import OVER, Row, read_run
from retinanet.results import write_json

ENOUGH = 3  # seeds, before two rows are told apart


class Figure(NamedTuple):
    """Over the seeds, 0..1."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        mean, low, high = (f"{100 * value:.1f}" for value in self)
        return mean if self.low == self.high else f"{mean} ({low} .. {high})"


class Standing(NamedTuple):
    """A row and what its runs gave; figures are of those that did not diverge, None without any."""

    row: Row
    runs: int
    diverged: int
    ap: Figure | None
    ap50: Figure | None

    @property
    def order(self) -> float | None:
        """The AP to stand by: 0 where all runs diverged, None without runs."""
        return self.ap.mean if self.ap else 0.0 if self.runs else None

    def cells(self) -> list[str]:
        published = None if self.row.published is None else f"{self.row.published:.1f}"
        nothing = "diverged" if self.runs else "not run yet"
        figures = [str(figure or nothing) for figure in (self.ap, self.ap50)]
        count = f"{self.runs}, of which {self.diverged} diverged" if self.diverged else str(self.runs)
        return [self.row.group, self.row.name, *figures, count, ", ".join(filter(None, (published, self.row.where))) or "-"]


def standings(rows: Sequence[Row], out: Path) -> list[Standing]:
    """By the run.json files below `out`."""
    return [_standing(row, sorted((out / row.runs_of).glob("seed*"))) for row in rows]


def _standing(row: Row, folders: list[Path]) -> Standing:
    results = [result for folder in folders if (result := read_run(folder)).get("status") in OVER]
    good = [result for result in results if result["status"] == "finished"]
    ap, ap50 = (_figure([result[name] for result in good]) for name in ("AP", "AP50"))
    return Standing(row, len(results), len(results) - len(good), ap, ap50)


def _figure(values: list[float]) -> Figure | None:
    return Figure(float(np.mean(values)), min(values), max(values)) if values else None


def table(lines: Sequence[Standing]) -> str:
    """Markdown, AP in percent: mean and (lowest .. highest) of the seeds."""
    heads = ["group", "row", "AP", "AP50", "runs", "the paper's AP (COCO)"]
    cells = [heads, ["---"] * len(heads), *(line.cells() for line in lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def verdicts(lines: Sequence[Standing]) -> list[str]:
    """Of each pair of main rows that the paper puts in an order, whether that order is found here: only where both have
    `ENOUGH` seeds and their ranges do not overlap. Of each group how many pairs stand in the paper's order by their means."""
    said = []
    published = [line for line in lines if line.row.paper is not None]
    main = [line for line in published if line.row.main]
    for a, b in combinations(sorted(main, key=lambda line: line.row.paper or 0), 2):
        if a.row.paper != b.row.paper and a.row.runs_of != b.row.runs_of:
            said.append(f"{b.row.name} above {a.row.name}: {_verdict(a, b)}")
    for group in dict.fromkeys(line.row.group for line in lines):
        here = [line for line in published if line.row.group == group and line.order is not None]
        pairs = [(a, b) for a, b in combinations(here, 2) if a.row.paper != b.row.paper]
        agreed = sum((a.row.paper > b.row.paper) == (a.order > b.order) for a, b in pairs)  # type: ignore[operator]
        if pairs:
            said.append(f"{group}: {agreed} of {len(pairs)} pairs of rows stand in the paper's order, by their means")
    return said


def _verdict(lower: Standing, higher: Standing) -> str:
    if min(lower.runs, higher.runs) < ENOUGH:
        return "not run yet" if not (lower.runs and higher.runs) else f"undecided, fewer than {ENOUGH} seeds"
    nothing = Figure(0.0, 0.0, 0.0)
    a, b = lower.ap or nothing, higher.ap or nothing
    if lower.diverged not in (0, lower.runs) or higher.diverged not in (0, higher.runs):
        return "undecided, some runs diverged"
    return "found" if b.low > a.high else "not found, the other way round" if b.high < a.low else "undecided, ranges overlap"


def standings_chart(path: Path, lines: Sequence[Standing]) -> None:
    """AP of each row, with the range over the seeds, beside the paper's."""
    from matplotlib.figure import Figure as Picture

    shown = list(reversed(lines))
    colors = {group: f"C{n}" for n, group in enumerate(dict.fromkeys(line.row.group for line in lines))}
    names = [f"{line.row.group}: {line.row.name}" for line in shown]
    tint = [colors[line.row.group] for line in shown]
    figure = Picture(figsize=(11, 1.5 + 0.3 * len(shown)), layout="constrained")
    ours, paper = figure.subplots(1, 2, sharey=True)
    ours.set_xlim(0, 1.1 * max([10.0, *(100 * line.ap.high for line in shown if line.ap)]))
    ranges = np.array([line.ap or (0.0, 0.0, 0.0) for line in shown]) * 100  # [rows, 3]
    mean, low, high = ranges.T
    alone = np.array([line.runs < 2 for line in shown])  # one seed has no range to draw
    ours.barh(names, mean, xerr=np.where(alone, np.nan, [mean - low, high - mean]), color=tint, capsize=3)
    for n, line in enumerate(shown):
        if line.ap is None:
            ours.text(0.5, n, "diverged" if line.runs else "not run yet", va="center", fontsize=8)
    paper.barh(names, [line.row.published or 0.0 for line in shown], color=tint)
    ours.set_xlabel("AP here: mean, lowest and highest of the seeds")
    paper.set_xlabel("AP that the paper gives, on COCO")
    figure.savefig(path, dpi=120)


def show(rows: Sequence[Row], out: Path, *, quiet: bool = False) -> None:
    """Writes table.md, table.json and chart.png of what there is in `out`, and prints the table unless `quiet`."""
    lines = standings(rows, out)
    said = verdicts(lines)
    content = []
    for line in lines:
        figures = {name: figure and figure._asdict() for name, figure in (("AP", line.ap), ("AP50", line.ap50))}
        content.append({**line.row.model_dump(), "runs": line.runs, "diverged": line.diverged, **figures})
    text = "\n".join([table(lines), "", *(f"- {verdict}" for verdict in said), ""])
    write_json(out / "table.json", {"rows": content, "verdicts": said})
    (out / "table.md").write_text(text, encoding="utf-8")
    standings_chart(out / "chart.png", lines)
    if not quiet:
        print(f"{text}written: table.md, table.json and chart.png in {out}")
