"""The twelve COCO numbers by faster-coco-eval or pycocotools, which agree to the last bits, and the same by class."""

import contextlib
import gc
import io
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from retinanet.data.annotations import Annotations
from retinanet.errors import UserError
from retinanet.evaluation.matching import judge, match
from retinanet.structures import shortened

Engine = Literal["auto", "pycocotools", "faster-coco-eval"]
NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
CURVES = (10, 101, 4, 3)  # COCOeval's IoU thresholds, recall levels, area ranges (all, small, medium, large), 1, 10 or 100
LARGEST_AREA = 1e10  # of COCOeval's range "all"; what lies outside is ignored


def evaluate_rows(rows: np.ndarray, truth: Annotations, *, engine: Engine = "auto") -> dict[str, Any]:
    """COCO box evaluation of detections [D, 7] (see `retinanet.results`) against a data set.

    Returns the twelve numbers in 0..1, None where COCOeval says -1 (nothing to measure), `per_class` by name (AP, AP50,
    AR100, boxes, and the score threshold with the best F1 at IoU 0.5), the counts of images and detections, and the
    `evaluator`. Raises `UserError` when detections speak of images or categories that the data set does not have.
    """
    ids = np.array([category.id for category in truth.categories])
    _check_ids(rows[:, 0], truth.image_ids, "image_id", truth.source)
    _check_ids(rows[:, 6], ids, "category_id", truth.source)
    evaluator = choose_evaluator(engine)
    order = np.argsort(ids)  # COCOeval's K runs over ascending category ids
    rows_of = _by_class(order[np.searchsorted(ids[order], rows[:, 6])], len(ids))
    truth_of = _by_class(truth.labels, len(ids))
    images, counts = truth.image_ids[truth.image_of], truth.counts()
    precision, recall = np.full((*CURVES[:2], len(ids), *CURVES[2:]), -1.0), np.full((CURVES[0], len(ids), *CURVES[2:]), -1.0)
    per_class: dict[str, dict[str, float | int | None]] = {category.name: {} for category in truth.categories}
    for k, label in enumerate(tqdm(order.tolist(), "evaluate", unit="class", leave=False, delay=2)):
        found, own = rows[rows_of[label]], truth_of[label]
        columns = images[own], truth.coco_boxes[own], truth.areas[own], truth.crowd[own]
        if len(own):  # without a box there is nothing to measure: -1
            precision[:, :, k], recall[:, k] = _cocoeval(found, *columns, evaluator)
        per_class[truth.categories[label].name] = {
            "AP": _mean(precision[:, :, k, 0, -1]),
            "AP50": _mean(precision[0, :, k, 0, -1]),
            "AR100": _mean(recall[:, k, 0, -1]),
            "boxes": int(counts[label]),
            "threshold": _best_threshold(found, *columns),
        }
    about = {"images": len(truth), "detections": len(rows), "evaluator": evaluator}
    return {**_summary(precision, recall), **about, "per_class": per_class}


def choose_evaluator(engine: Engine) -> str:
    """The library that `engine` stands for. Raises `UserError` where it asks for one that cannot be imported."""
    if engine != "pycocotools":
        try:
            import faster_coco_eval  # noqa: F401

            return "faster-coco-eval"
        except (ImportError, ValueError) as error:  # ValueError: built for another numpy
            if engine != "auto":
                message = f"evaluation.engine {engine} cannot be imported ({error}): pip install {engine}, or take auto"
                raise UserError(message) from None
    return "pycocotools"


def best_thresholds(metrics: dict[str, Any]) -> dict[str, float]:
    """By class name, of the classes that have one: what `evaluate_rows` found."""
    return {name: row["threshold"] for name, row in metrics["per_class"].items() if row["threshold"] is not None}


