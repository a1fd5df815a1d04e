"""detectron2's RetinaNet: its state dicts to our checkpoints."""

from typing import Any

from torch import Tensor

from retinanet.errors import UserError
from retinanet.structures import Category
from retinanet.weights import layout

# Their anchors of a cell run over sizes first, ours over ratios: ours at r * 3 + s is theirs at s * 3 + r.
RATIO_MAJOR = [s * 3 + r for r in range(3) for s in range(3)]

# How the detectors of its model zoo differ from our defaults. Mean and std are theirs in RGB order.
GEOMETRY: dict[str, Any] = {
    "input": {"mean": (123.675, 116.28, 103.53), "std": (1.0, 1.0, 1.0)},
    "postprocess": {"clip": "after_nms"},
}
MODEL: dict[str, Any] = {"norm": "frozen", "stride_in_1x1": True, "anchors": {"offset": 0.0}}
NAMES = (  # theirs, ours; what is longer comes first
    ("backbone.bottom_up.stem.conv1.norm.{}", "backbone.bn1.{}"),
    ("backbone.bottom_up.stem.conv1.{}", "backbone.conv1.{}"),
    *(
        (f"backbone.bottom_up.res{n + 1}.{{}}.{theirs}.{{}}", f"backbone.layer{n}.{{}}.{ours}.{{}}")
        for n in (1, 2, 3, 4)
        for theirs, ours in (
            ("shortcut.norm", "downsample.1"),
            ("shortcut", "downsample.0"),
            ("conv{}.norm", "bn{}"),
            ("conv{}", "conv{}"),
        )
    ),
    *((f"backbone.fpn_{kind}{n + 3}.{{}}", f"fpn.{kind}.{n}.{{}}") for n in (0, 1, 2) for kind in ("lateral", "output")),
    ("backbone.top_block.{}", "fpn.{}"),
    ("head.cls_subnet.{}", "cls_subnet.convs.{}"),
    ("head.cls_score.{}", "cls_subnet.final.{}"),
    ("head.bbox_subnet.{}", "box_subnet.convs.{}"),
    ("head.bbox_pred.{}", "box_subnet.final.{}"),
)
IGNORED = r"(anchor_generator\.|pixel_).*|.*\.num_batches_tracked"


def import_detectron2_state(
    state: dict[str, Tensor], *, categories: tuple[Category, ...] = layout.COCO_CATEGORIES, bn_eps: float = 1e-5
) -> layout.Imported:
    """A detectron2 RetinaNet with an MSRA ResNet, as all of its model zoo: stride in the 1x1 convolutions, BGR, std 1.

    A state dict cannot tell these apart from other settings. Raises `UserError`.
    """
    layout.check_mark(state, "detectron2")
    ours, moved, left = layout.rename(state, lambda key: layout.translate(key, NAMES), IGNORED)
    layout.check_classes(ours, categories)
    model = {**MODEL, **layout.read_architecture(ours), "norm_eps": bn_eps}
    stem = ours.get("backbone.conv1.weight")
    if stem is not None and stem.ndim == 4:
        ours["backbone.conv1.weight"] = stem.flip(1)  # BGR to RGB
    for key, value in ours.items():
        if ".final." in key:
            if not value.ndim or len(value) % layout.NUM_ANCHORS:
                raise UserError(f"its box output is no convolution for {layout.NUM_ANCHORS} anchors in a cell")
            ours[key] = layout.permute_anchors(value, RATIO_MAJOR)
    return layout.Imported(ours, {**GEOMETRY, "model": model}, categories, moved, left)
