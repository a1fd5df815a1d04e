"""mmdetection's RetinaNet: its state dicts to our checkpoints."""

import re
from typing import Any

from torch import Tensor

from retinanet.structures import Category
from retinanet.weights.layout import COCO_CATEGORIES, Imported, check_classes, check_mark, read_architecture, rename, translate

GEOMETRY: dict[str, Any] = {"postprocess": {"clamp_shrinking": True}}  # dw and dh are clamped on both sides
# Their BatchNorm is never updated.
MODEL: dict[str, Any] = {"norm": "frozen", "p7_relu": False, "anchors": {"offset": 0.0}}
NAMES = (  # theirs, ours; the backbone's are the same
    ("neck.lateral_convs.{}.conv.{}", "fpn.lateral.{}.{}"),
    ("neck.fpn_convs.3.conv.{}", "fpn.p6.{}"),
    ("neck.fpn_convs.4.conv.{}", "fpn.p7.{}"),
    ("neck.fpn_convs.{}.conv.{}", "fpn.output.{}.{}"),
    ("bbox_head.cls_convs.{}.conv.{}", "cls_subnet.convs.{}.{}"),
    ("bbox_head.retina_cls.{}", "cls_subnet.final.{}"),
    ("bbox_head.reg_convs.{}.conv.{}", "box_subnet.convs.{}.{}"),
    ("bbox_head.retina_reg.{}", "box_subnet.final.{}"),
)
IGNORED = r"data_preprocessor\..*|.*\.num_batches_tracked"


def import_mmdet_state(
    state: dict[str, Tensor], *, categories: tuple[Category, ...] = COCO_CATEGORIES, bn_eps: float = 1e-5
) -> Imported:
    """An mmdet RetinaNet with a ResNet of PyTorch's style: stride in the 3x3 convolutions, RGB.

    A state dict cannot tell it from one of Caffe's style, which would give nonsense. Raises `UserError`.
    """
    check_mark(state, "mmdet")
    ours, moved, left = rename(state, _our_name, IGNORED)
    check_classes(ours, categories)
    model = {**MODEL, **read_architecture(ours), "norm_eps": bn_eps}
    return Imported(ours, {**GEOMETRY, "model": model}, categories, moved, left)


def _our_name(key: str) -> str:
    """Their name to ours; an unknown one stays and is found as foreign."""
    key = translate(key, NAMES)
    return re.sub(r"(_subnet\.convs)\.(\d+)\.", lambda m: f"{m[1]}.{2 * int(m[2])}.", key)  # we count ReLUs too