def _by_class(labels: np.ndarray, classes: int) -> list[np.ndarray]:
    """For each class the positions in `labels` [D], in order."""
    return np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels, minlength=classes))[:-1])


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """While many dicts are made that hold no circles: walking them again and again takes a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _cocoeval(
    found: np.ndarray, images: np.ndarray, boxes: np.ndarray, areas: np.ndarray, crowd: np.ndarray, evaluator: str
) -> tuple[np.ndarray, np.ndarray]:
    """Precision [10, 101, 4, 3] and recall [10, 4, 3] of one class, whose memory alone the libraries' objects then take."""
    if evaluator == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    else:
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval

    found_images = found[:, 0].astype(np.int64)
    known = [{"id": image} for image in np.union1d(images, found_images).tolist()]  # other images change nothing

    def index(images: np.ndarray, boxes: np.ndarray, areas: np.ndarray, key: str, values: np.ndarray) -> Any:
        columns = zip(images.tolist(), boxes.tolist(), areas.tolist(), values.tolist(), strict=True)
        entries = [  # numbered from 1: 0 would be "no match"
            {"id": n, "image_id": image, "category_id": 1, "bbox": box, "area": area, key: value}
            for n, (image, box, area, value) in enumerate(columns, start=1)
        ]
        coco = COCO()
        coco.dataset = {"images": known, "categories": [{"id": 1}], "annotations": entries}
        coco.createIndex()
        return coco

    with contextlib.redirect_stdout(io.StringIO()), _no_garbage_collection():  # every stage is printed
        gt = index(images, boxes, areas, "iscrowd", crowd.astype(np.int64))
        dt = index(found_images, found[:, 1:5], found[:, 3] * found[:, 4], "score", found[:, 5])
        result = COCOeval(gt, dt, "bbox")
        result.evaluate()
        result.accumulate()
    return result.eval["precision"][:, :, 0], result.eval["recall"][:, 0]


def _summary(precision: np.ndarray, recall: np.ndarray) -> dict[str, float | None]:
    """COCOeval's twelve means of precision [T, 101, K, area, maxDets] and recall [T, K, area, maxDets]."""
    every, sizes = 0, (1, 2, 3)
    values = [precision[..., every, -1], precision[0, ..., every, -1], precision[5, ..., every, -1]]  # IoU 0.50 and 0.75
    values += [precision[..., size, -1] for size in sizes]
    values += [recall[..., every, m] for m in range(3)] + [recall[..., size, -1] for size in sizes]
    return dict(zip(NAMES, map(_mean, values), strict=True))


def _best_threshold(
    found: np.ndarray, images: np.ndarray, boxes: np.ndarray, areas: np.ndarray, crowd: np.ndarray
) -> float | None:
    """The score that gives the best F1 at IoU 0.5 if all below it are left out, by COCOeval's matches; None without any
    match. Of equally good ones the highest."""
    outside, found_outside = ((area < 0) | (area > LARGEST_AREA) for area in (areas, found[:, 3] * found[:, 4]))
    ignored = crowd | outside
    matches = match(found[:, 1:5], found[:, 5], found[:, 0], boxes, images, crowd, ignored)
    hits, counted = judge(matches, ignored, found_outside)
    scores, hits = found[counted, 5], hits[counted]
    levels, level = np.unique(-scores, return_inverse=True)  # equal scores stay or go together
    kept, right = np.cumsum(np.bincount(level)), np.cumsum(np.bincount(level, weights=hits))
    f1 = 2 * right / np.maximum(kept + int((~ignored).sum()), 1)
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
    lines.append(f"evaluated with {metrics['evaluator']}")
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _mean(values: np.ndarray) -> float | None:
    valid = values[values > -1]
    return float(valid.mean()) if valid.size else None


def _check_ids(found: np.ndarray, known: np.ndarray, what: str, source: str) -> None:
    strange = np.unique(found[~np.isin(found, known)]).astype(np.int64)
    if len(strange):
        named = shortened([str(number) for number in strange])
        raise UserError(f"the detections have {what} {named}, which {source} does not: are they of this data set?")
