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
            matches = torch.stack([self.matcher(anchors, t.boxes, t.ignore_boxes) for _, t in images])  # [B, R]
            labels = torch.stack([_labels(match, target.labels) for match, target in zip(matches, targets, strict=True)])
            loss_cls = focal_loss_sum(logits.flatten(0, 1), labels.flatten(), self.alpha, self.gamma)
            each = zip(matches, deltas.float(), targets, strict=True)
            pairs = [
                _pairs(match, delta, anchors, target.boxes, select=deltas.device.type == "cpu") for match, delta, target in each
            ]
            counts, *tensors = (torch.cat(parts) for parts in zip(*pairs, strict=True))
            loss_box = torch.where(counts, self._box_loss(*tensors), 0).sum()
        num_foreground = (matches >= 0).sum(dtype=torch.float32)
        return LossSums(loss_cls, loss_box * self.box_loss_weight, num_foreground)

    def _box_loss(self, deltas: Tensor, anchors: Tensor, boxes: Tensor) -> Tensor:
        """[F, 4] each -> [F]."""
        if self.box_loss == "giou":
            return giou_loss(decode_boxes(deltas, anchors), boxes)
        if self.box_loss == "smooth_l1":
            return smooth_l1_loss(deltas, encode_boxes(boxes, anchors), self.smooth_l1_beta).sum(dim=1)
        return l1_loss(deltas, encode_boxes(boxes, anchors)).sum(dim=1)


def _labels(match: Tensor, labels: Tensor) -> Tensor:
    """The class of each anchor's box where it has one; BACKGROUND and IGNORE stay: [R] int64."""
    return torch.where(match >= 0, _with_blank(labels)[match.clamp(min=0)], match)


def _pairs(
    match: Tensor, deltas: Tensor, anchors: Tensor, boxes: Tensor, *, select: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of an image's anchors: which count [F], their deltas, the anchors and their boxes, [F, 4] each.

    With `select` the foreground alone. On a GPU that would make the host wait for the device: without, it is all anchors,
    with deltas 0 and themselves as boxes where they do not count, so that no value of theirs reaches a gradient.
    """
    counts = match >= 0
    if select:
        return counts[counts], deltas[counts], anchors[counts], boxes[match[counts]]
    own = torch.where(counts[:, None], _with_blank(boxes)[match.clamp(min=0)], anchors)
    return counts, torch.where(counts[:, None], deltas, 0), anchors, own


def _with_blank(values: Tensor) -> Tensor:
    """One row more, so that an image without boxes can be indexed too."""
    return torch.cat([values, values.new_zeros(1, *values.shape[1:])])


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
