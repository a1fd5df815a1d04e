"""Figures of a report, made up: what `build_figures` would give, with any part replaced by a test's own."""

from typing import Any

import numpy as np

SUMMARY = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
ERRORS = ("class", "localisation", "both", "duplicate", "background", "missed")
NOTHING: dict[str, Any] = {"AP": None, "AP_low": None, "AP_high": None, "AP50": None, "AR100": None}


def one_class(name: str, boxes: int = 100, ap: float | None = 0.97, **other: Any) -> dict[str, Any]:
    row = {"name": name, "boxes": boxes, "AP": ap, "AP_low": None, "AP_high": None, "AP50": ap, "AR100": ap, "threshold": 0.5}
    return row | {"precision": ap, "recall": ap, "f1": ap} | other


def made_figures(names: tuple[str, ...] = ("cat", "dog", "hen"), **parts: Any) -> dict[str, Any]:
    """Of a detector that makes hardly an error: AP and AP50 0.97, `names` with 100 boxes each in 100 pictures."""
    falling = np.linspace(1, 0.9, 101).tolist()
    scores = np.linspace(0, 1, 101).tolist()
    over_score = {"score": scores, "f1": falling, "p": scores, "r": falling[::-1]}
    counts = np.zeros((len(names) + 1, len(names) + 1), np.int64)
    counts[range(len(names)), range(len(names))] = 97
    figures = {
        "about": {
            "title": "demo",
            "data": "val.json",
            "images": 100,
            "boxes": 100 * len(names),
            "detections": 320,
            "evaluator": "pycocotools",
            "classes": len(names),
        },
        "summary": [{"name": name, "value": 0.97, "low": 0.96, "high": 0.98} for name in SUMMARY],
        "classes": [one_class(name) for name in names],
        "curves": {
            "recall": scores,
            "precision": dict.fromkeys(("0.50", "0.75", "mean"), falling),
            "by_class": {name: {"precision": falling, **over_score} for name in names},
            **over_score,
        },
        "confusion": {"names": list(names), "counts": counts.tolist(), "cell": "IoU 0.5, each class at its best-F1 score"},
        "errors": {
            "AP50": 0.97,
            "types": [{"name": name, "count": 1, "gain": 0.001} for name in ERRORS],
            "false_positives": 0.01,
            "false_negatives": 0.01,
        },
        "calibration": {
            "ece": 0.03,
            "bins": [
                {"low": n / 10, "high": (n + 1) / 10, "count": 32, "confidence": n / 10 + 0.05, "precision": n / 10 + 0.02}
                for n in range(10)
            ],
        },
        "by_size": [
            {"name": name, "AP": 0.97, "AR100": 0.98, "boxes": 100}
            for name in ("small (< 32²)", "medium (32² to 96²)", "large (> 96²)")
        ],
        "by_crowding": [
            {"name": name, "images": 50, "boxes": 150, "AP50": 0.97, "AR100": 0.98} for name in ("1 box", "2-4 boxes")
        ],
        "findings": [],
    }
    return figures | parts


def finding(
    kind: str = "class", image_id: int = 1, name: str = "cat", predicted: str | None = "dog", **other: Any
) -> dict[str, Any]:
    return {
        "kind": kind,
        "image_id": image_id,
        "file_name": f"{image_id}.png",
        "class": name,
        "predicted": predicted,
        "score": 0.8,
        "box": [10.0, 12.0, 20.0, 16.0],
        "truth": [12.0, 12.0, 20.0, 16.0],
        "iou": 0.8,
    } | other
