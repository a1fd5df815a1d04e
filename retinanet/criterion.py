"""Predictions and targets to losses: match, focal loss on all anchors that count, box loss on the foreground."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from retinanet import losses
from retinanet.boxes import decode_boxes, encode_boxes
from retinanet.config import LossConfig
from retinanet.losses import focal_loss_sum
from retinanet.matcher import ATSSMatcher, Matcher
from retinanet.structures import Predictions, Target

OF_DELTAS: dict[str, Callable[..., Tensor]] = {  # each a term for each of four deltas
    "l1": losses.l1_loss,
    "smooth_l1": losses.smooth_l1_loss,
    "focal_l1": losses.focal_l1_loss,
}
OF_BOXES: dict[str, Callable[..., Tensor]] = {  # a term for each decoded box
    "iou": losses.iou_loss,
    "giou": losses.giou_loss,
    "diou": losses.diou_loss,
    "ciou": losses.ciou_loss,
    "eiou": losses.eiou_loss,
    "focal_eiou": losses.focal_eiou_loss,
}


class LossSums(NamedTuple):
    """Sums over a batch, not yet divided by the foreground of the *global* batch, which only the caller knows."""

    loss_cls: Tensor
    loss_box: Tensor
    num_foreground: Tensor  # float32, so that ranks can add it up


class RetinaNetLoss:
    """The training objective (paper sections 3 and 4.1). Computed in float32, also inside autocast.

    The classification loss runs over foreground and background anchors, the box loss over foreground anchors. Anchors
    between the two IoU thresholds and anchors inside crowd regions count in neither. `box_loss` is a name of `OF_DELTAS` or
    `OF_BOXES`, `box_loss_options` what its function of `retinanet.losses` takes besides.
    """

    def __init__(
        self,
        matcher: Matcher | ATSSMatcher | None = None,
        *,
        alpha: float | None = 0.25,
        gamma: float = 2.0,
        box_loss: str = "l1",
        box_loss_weight: float = 1.0,
        box_loss_options: Mapping[str, float] | None = None,
    ) -> None:
        self.matcher = matcher or Matcher()
        self.alpha, self.gamma = alpha, gamma
        self.decodes, self.box_loss_weight = box_loss in OF_BOXES, box_loss_weight
        self.box_loss = partial((OF_DELTAS | OF_BOXES)[box_loss], **(box_loss_options or {}))

    def __call__(self, predictions: Predictions, targets: Sequence[Target]) -> dict[str, Tensor]:
        """`loss_cls` and `loss_box` of this batch, divided by its foreground anchors (at least 1)."""
        sums = self.sums(predictions, targets)
        normalizer = sums.num_foreground.clamp(min=1)
        return {"loss_cls": sums.loss_cls / normalizer, "loss_box": sums.loss_box / normalizer}

    def sums(self, predictions: Predictions, targets: Sequence[Target]) -> LossSums:
        """The sums over the batch and the count they are to be divided by."""
        logits, deltas, anchors = predictions.cls_logits, predictions.box_deltas, predictions.anchors
        with torch.autocast(logits.device.type, enabled=False):
            images, levels = zip(logits, targets, strict=True), predictions.level_sizes
            matches = torch.stack([self.matcher(anchors, t.boxes, t.ignore_boxes, levels) for _, t in images])  # [B, R]
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
        if self.decodes:
            return self.box_loss(decode_boxes(deltas, anchors), boxes)
        return self.box_loss(deltas, encode_boxes(boxes, anchors)).sum(dim=1)


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


def build_criterion(config: LossConfig, anchors_per_cell: int = 9) -> RetinaNetLoss:
    matcher: Matcher | ATSSMatcher
    if config.matcher == "atss":
        matcher = ATSSMatcher(topk=config.atss_topk, anchors_per_cell=anchors_per_cell)
    else:
        matcher = Matcher(
            foreground_iou=config.foreground_iou,
            background_iou=config.background_iou,
            low_quality_matches=config.low_quality_matches,
        )
    options = {
        "smooth_l1": {"beta": config.smooth_l1_beta},
        "focal_l1": {"beta": config.focal_l1_beta},
        "focal_eiou": {"gamma": config.focal_eiou_gamma},
    }
    return RetinaNetLoss(
        matcher,
        alpha=config.alpha,
        gamma=config.gamma,
        box_loss=config.box_loss,
        box_loss_weight=config.box_loss_weight,
        box_loss_options=options.get(config.box_loss),
    )
