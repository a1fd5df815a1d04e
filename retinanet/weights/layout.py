"""What the importers share: whose file it is, what its shapes say, the COCO classes, and a report of what went where."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from retinanet.checkpoint import Checkpoint
from retinanet.config import parse_config
from retinanet.errors import UserError
from retinanet.model import build_model
from retinanet.structures import Category

NUM_ANCHORS = 9  # 3 sizes x 3 ratios in a cell, in every project

# A tensor that only a RetinaNet of this project has.
MARKS = {
    "torchvision": "head.classification_head.cls_logits.bias",
    "detectron2": "head.cls_score.bias",
    "mmdet": "bbox_head.retina_cls.bias",
}

# Names of the 80 COCO classes in the order of their category ids.
COCO_NAMES = (  # noqa: SIM905 (80 quoted names would be harder to read)
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,"
    "snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,"
    "knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,"
    "dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,"
    "vase,scissors,teddy bear,hair drier,toothbrush"
).split(",")
UNUSED_COCO_IDS = (0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83)  # of 0..90
COCO_CATEGORIES = tuple(
    Category(number, name) for number, name in zip((i for i in range(91) if i not in UNUSED_COCO_IDS), COCO_NAMES, strict=True)
)

BACKBONES = {  # by the blocks of layer3, a block's convolutions, and the groups and width of its 3x3 convolution
    (2, 2, 1, 256): "resnet18",
    (6, 2, 1, 256): "resnet34",
    (6, 3, 1, 256): "resnet50",
    (23, 3, 1, 256): "resnet101",
    (36, 3, 1, 256): "resnet152",
    (6, 3, 32, 512): "resnext50_32x4d",
    (23, 3, 32, 1024): "resnext101_32x8d",
    (23, 3, 64, 1024): "resnext101_64x4d",
}


@dataclass
class Imported:
    """What an importer makes of a state dict: our names, the config's keys that differ, the classes, what was left."""

    state: dict[str, Tensor]
    config: dict[str, Any]
    categories: tuple[Category, ...]
    moved: list[tuple[str, str]] = field(default_factory=list)  # (theirs, ours)
    left: list[str] = field(default_factory=list)
    where: str = "the state dict"

    def checkpoint(self) -> Checkpoint:
        """Checks that every tensor of the model is there, in its shape, and no other. Raises `UserError`."""
        config = parse_config(self.config, where="imported config")
        config.model.num_classes = len(self.categories)
        config.model.backbone_weights = "none"
        model = build_model(config.model, config.input, trained_backbone=False)
        wanted = model.state_dict()
        state = {**{key: wanted[key] for key in ("mean", "std")}, **self.state}
        for key, value in wanted.items():
            if key not in state:
                raise UserError(
                    f"{self.where}: nothing in it is {key} {list(value.shape)}: another architecture, or not complete"
                )
            if state[key].shape != value.shape:
                raise UserError(
                    f"{self.where}: {key} is {list(state[key].shape)} in it, but {list(value.shape)} in such a model"
                )
        foreign = sorted(set(state) - set(wanted))
        if foreign:
            raise UserError(f"{self.where}: another architecture, this project's model has no {foreign[0]}")
        model.load_state_dict(state)
        return Checkpoint(config=config, categories=self.categories, model=model.state_dict())

    def table(self) -> str:
        """What went where, a line for each group of tensors, and what was left."""
        groups: dict[tuple[str, str], int] = {}
        for theirs, ours in self.moved:
            key = (_group(theirs), _group(ours))
            groups[key] = groups.get(key, 0) + 1
        dropped: dict[str, int] = {}
        for name in self.left:
            dropped[_group(name)] = dropped.get(_group(name), 0) + 1
        width = max(map(len, [*dropped, *(theirs for theirs, _ in groups)]), default=0)
        lines = [f"{theirs:<{width}}  ->  {ours}  ({count})" for (theirs, ours), count in groups.items()]
        lines += [f"{name:<{width}}  left out  ({count})" for name, count in dropped.items()]
        return "\n".join(lines)


def check_mark(state: dict[str, Tensor], source: str) -> None:
    """Raises `UserError` unless this is a RetinaNet of `source`; says whose it is where that shows."""
    if MARKS[source] not in state:
        other = [name for name, mark in MARKS.items() if mark in state]
        hint = f"; it is one of {other[0]}" if other else ""
        raise UserError(f"not a RetinaNet of {source}: it has no tensor {MARKS[source]}{hint}")


