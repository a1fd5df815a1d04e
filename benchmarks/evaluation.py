"""COCO evaluation of arrays: pycocotools as its users call it, and `evaluate_rows` with each of its engines."""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import Case, Options
from retinanet.data.annotations import Annotations, PackedStrings
from retinanet.evaluation.coco import NAMES, Engine, choose_evaluator, evaluate_rows
from retinanet.structures import Category

ROUNDS = 3
IMAGES, DETECTIONS, CLASSES = 5000, 100, 80
PER_IMAGE = 7.32  # boxes, as in COCO
PIXELS = (480, 640)
ENGINES: tuple[Engine, ...] = ("pycocotools", "faster-coco-eval")


def cases(options: Options) -> list[Case]:
    return [_case(images) for images in options.sizes or (IMAGES,)]


def draw_truth(images: int, count: int) -> Annotations:
    """`count` boxes, as many small as large ones on a logarithmic scale, one in a hundred a crowd."""
    rng = np.random.default_rng(0)
    sides = np.exp(rng.uniform(np.log(8), np.log(400), (count, 2)))
    corners = rng.uniform(0, 1, sides.shape) * (np.array(PIXELS[::-1]) - sides)
    return Annotations(
        source="drawn",
        image_dir=Path(),
        categories=tuple(Category(n + 1, f"class {n}") for n in range(CLASSES)),
        image_ids=np.arange(1, images + 1),
        file_names=PackedStrings(["image.jpg"] * images),
        sizes=np.tile(PIXELS, (images, 1)),
        offsets=np.searchsorted(np.sort(rng.integers(0, images, count)), np.arange(images + 1)),
        annotation_ids=np.arange(1, count + 1),
        coco_boxes=np.concatenate([corners, sides], axis=1).round(2),
        areas=sides.prod(axis=1).round(2),
        labels=rng.integers(0, CLASSES, count),
        crowd=rng.random(count) < 0.01,
    )


def draw_detections(truth: Annotations) -> np.ndarray:
    """Rows [images * `DETECTIONS`, 7]: boxes near those of the truth, some with another class, and others anywhere."""
    rng = np.random.default_rng(1)
    form = len(truth), DETECTIONS
    boxes = np.exp(rng.uniform(np.log(8), np.log(300), (*form, 4)))
    labels, scores = rng.integers(0, CLASSES, form), rng.random(form) * 0.6
    near = truth.image_of, np.arange(len(truth.labels)) - truth.offsets[truth.image_of]  # the first of each image
    boxes[near] = truth.coco_boxes + rng.uniform(-0.1, 0.1, truth.coco_boxes.shape) * truth.coco_boxes[:, [2, 3, 2, 3]]
    labels[near] = np.where(rng.random(len(truth.labels)) < 0.8, truth.labels, labels[near])
    scores[near] += 0.3
    images = np.repeat(truth.image_ids, DETECTIONS)
    return np.column_stack([images, boxes.reshape(-1, 4), scores.ravel(), labels.ravel() + 1])


def _case(images: int) -> Case:
    truth = draw_truth(images, round(images * PER_IMAGE))
    rows, dataset = draw_detections(truth), truth.to_coco()

    def pycocotools() -> dict[str, Any]:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO()
            coco.dataset = dataset
            coco.createIndex()
            result = COCOeval(coco, coco.loadRes(rows), "bbox")
            result.evaluate()
            result.accumulate()
            result.summarize()
        return dict(zip(NAMES, result.stats.tolist(), strict=True))

    def ours(engine: Engine) -> Callable[[], dict[str, Any]]:
        choose_evaluator(engine)  # an error where it is not installed
        return lambda: evaluate_rows(rows, truth, engine=engine)

    variants: dict[str, Callable[[], Callable[[], Any]]] = {"pycocotools": lambda: pycocotools}
    variants |= {f"ours, {engine}": lambda engine=engine: ours(engine) for engine in ENGINES}
    return Case(f"{images} images, {len(rows)} detections", variants, _compare, warmup=0)


def _compare(peer: dict[str, Any], ours: dict[str, Any]) -> dict[str, float]:
    """COCOeval's -1, nothing to measure, is None with us."""
    gap = max(abs(peer[name] - (-1 if ours[name] is None else ours[name])) for name in NAMES)
    return {"largest of the twelve numbers": gap, "AP": peer["AP"]}
