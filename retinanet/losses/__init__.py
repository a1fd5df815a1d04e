"""The losses, as pure functions and two modules; each computes in float32 (or float64, if it gets that), also inside autocast.

`reduction` is "none" (default), "mean" or "sum", as in torchvision.ops.
"""

from retinanet.losses.boxes import (
    ciou_loss,
    diou_loss,
    eiou_loss,
    focal_eiou_loss,
    focal_l1_loss,
    giou_loss,
    iou_loss,
    l1_loss,
    smooth_l1_loss,
)
from retinanet.losses.classes import (
    FocalLoss,
    SoftmaxFocalLoss,
    focal_loss_sum,
    sigmoid_cross_entropy_loss,
    sigmoid_focal_loss,
    softmax_focal_loss,
)

__all__ = [
    "FocalLoss",
    "SoftmaxFocalLoss",
    "ciou_loss",
    "diou_loss",
    "eiou_loss",
    "focal_eiou_loss",
    "focal_l1_loss",
    "focal_loss_sum",
    "giou_loss",
    "iou_loss",
    "l1_loss",
    "sigmoid_cross_entropy_loss",
    "sigmoid_focal_loss",
    "smooth_l1_loss",
    "softmax_focal_loss",
]