def rename(
    state: dict[str, Tensor], our_name: Callable[[str], str], ignored: str = ""
) -> tuple[dict[str, Tensor], list[tuple[str, str]], list[str]]:
    """The tensors under our names, the pairs (theirs, ours), and the names left: those that match `ignored`."""
    ours: dict[str, Tensor] = {}
    moved: list[tuple[str, str]] = []
    left = []
    for theirs, value in state.items():
        if re.fullmatch(ignored, theirs):
            left.append(theirs)
            continue
        name = our_name(theirs)
        if name in ours:
            raise UserError(f"{theirs} and another tensor would both be {name}")
        ours[name] = value
        moved.append((theirs, name))
    return ours, moved, left


def translate(key: str, names: Iterable[tuple[str, str]]) -> str:
    """`key` by the first of `names` that fits it, pairs such as ("a.{}.b.{}", "c.{}.{}"); itself if none does."""
    for source, target in names:
        if found := re.fullmatch(re.escape(source).replace(r"\{\}", "(.+)"), key):
            return target.format(*found.groups())
    return key


def class_slots(state: dict[str, Tensor]) -> int:
    """Classes that the output convolution has rows for, in a state of our names. Raises `UserError`."""
    weight, bias = (state.get(f"cls_subnet.final.{kind}", torch.empty(0)) for kind in ("weight", "bias"))
    if weight.ndim != 4 or bias.shape != weight.shape[:1] or len(bias) % NUM_ANCHORS or not len(bias):
        raise UserError(f"its class output is no convolution for {NUM_ANCHORS} anchors in a cell")
    return len(bias) // NUM_ANCHORS


def check_classes(state: dict[str, Tensor], categories: tuple[Category, ...]) -> None:
    """Raises `UserError` unless the class output has a slot for each of `categories` and no other."""
    slots = class_slots(state)
    if slots != len(categories):
        raise UserError(f"it has {slots} classes, but {len(categories)} are named{coco_hint(categories)}")


def coco_hint(categories: Sequence[Category]) -> str:
    """The end of a complaint about the number of classes: COCO's are assumed where none are named."""
    return ", those of COCO: name its own with --classes FILE" if tuple(categories) == COCO_CATEGORIES else ""


def read_architecture(state: dict[str, Tensor]) -> dict[str, Any]:
    """The config's keys of `model` that the shapes tell, from a state of our names. Raises `UserError`."""
    lateral, p6 = state.get("fpn.lateral.2.weight"), state.get("fpn.p6.weight")
    if lateral is None or p6 is None or lateral.ndim != 4 or p6.ndim != 4:
        raise UserError("its feature pyramid is not that of a RetinaNet: no convolutions of C5 and for P6")
    convs = [key for key, value in state.items() if key.startswith("cls_subnet.convs.") and value.ndim == 4]
    norms = [key for key, value in state.items() if key.startswith("cls_subnet.convs.") and key.endswith("weight")]
    return {
        "backbone": _backbone(state),
        "fpn_channels": len(p6),
        "p6_from": "c5" if p6.shape[1] == lateral.shape[1] else "p5",
        "head_convs": len(convs),
        "head_norm": "group" if len(norms) > len(convs) else "none",
    }


def _backbone(state: dict[str, Tensor]) -> str:
    prefix = "backbone.layer3."
    blocks = {key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)}
    convs = [state[key] for n in (1, 2, 3) if (key := f"{prefix}0.conv{n}.weight") in state]
    if len(convs) < 2 or convs[1].ndim != 4 or not convs[1].shape[1]:
        raise UserError("its backbone is no ResNet: it has no layer3 of blocks of convolutions")
    width, inputs = convs[1].shape[:2]
    name = BACKBONES.get((len(blocks), len(convs), width // inputs, width))
    if name is None:
        raise UserError(
            f"its backbone is no ResNet that this project has: layer3 is {len(blocks)} blocks of {len(convs)} convolutions, "
            f"{width} channels in {width // inputs} group(s)"
        )
    return name


def permute_anchors(rows: Tensor, order: list[int]) -> Tensor:
    """Rows [A * n, ...] of an output convolution with its anchors in another order; destination i from order[i]."""
    return rows.reshape(len(order), -1, *rows.shape[1:])[order].reshape(rows.shape)


def _group(name: str) -> str:
    """`backbone.layer1.0.conv1.weight` -> `backbone.layer1.*`: enough to see what went where."""
    parts = name.split(".")
    cut = next((n for n, part in enumerate(parts) if part.isdigit()), max(1, len(parts) - 1))
    return ".".join(parts[:cut]) + ".*" * (cut < len(parts))
