"""Runs over the same data side by side: what changed, and whether by more than the choice of images would explain."""

import html
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from retinanet.bounded import LARGEST_JSON, read_bounded
from retinanet.errors import UserError
from retinanet.evaluation.coco import NAMES
from retinanet.report.intervals import interval, numbers, over_classes, resample
from retinanet.report.matches import Matches, read_matches
from retinanet.report.page import BIDI, asset
from retinanet.results import write_json

PLACES = ("", "report", "evaluation", "evaluation/report")  # in a run's folder
PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Comparison of runs</title><style>{style}</style></head>
<body><header><div><h1>Comparison of runs</h1><p>{about}</p></div></header><main>{sections}</main></body></html>
"""


@dataclass
class Report:
    """What a comparison needs of a report; without `matches` there are no intervals."""

    name: str
    images: int
    boxes: int
    summary: dict[str, float | None]  # the twelve by name
    classes: list[dict[str, Any]]
    matches: Matches | None


def read_report(path: Path) -> Report:
    """The report in the folder `path`, or in report/ or evaluation/ there. Raises `UserError`."""
    folder = next((path / place for place in PLACES if (path / place / "figures.json").is_file()), None)
    if folder is None:
        message = f"{path}: no figures.json there, nor in report/ or evaluation/: write one with tools/evaluate.py ... --report"
        raise UserError(message)
    try:
        figures = json.loads(read_bounded(folder / "figures.json", LARGEST_JSON))
        values = {row["name"]: row["value"] for row in figures["summary"]}
        classes = [{key: row[key] for key in ("name", "boxes", "AP", "AP_low", "AP_high")} for row in figures["classes"]]
        about = figures["about"]
        summary = {name: values[name] for name in NAMES}
        matches = read_matches(folder / "matches.npz") if (folder / "matches.npz").exists() else None
        if matches and (matches.images, matches.classes) != (about["images"], len(classes)):
            raise ValueError("matches.npz beside it is of another report")
        return Report(str(path), about["images"], about["boxes"], summary, classes, matches)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{folder / 'figures.json'}: not the figures of a report: {error!r}") from None


def compare_reports(reports: list[Report], *, samples: int = 200, seed: int = 0) -> dict[str, Any]:
    """Each report against the first: the twelve numbers and each class's AP, with the difference and its 95 % interval.

    Both runs are counted on the same `samples` bootstrap resamples of the images, so that hard images are hard for both.
    A difference has `moved` if its interval leaves out 0; where a report has no matches there are no intervals, and a class
    has moved if each AP lies outside the other's interval. Raises `UserError` for reports of different data.
    """
    first, *others = reports
    for other in others:
        _check_data(first, other)
    weights = resample(first.images, samples if all(report.matches for report in reports) and first.images > 1 else 0, seed)
    nothing = np.empty((0, len(first.classes), len(NAMES)))
    before, *spreads = (numbers(report.matches, weights) if report.matches else nothing for report in reports)
    runs = []
    for other, after in zip(others, spreads, strict=True):
        means, by_class = over_classes(after) - over_classes(before), (after - before)[..., 0]
        summary = [{"name": n, **_change(first.summary[n], other.summary[n], means[:, k])} for k, n in enumerate(NAMES)]
        classes = [
            {"name": a["name"], "boxes": a["boxes"], **_change(a["AP"], b["AP"], by_class[:, k], _apart(a, b))}
            for k, (a, b) in enumerate(zip(first.classes, other.classes, strict=True))
        ]
        runs.append({"name": other.name, "summary": summary, "classes": classes})
    return {"baseline": first.name, "images": first.images, "boxes": first.boxes, "samples": len(weights), "runs": runs}


def _check_data(first: Report, other: Report) -> None:
    different = {
        f"{other.images} images, not {first.images}": other.images != first.images,
        f"{other.boxes} boxes, not {first.boxes}": other.boxes != first.boxes,
        "other classes": [row["name"] for row in first.classes] != [row["name"] for row in other.classes],
        "other images or boxes": first.matches and other.matches and first.matches.fingerprint != other.matches.fingerprint,
    }
    for what in (what for what, found in different.items() if found):
        raise UserError(f"{other.name} is of other data than {first.name}: {what}")


def _change(before: float | None, after: float | None, spread: np.ndarray, apart: bool = False) -> dict[str, Any]:
    difference = None if before is None or after is None else after - before
    low, high = interval(spread, difference)
    moved = apart if low is None or high is None else low > 0 or high < 0
    return {"before": before, "after": after, "difference": difference, "low": low, "high": high, "moved": moved}


def _apart(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(
        a["AP"] is not None and b["AP_low"] is not None and not b["AP_low"] <= a["AP"] <= b["AP_high"]
        for a, b in ((one, other), (other, one))
    )


def comparison_text(comparison: dict[str, Any]) -> str:
    """For a terminal: the twelve numbers, and the classes that moved."""
    lines = [_about(comparison)]
    for run in comparison["runs"]:
        moved = _moved(run)
        width = max(5, *(len(row["name"]) for row in [*run["summary"], *moved]))
        lines += ["", f"{run['name']} against {comparison['baseline']}, in points"]
        lines.append(f"{'':<{width}} {'before':>7} {'after':>7} {'change':>7}  95 % interval")
        lines += [_line(row, width) for row in run["summary"]]
        lines.append(f"{_counted(run)}{':' if moved else ''}")
        lines += [_line(row, width) for row in moved]
    return "\n".join(lines)


def _about(comparison: dict[str, Any]) -> str:
    how = f"paired bootstrap, {comparison['samples']} resamples of the images; * the interval leaves out 0"
    if not comparison["samples"]:
        how = "no intervals of the changes: that takes matches.npz in each report's folder, and two images"
    return f"{comparison['images']} images, {comparison['boxes']} boxes; {how}"


def _counted(run: dict[str, Any]) -> str:
    known = sum(row["difference"] is not None for row in run["classes"])
    return f"{len(_moved(run))} of {known} classes moved by more than chance (chance alone moves about 1 in 20)"


def _moved(run: dict[str, Any]) -> list[dict[str, Any]]:
    return sorted((row for row in run["classes"] if row["moved"]), key=lambda row: -abs(row["difference"]))


def _line(row: dict[str, Any], width: int) -> str:
    before, after, difference, between = _cells(row)
    return f"{row['name']:<{width}} {before:>7} {after:>7} {difference:>7}  {between}{' *' if row['moved'] else ''}"


def _cells(row: dict[str, Any]) -> list[str]:
    before, after = ("-" if row[key] is None else f"{100 * row[key]:.1f}" for key in ("before", "after"))
    difference, low, high = ("-" if row[key] is None else f"{100 * row[key]:+.1f}" for key in ("difference", "low", "high"))
    return [before, after, difference, "-" if row["low"] is None else f"{low} to {high}"]


def comparison_page(comparison: dict[str, Any]) -> str:
    """One HTML file that needs nothing else; all classes, those that moved first."""
    sections = ""
    for run in comparison["runs"]:
        rest = [row for row in run["classes"] if not row["moved"]]
        title = f"{_escape(run['name'])} against {_escape(comparison['baseline'])}"
        sections += f"<section><h2>{title}</h2>{_table('number', run['summary'])}</section>"
        classes = _table("class, AP", [*_moved(run), *rest])
        sections += f"<section><h2>Classes</h2><p class='note'>{_counted(run)}</p>{classes}</section>"
    return PAGE.format(style=asset("page.css"), about=_escape(_about(comparison)), sections=sections)


def _table(title: str, rows: list[dict[str, Any]]) -> str:
    head = "".join(f"<th scope='col'>{text}</th>" for text in (title, "before", "after", "change", "95 % interval", "moved"))
    body = ""
    for row in rows:
        cells = "".join(f"<td>{text}</td>" for text in [*_cells(row), "*" if row["moved"] else ""])
        body += f"<tr><th scope='row'>{_escape(row['name'])}</th>{cells}</tr>"
    return f"<div class='scroll' tabindex='0'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _escape(text: str) -> str:
    return html.escape(BIDI.sub("", text))


def write_comparison(comparison: dict[str, Any], folder: Path) -> None:
    """Writes comparison.json, comparison.txt and comparison.html."""
    write_json(folder / "comparison.json", comparison)
    (folder / "comparison.txt").write_text(comparison_text(comparison) + "\n", encoding="utf-8")
    (folder / "comparison.html").write_text(comparison_page(comparison), encoding="utf-8")
