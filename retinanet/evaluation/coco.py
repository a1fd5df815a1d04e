"""The twelve COCO numbers by pycocotools, and the same by class."""

import contextlib
import io
from typing import Any

import numpy as np

from retinanet.data.annotations import Annotations
from retinanet.errors import UserError
from retinanet.structures import shortened

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def evaluate_rows(rows: np.ndarray, truth: Annotations) -> dict[str, Any]:
    """COCO box evaluation of detections [D, 7] (see `retinanet.results`) against a data set.

    Returns the twelve numbers in 0..1, None where COCOeval says -1 (nothing to measure), `per_class` by name (AP, AP50,
    AR100, boxes, and the score threshold with the best F1 at IoU 0.5), and the counts of images and detections.
    Raises `UserError` when detections speak of images or categories that the data set does not have.
    """
    _check_ids(rows[:, 0], truth.image_ids, "image_id", truth.source)
    _check_ids(rows[:, 6], np.array([c.id for c in truth.categories]), "category_id", truth.source)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints every stage
        result = _run_cocoeval(rows, truth)
    metrics: dict[str, Any] = {name: _number(value) for name, value in zip(NAMES, result.stats, strict=True)}
    metrics["images"], metrics["detections"] = len(truth), len(rows)
    metrics["per_class"] = _per_class(result, truth)
    return metrics


def best_thresholds(metrics: dict[str, Any]) -> dict[str, float]:
    """By class name, of the classes that have one: what `evaluate_rows` found."""
    return {name: row["threshold"] for name, row in metrics["per_class"].items() if row["threshold"] is not None}


def _run_cocoeval(rows: np.ndarray, truth: Annotations) -> Any:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    gt = COCO()
    gt.dataset = truth.to_coco()
    gt.createIndex()
    if len(rows):
        dt = gt.loadRes(rows)
    else:  # loadRes looks into the first result
        dt = COCO()
        dt.dataset = {**gt.dataset, "annotations": []}
        dt.createIndex()
    result = COCOeval(gt, dt, "bbox")
    result.evaluate()
    result.accumulate()
    result.summarize()
    return result


def _per_class(result: Any, truth: Annotations) -> dict[str, dict[str, float | int | None]]:
    """From COCOeval's arrays: precision [T, 101, K, area, maxDets], recall [T, K, area, maxDets], and its matches."""
    precision, recall = result.eval["precision"], result.eval["recall"]
    images = [result.evalImgs[n : n + len(truth)] for n in range(0, len(result.evalImgs), len(truth))]  # by class, then area
    order = np.argsort([c.id for c in truth.categories])  # COCOeval's K runs over ascending category ids
    counts = truth.counts()
    table: dict[str, dict[str, float | int | None]] = {}
    for k, label in enumerate(order.tolist()):
        table[truth.categories[label].name] = {
            "AP": _mean(precision[:, :, k, 0, -1]),
            "AP50": _mean(precision[0, :, k, 0, -1]),
            "AR100": _mean(recall[:, k, 0, -1]),
            "boxes": int(counts[label]),
            "threshold": _best_threshold(images[k * precision.shape[3]]),
        }
    return {category.name: table[category.name] for category in truth.categories}


def _best_threshold(images: list[dict[str, Any] | None]) -> float | None:
    """The score that gives the best F1 at IoU 0.5 if all below it are left out, from COCOeval's matches of a class in each
    image; None without any match. Of equally good ones the highest."""
    found = [image for image in images if image is not None]
    boxes = sum(int((np.asarray(image["gtIgnore"]) == 0).sum()) for image in found)
    counted = [~image["dtIgnore"][0].astype(bool) for image in found]
    scores = np.concatenate([np.asarray(image["dtScores"])[mask] for image, mask in zip(found, counted)] or [np.empty(0)])
    hits = np.concatenate([image["dtMatches"][0][mask] > 0 for image, mask in zip(found, counted)] or [np.empty(0)])
    levels, level = np.unique(-scores, return_inverse=True)  # equal scores stay or go together
    kept, right = np.cumsum(np.bincount(level)), np.cumsum(np.bincount(level, weights=hits))
    f1 = 2 * right / np.maximum(kept + boxes, 1)
    return -float(levels[f1.argmax()]) if right.size and right[-1] > 0 else None


def metrics_table(metrics: dict[str, Any]) -> str:
    """The numbers as text for a terminal."""
    lines = ["  ".join(f"{name} {_percent(metrics[name])}" for name in group) for group in (NAMES[:6], NAMES[6:])]
    width = max(5, *(len(name) for name in metrics["per_class"]))
    lines.append(f"{'class':<{width}}  {'AP':>6} {'AP50':>6} {'AR100':>6} {'boxes':>7} {'best score':>10}")
    for name, row in metrics["per_class"].items():
        threshold = "-" if row["threshold"] is None else f"{row['threshold']:.2f}"
        numbers = " ".join(f"{_percent(row[key]):>6}" for key in ("AP", "AP50", "AR100"))
        lines.append(f"{name:<{width}}  {numbers} {row['boxes']:>7} {threshold:>10}")
    if metrics["AP"] is None:
        lines.append("AP is - (COCO's -1): the data set has no boxes to find")
    elif any(metrics[name] is None for name in NAMES) or any(row["AP"] is None for row in metrics["per_class"].values()):
        lines.append("- (COCO's -1): the data set has no boxes of that size or class")
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _number(value: float) -> float | None:
    return None if value == -1 else float(value)


def _mean(values: np.ndarray) -> float | None:
    valid = values[values > -1]
    return float(valid.mean()) if valid.size else None


def _check_ids(found: np.ndarray, known: np.ndarray, what: str, source: str) -> None:
    strange = np.unique(found[~np.isin(found, known)]).astype(np.int64)
    if len(strange):
        named = shortened([str(number) for number in strange])
        raise UserError(f"the detections have {what} {named}, which {source} does not: are they of this data set?")
