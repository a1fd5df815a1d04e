"""Predictions and targets to losses: match, focal loss on all anchors that count, box loss on the foreground."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from retinanet.boxes import decode_boxes, encode_boxes
from retinanet.config import LossConfig
from retinanet.losses import focal_loss_sum, giou_loss, l1_loss, smooth_l1_loss
from retinanet.matcher import Matcher
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
        logits, deltas, anchors = predictions.cls_logits, predictions.box_deltas, predictions.anchors
        with torch.autocast(logits.device.type, enabled=False):
            images = zip(logits, targets, strict=True)
            matches = [self.matcher(anchors, target.boxes, target.ignore_boxes) for _, target in images]  # [R] each
            pairs = list(zip(matches, targets, strict=True))
            labels = torch.stack([_anchor_labels(match, target.labels) for match, target in pairs])  # [B, R]
            image, anchor = (labels >= 0).nonzero(as_tuple=True)  # of the F foreground anchors
            boxes = torch.cat([target.boxes[match[match >= 0]] for match, target in pairs])  # [F, 4]
            loss_cls = focal_loss_sum(logits.flatten(0, 1), labels.flatten(), self.alpha, self.gamma)
            loss_box = self._box_loss(deltas[image, anchor].float(), anchors[anchor], boxes)
        num_foreground = torch.full((), len(boxes), dtype=torch.float32, device=logits.device)
        return LossSums(loss_cls, loss_box * self.box_loss_weight, num_foreground)

    def _box_loss(self, deltas: Tensor, anchors: Tensor, boxes: Tensor) -> Tensor:
        if self.box_loss == "giou":
            return giou_loss(decode_boxes(deltas, anchors), boxes, reduction="sum")
        if self.box_loss == "smooth_l1":
            return smooth_l1_loss(deltas, encode_boxes(boxes, anchors), self.smooth_l1_beta, reduction="sum")
        return l1_loss(deltas, encode_boxes(boxes, anchors), reduction="sum")


def _anchor_labels(matches: Tensor, labels: Tensor) -> Tensor:
    """The class of each anchor's box where it has one; BACKGROUND and IGNORE stay: [R] int64."""
    classes = torch.cat([labels, labels.new_zeros(1)])  # so that an image without boxes can be indexed too
    return torch.where(matches >= 0, classes[matches.clamp(min=0)], matches)


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
