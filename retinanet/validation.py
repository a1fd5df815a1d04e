"""The validation data of a run, and what each look at them leaves: metrics.json, curves, pictures."""

import math
from pathlib import Path

import numpy as np
import torch
from torch import nn

from retinanet.config import Config
from retinanet.criterion import RetinaNetLoss
from retinanet.data.annotations import Annotations
from retinanet.data.images import UnreadableImageError, read_image
from retinanet.data.workers import choose_workers
from retinanet.distributed import world_size
from retinanet.evaluation.coco import best_thresholds, choose_evaluator
from retinanet.evaluation.matching import assign, judge
from retinanet.evaluation.run import Evaluation, evaluate_model, map_categories
from retinanet.postprocess import build_postprocessor
from retinanet.report.curves import count_from
from retinanet.report.matches import Seen
from retinanet.results import write_json
from retinanet.structures import Category, Detections
from retinanet.telemetry import Telemetry
from retinanet.visualize import draw_detections, draw_target, side_by_side

PICTURES = 4  # images shown in TensorBoard
THRESHOLDS = 101  # of its precision-recall curve
UNKNOWN_THRESHOLD = 0.5  # of what is drawn, for a class without a best one


class Validation:
    """Says once, at the start, which classes of `annotations` are numbered otherwise than the model's `categories`."""

    def __init__(self, config: Config, annotations: Annotations, categories: tuple[Category, ...], folder: Path) -> None:
        self.config, self.annotations, self.categories, self.folder = config, annotations, categories, folder
        self.category_ids = map_categories(categories, annotations)
        choose_evaluator(config.evaluation.engine)  # one that is not there is found now, not after an epoch

    def measure(self, model: nn.Module, criterion: RetinaNetLoss, device: torch.device, precision: str) -> Evaluation:
        """COCO metrics and losses. All ranks must call this."""
        return evaluate_model(
            model,
            self.annotations,
            build_postprocessor(self.config.postprocess, self.categories),
            self.config.input,
            device=device,
            precision=precision,
            batch_size=self.config.evaluation.batch_size,
            workers=choose_workers(self.config.data.workers, world_size()),
            criterion=criterion,
            num_samples=PICTURES,
            category_ids=self.category_ids,
            engine=self.config.evaluation.engine,
        )

    def report(self, result: Evaluation, step: int, telemetry: Telemetry) -> None:
        metrics, losses = result.metrics, result.losses
        finite = {name: value if math.isfinite(value) else None for name, value in losses.items()}  # JSON has no NaN
        try:
            write_json(self.folder / "metrics.json", {**metrics, "step": step, **finite})
        except OSError as error:
            telemetry.say(f"warning: {self.folder / 'metrics.json'} could not be written ({error.strerror})")
        ap, ap50 = (100 * (metrics[name] or 0.0) for name in ("AP", "AP50"))
        loss = " + ".join(f"{value:.3f}" for value in losses.values())
        telemetry.say(f"step {step}: validation AP {ap:.1f}  AP50 {ap50:.1f}  loss {loss} (class + box)")
        telemetry.scalars(step, {f"val/{k}": v for k, v in metrics.items() if k.startswith(("AP", "AR"))})
        telemetry.scalars(step, {f"val/{k}": v for k, v in losses.items()})
        self._show_curve(result.rows, step, telemetry)
        known = best_thresholds(metrics)
        limits = torch.tensor([known.get(category.name, UNKNOWN_THRESHOLD) for category in self.categories])
        for n, (index, detections) in enumerate(result.samples):
            self._show(f"validation/{n}", index, detections.above(limits), step, telemetry)

    def _show_curve(self, rows: np.ndarray, step: int, telemetry: Telemetry) -> None:
        """Precision and recall at IoU 0.5 over the score, all classes together, in TensorBoard."""
        seen = Seen(rows, self.annotations)
        found = assign(seen.pairs_where(seen.same_class), seen.rank, self.annotations.crowd, seen.ignored, iou=0.5)
        hits, counted = judge(found, seen.ignored, seen.outside)
        thresholds = np.linspace(0, 1, THRESHOLDS)
        right, kept = (count_from(seen.score[which], thresholds) for which in (hits, counted))
        telemetry.precision_recall(step, "val/precision_recall", right, kept, int((~seen.ignored).sum()))

    def _show(self, name: str, index: int, detections: Detections, step: int, telemetry: Telemetry) -> None:
        """A validation image in TensorBoard: truth on the left, predictions on the right."""
        try:
            image = read_image(self.annotations.path(index))
        except UnreadableImageError:
            return  # reported by the evaluation
        truth = draw_target(image, self.annotations.target(index, image.shape[:2]), self.annotations.categories)
        telemetry.picture(step, name, side_by_side([truth, draw_detections(image, detections)]))
