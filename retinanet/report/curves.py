"""Precision against recall, everything against the score, and whether scores are chances; all of `Matches`."""

from typing import Any

import numpy as np

from retinanet.report.intervals import LEVELS, envelope, over_classes
from retinanet.report.matches import IOUS, Matches

GRID = np.linspace(0, 1, 101)  # scores
BINS = 10


def precision_curves(matches: Matches) -> np.ndarray:
    """COCOeval's precision [10, 101, K] by IoU, recall level and class, for all sizes; NaN for a class without boxes."""
    result = np.full((len(IOUS), len(LEVELS), matches.classes), np.nan)
    positives = np.bincount(matches.truth_label[matches.sought[:, 0]], minlength=matches.classes)
    for label in np.flatnonzero(positives).tolist():
        own = slice(*np.searchsorted(matches.label, [label, label + 1]))
        for iou in range(len(IOUS)):
            kept = 1 + np.flatnonzero(matches.hits[own, 0, iou][matches.counted[own, 0, iou]])
            right = np.arange(1, len(kept) + 1)
            level = np.searchsorted(right / positives[label], LEVELS)
            result[iou, :, label] = np.append(envelope(right, kept), 0)[level]  # 0 where the recall is never reached
    return result


def count_from(score: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """How many of the scores [D] are at least each threshold [T]."""
    return len(score) - np.searchsorted(np.sort(score), thresholds)


def score_curves(score: np.ndarray, hits: np.ndarray, positives: int, thresholds: np.ndarray) -> dict[str, np.ndarray]:
    """F1, precision and recall of the detections [D] that score at least each threshold [T]: `f1`, `p`, `r`; NaN for 0 / 0."""
    kept, right = count_from(score, thresholds), count_from(score[hits], thresholds)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {"f1": 2 * right / (kept + positives), "p": right / kept, "r": right / np.float64(positives)}


def class_curves(matches: Matches, score: np.ndarray, label: int, thresholds: np.ndarray) -> dict[str, np.ndarray]:
    """`score_curves` of one class, for all sizes at IoU 0.5; `score` [D] of all."""
    own = slice(*np.searchsorted(matches.label, [label, label + 1]))
    hits, counted = matches.hits[own, 0, 0], matches.counted[own, 0, 0]
    positives = int((matches.sought[:, 0] & (matches.truth_label == label)).sum())
    return score_curves(score[own][counted], hits[counted], positives, thresholds)


def all_curves(matches: Matches, score: np.ndarray, names: list[str]) -> dict[str, Any]:
    """The figure `curves`; `score` [D]."""
    precision = precision_curves(matches)
    hits, counted = matches.hits[:, 0, 0], matches.counted[:, 0, 0]
    by_class = {}
    for label, name in enumerate(names):
        rates = class_curves(matches, score, label, GRID)
        by_class[name] = {"precision": precision[0, :, label], "score": GRID, **rates}
    mean = {
        "0.50": over_classes(precision[0]),
        "0.75": over_classes(precision[5]),
        "mean": over_classes(precision.mean(axis=0)),
    }
    rates = score_curves(score[counted], hits[counted], int(matches.sought[:, 0].sum()), GRID)
    return {"recall": LEVELS, "precision": mean, "by_class": by_class, "score": GRID, **rates}


def calibration(score: np.ndarray, hits: np.ndarray) -> dict[str, Any]:
    """Mean score against the share that is right in ten equal bins, and their expected distance, the ECE (Guo et al. 2017)."""
    which = np.floor(score * BINS).clip(0, BINS - 1).astype(int)
    count, right, total = (np.bincount(which, weights, BINS) for weights in (None, hits, score))
    confidence, precision = (np.where(count > 0, part / np.maximum(count, 1), np.nan) for part in (total, right))
    edges = np.arange(BINS + 1) / BINS
    columns = {"low": edges[:-1], "high": edges[1:], "count": count, "confidence": confidence, "precision": precision}
    ece = np.nansum(count * np.abs(confidence - precision)) / len(score) if len(score) else None
    return {"ece": ece, "bins": [dict(zip(columns, row)) for row in zip(*columns.values(), strict=True)]}
