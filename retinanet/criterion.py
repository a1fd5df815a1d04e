"""Predictions and targets to losses: match, focal loss on all anchors that count, box loss on the foreground."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from retinanet.boxes import decode_boxes, encode_boxes
from retinanet.config import LossConfig
from retinanet.losses import giou_loss, l1_loss, sigmoid_focal_loss, smooth_l1_loss
from retinanet.matcher import BACKGROUND, IGNORE, Matcher
from retinanet.structures import Predictions, Target


class LossSums(NamedTuple):
    """Sums over a batch, not yet divided by the foreground of the *global* batch, which only the caller knows."""

    loss_cls: Tensor
    loss_box: Tensor
    num_foreground: Tensor  # float32, so that ranks can add it up


class RetinaNetLoss:
    """The training objective (paper sections 3 and 4.1). Computed in float32, also inside autocast.

    The classification loss runs over foreground and background anchors, the box loss over foreground anchors. Anchors
    between the two IoU thresholds and anchors inside crowd regions count in neither.
    """

    def __init__(
        self,
        matcher: Matcher | None = None,
        *,
        alpha: float = 0.25,
        gamma: float = 2.0,
        box_loss: str = "l1",
        smooth_l1_beta: float = 0.1,
        box_loss_weight: float = 1.0,
    ) -> None:
        self.matcher = matcher or Matcher()
        self.alpha, self.gamma = alpha, gamma
        self.box_loss, self.smooth_l1_beta, self.box_loss_weight = box_loss, smooth_l1_beta, box_loss_weight

    def __call__(self, predictions: Predictions, targets: Sequence[Target]) -> dict[str, Tensor]:
        """`loss_cls` and `loss_box` of this batch, divided by its foreground anchors (at least 1)."""
        sums = self.sums(predictions, targets)
        normalizer = sums.num_foreground.clamp(min=1)
        return {"loss_cls": sums.loss_cls / normalizer, "loss_box": sums.loss_box / normalizer}

    def sums(self, predictions: Predictions, targets: Sequence[Target]) -> LossSums:
        """The sums over the batch and the count they are to be divided by."""
        with torch.autocast(predictions.cls_logits.device.type, enabled=False):
            each = [
                self._image(logits, deltas, predictions.anchors, target)
                for logits, deltas, target in zip(predictions.cls_logits, predictions.box_deltas, targets, strict=True)
            ]
        return LossSums(*(torch.stack(parts).sum() for parts in zip(*each, strict=True)))

    def _image(self, logits: Tensor, deltas: Tensor, anchors: Tensor, target: Target) -> LossSums:
        matches = self.matcher(anchors, target.boxes, target.ignore_boxes)  # [R]
        foreground = (matches > BACKGROUND).nonzero()[:, 0]
        boxes, labels = target.boxes[matches[foreground]], target.labels[matches[foreground]]
        cls_targets = torch.zeros_like(logits, dtype=torch.float32)  # [R, K]
        cls_targets[foreground, labels] = 1
        counted = (matches != IGNORE)[:, None]
        loss_cls = torch.where(counted, sigmoid_focal_loss(logits, cls_targets, self.alpha, self.gamma), 0).sum()
        loss_box = self._box_loss(deltas[foreground].float(), anchors[foreground], boxes)
        return LossSums(loss_cls, loss_box * self.box_loss_weight, loss_cls.new_tensor(len(foreground)))

    def _box_loss(self, deltas: Tensor, anchors: Tensor, boxes: Tensor) -> Tensor:
        if self.box_loss == "giou":
            return giou_loss(decode_boxes(deltas, anchors), boxes, reduction="sum")
        if self.box_loss == "smooth_l1":
            return smooth_l1_loss(deltas, encode_boxes(boxes, anchors), self.smooth_l1_beta, reduction="sum")
        return l1_loss(deltas, encode_boxes(boxes, anchors), reduction="sum")


def build_criterion(config: LossConfig) -> RetinaNetLoss:
    return RetinaNetLoss(
        Matcher(
            foreground_iou=config.foreground_iou,
            background_iou=config.background_iou,
            low_quality_matches=config.low_quality_matches,
        ),
        alpha=config.alpha,
        gamma=config.gamma,
        box_loss=config.box_loss,
        smooth_l1_beta=config.smooth_l1_beta,
        box_loss_weight=config.box_loss_weight,
    )
