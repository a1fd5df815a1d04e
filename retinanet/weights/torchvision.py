"""torchvision's RetinaNet, version 1 and 2: its state dicts to our checkpoints, and back."""

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from retinanet.checkpoint import Checkpoint
from retinanet.config import Config, differences, parse_config
from retinanet.errors import UserError
from retinanet.structures import Category
from retinanet.weights import layout

UNUSED_BIAS = -20.0  # of class slots that no class has: a score of 2e-9
MOST_SLOTS = 10_000
PLAIN_STEP, NORMED_STEP = 2, 3  # layers of our heads for one of theirs: convolution, ReLU; or with a GroupNorm between
V1_SHA256 = "eeacb38b"  # how the hash of its published version 1 begins

# How torchvision's detector differs from our defaults.
GEOMETRY: dict[str, Any] = {
    "input": {"size_rounding": "floor"},
    "postprocess": {"max_detections": 300, "drop_empty": False},
}
ANCHORS: dict[str, Any] = {"offset": 0.0, "integer": True, "strides": "grid"}

# What its classes allow to differ, and what of our config has to be as it is there.
FREE = (
    "num_classes",
    "backbone",
    "backbone_weights",
    "norm",
    "norm_eps",
    "freeze_stages",
    "p6_from",
    "head_norm",
    "prior",
    "head_init",
)
BOUND = re.compile(r"model\..*|input\.(size_rounding|mean|std)|postprocess\.(clip|clamp_shrinking)")

NAMES = (  # ours, theirs
    ("backbone.{}", "backbone.body.{}"),
    ("fpn.lateral.{}.{}", "backbone.fpn.inner_blocks.{}.0.{}"),
    ("fpn.output.{}.{}", "backbone.fpn.layer_blocks.{}.0.{}"),
    ("fpn.p{}", "backbone.fpn.extra_blocks.p{}"),
    ("cls_subnet.convs.{}", "head.classification_head.conv.{}"),
    ("cls_subnet.final.{}", "head.classification_head.cls_logits.{}"),
    ("box_subnet.convs.{}", "head.regression_head.conv.{}"),
    ("box_subnet.final.{}", "head.regression_head.bbox_reg.{}"),
)


def import_torchvision_state(
    state: dict[str, Tensor], *, categories: Sequence[Category] = layout.COCO_CATEGORIES, bn_eps: float = 1e-5
) -> layout.Imported:
    """A torchvision state dict, of either key layout of version 1 or of version 2. Raises `UserError`.

    Its class slots are numbered by category id: those of `categories` are kept. `bn_eps` is the BatchNorm's, which a
    state dict cannot tell.
    """
    layout.check_mark(state, "torchvision")
    step = NORMED_STEP if "head.classification_head.conv.0.1.weight" in state else PLAIN_STEP
    ours, moved, left = layout.rename(state, lambda key: _our_name(key, step))
    slots, ids = layout.class_slots(ours), [category.id for category in categories]
    if slots != max(ids) + 1:
        raise UserError(f"it has {slots - 1} classes and background, but {max(ids)} are named{layout.coco_hint(categories)}")
    for key in ("cls_subnet.final.weight", "cls_subnet.final.bias"):
        value = ours[key]
        ours[key] = value.unflatten(0, (layout.NUM_ANCHORS, slots))[:, ids].flatten(0, 1)
    counted = any(key.endswith("num_batches_tracked") for key in state)
    model = {
        **layout.read_architecture(ours),
        "norm": "batch" if counted else "frozen",
        "norm_eps": bn_eps,
        "anchors": ANCHORS,
    }
    loss = {"box_loss": "giou"} if step == NORMED_STEP else {}  # what version 2 goes on training with
    return layout.Imported(ours, {**GEOMETRY, "model": model, "loss": loss}, tuple(categories), moved, left)


def export_torchvision_state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """A state dict that torchvision's own model loads strictly, with a class slot for each category id.

    Slots that no category has get zero weights and a bias of -20. Raises `UserError` naming the keys of a checkpoint
    whose geometry torchvision cannot have.
    """
    check_geometry(checkpoint.config)
    step = NORMED_STEP if checkpoint.config.model.head_norm == "group" else PLAIN_STEP
    ids = [category.id for category in checkpoint.categories]
    slots = max(ids) + 1
    if min(ids) < 0 or slots > MOST_SLOTS:
        raise UserError(f"torchvision numbers classes by id, 0..{MOST_SLOTS - 1}, but here they are {min(ids)}..{max(ids)}")
    state: dict[str, Tensor] = {}
    for name, value in (checkpoint.ema or checkpoint.model).items():
        if name in ("mean", "std"):
            continue
        if name.startswith("cls_subnet.final."):
            unused = UNUSED_BIAS if name.endswith("bias") else 0.0
            spread = value.new_full((layout.NUM_ANCHORS, slots, *value.shape[1:]), unused)
            spread[:, ids] = value.unflatten(0, (layout.NUM_ANCHORS, len(ids)))
            state[_their_name(name, step)] = spread.flatten(0, 1)
        else:
            state[_their_name(name, step)] = value
    return state


def check_geometry(config: Config) -> None:
    """Raises `UserError` naming the keys in which `config` is no torchvision detector."""
    free = {key: getattr(config.model, key) for key in FREE}
    theirs = parse_config({**GEOMETRY, "model": {**free, "anchors": ANCHORS}})
    keys = [
        f"{key} is {here}, there {there}" for key, (there, here) in differences(theirs, config).items() if BOUND.fullmatch(key)
    ]
    if config.model.norm == "group":
        keys.append("model.norm is group, there a BatchNorm")
    if keys:
        raise UserError(f"this checkpoint cannot become a torchvision model: {'; '.join(keys)}")


def published_eps(sha256: str) -> float | None:
    """The BatchNorm epsilon of a published file, by its hash: torchvision sets 0 for its version 1, which a file cannot say."""
    return 0.0 if sha256.startswith(V1_SHA256) else None


def _our_name(key: str, step: int) -> str:
    """Their name to ours; an unknown one stays and is found as foreign."""
    # The older layout of version 1 has a level less: inner_blocks.0.weight, and in the heads conv.0, 2, 4, 6.
    key = re.sub(r"(_blocks\.\d)\.(weight|bias)$", r"\1.0.\2", key)
    key = re.sub(r"(_head\.conv)\.([0246])\.(weight|bias)$", lambda m: f"{m[1]}.{int(m[2]) // 2}.0.{m[3]}", key)
    key = layout.translate(key, ((theirs, ours) for ours, theirs in NAMES))
    return re.sub(r"(_subnet\.convs)\.(\d+)\.([01])\.", lambda m: f"{m[1]}.{int(m[2]) * step + int(m[3])}.", key)


def _their_name(key: str, step: int) -> str:
    """Our name to theirs, in the newer layout."""
    key = re.sub(r"(_subnet\.convs)\.(\d+)\.", lambda m: f"{m[1]}.{int(m[2]) // step}.{int(m[2]) % step}.", key)
    return layout.translate(key, NAMES)
