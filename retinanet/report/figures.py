"""All figures of a report as one dict for JSON, and as the files that spreadsheets and scripts read; docs/report.md."""

import csv
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retinanet.evaluation.coco import NAMES
from retinanet.report.curves import all_curves, calibration, class_curves
from retinanet.report.errors import confusion, costs, find_errors, list_findings
from retinanet.report.intervals import interval, numbers, over_classes, resample
from retinanet.report.matches import Matches, Seen

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what spreadsheets execute (OWASP, CSV injection)
DEFAULT_THRESHOLD = 0.5  # of a class that found nothing, and so has no best one
SIZES = ("small (< 32²)", "medium (32² to 96²)", "large (> 96²)")
CROWDING = {"1 box": (1, 1), "2-4 boxes": (2, 4), "5-9 boxes": (5, 9), "10+ boxes": (10, math.inf)}  # in an image


def build_figures(
    seen: Seen, matches: Matches, boxes: np.ndarray, metrics: dict[str, Any], *, title: str, samples: int = 200, seed: int = 0
) -> dict[str, Any]:
    """The figures of detections against a data set, of what `find_matches` returned; None where there is nothing to measure.

    `metrics` is what `evaluate_rows` said of them. Intervals are of `samples` bootstrap resamples of the images.
    """
    annotations = seen.annotations
    names = [category.name for category in annotations.categories]
    in_image = np.bincount(seen.truth_image[~annotations.crowd], minlength=matches.images)
    groups = {name: (in_image >= low) & (in_image <= high) for name, (low, high) in CROWDING.items()}
    groups = {name: group for name, group in groups.items() if group.any()}
    drawn = resample(matches.images, samples if matches.images > 1 else 0, seed)
    values = numbers(matches, np.concatenate([np.array([*groups.values()], np.int32).reshape(-1, matches.images), drawn]))
    parts, spread = over_classes(values[: len(groups)]), values[len(groups) :]  # [G, 12], [S, K, 12]
    best = [metrics["per_class"][name]["threshold"] for name in names]
    threshold = np.array([DEFAULT_THRESHOLD if score is None else score for score in best])
    kept = seen.score >= threshold[seen.label]
    hits, counted = matches.hits[:, 0, 0], matches.counted[:, 0, 0]
    figures = {
        "about": {
            "title": title,
            "data": annotations.source,
            "images": matches.images,
            "boxes": int((~annotations.crowd).sum()),
            "detections": len(seen.score),
            "evaluator": metrics["evaluator"],
            "classes": len(names),
        },
        "summary": [
            {"name": name, "value": metrics[name], **_between(over_classes(spread[..., n]), metrics[name])}
            for n, name in enumerate(NAMES)
        ],
        "classes": _classes(matches, seen.score, metrics["per_class"], spread[:, :, 0]),
        "curves": all_curves(matches, seen.score, names),
        "confusion": {
            "names": names,
            "counts": confusion(seen, boxes, kept),
            "cell": "IoU 0.5, each class at its best-F1 score",
        },
        "errors": costs(seen, find_errors(seen, boxes, np.ones(len(seen.score), bool))),
        "calibration": calibration(seen.score[counted], hits[counted]),
        "by_size": [
            {"name": name, "AP": metrics[f"AP{name[0]}"], "AR100": metrics[f"AR{name[0]}"], "boxes": number}
            for name, number in zip(SIZES, matches.sought[:, 1:].sum(axis=0), strict=True)
        ],
        "by_crowding": [
            {"name": name, "images": group.sum(), "boxes": in_image[group].sum(), "AP50": part[1], "AR100": part[8]}
            for (name, group), part in zip(groups.items(), parts, strict=True)
        ],
        "findings": list_findings(seen, find_errors(seen, boxes, kept)),
    }
    return _plain(figures)


def _between(values: np.ndarray, value: float | None, prefix: str = "") -> dict[str, float | None]:
    bounds = (bound if bound is None else min(max(bound, 0.0), 1.0) for bound in interval(values, value))
    return dict(zip((f"{prefix}low", f"{prefix}high"), bounds, strict=True))


def _classes(
    matches: Matches, score: np.ndarray, per_class: dict[str, dict[str, Any]], spread: np.ndarray
) -> list[dict[str, Any]]:
    """The figure `classes`; `spread` [S, K] are the resamples' APs."""
    result = []
    for label, (name, row) in enumerate(per_class.items()):
        threshold = np.inf if row["threshold"] is None else row["threshold"]
        rates = class_curves(matches, score, label, np.array([threshold]))
        result.append({
            "name": name,
            **{key: row[key] for key in ("boxes", "AP")},
            **_between(spread[:, label], row["AP"], "AP_"),
            **{key: row[key] for key in ("AP50", "AR100", "threshold")},
            **{key: rates[short][0] for key, short in (("precision", "p"), ("recall", "r"), ("f1", "f1"))},
        })  # fmt: skip
    return result


def _plain(value: Any) -> Any:
    """The same in Python's own types, without NaN."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_figures(figures: dict[str, Any], folder: Path) -> None:
    """Writes figures.json, and summary.csv, classes.csv, errors.csv and confusion.csv for spreadsheets."""
    text = json.dumps(figures, ensure_ascii=False, allow_nan=False) + "\n"
    (folder / "figures.json").write_text(text, encoding="utf-8", errors="replace")  # a file's name may be no UTF-8
    confusion, errors = figures["confusion"], figures["errors"]
    for name in ("summary", "classes"):
        _write_csv(folder / f"{name}.csv", [[*figures[name][0]], *([*row.values()] for row in figures[name])])
    kinds = [[row["name"], row["count"], row["gain"]] for row in errors["types"]]
    both = [[name, None, errors[name]] for name in ("false_positives", "false_negatives")]
    _write_csv(folder / "errors.csv", [["name", "count", "gain"], *kinds, *both])
    columns = [*confusion["names"], "background"]
    body = ([name, *row] for name, row in zip(columns, confusion["counts"], strict=True))
    _write_csv(folder / "confusion.csv", [["truth \\ predicted", *columns], *body])


def _write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """UTF-8 with a mark that spreadsheets look for. Text that they would take for a formula gets an apostrophe before it."""
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        for row in rows:
            csv.writer(file).writerow([f"'{v}" if isinstance(v, str) and v.startswith(FORMULA) else v for v in row])
