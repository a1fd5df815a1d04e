"""What happens to a picture between its file and the batch: augmentation (training only), then the resize."""

import inspect
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from retinanet.config import AugmentConfig, InputConfig
from retinanet.data.images import resize, resized_size
from retinanet.errors import UserError, did_you_mean
from retinanet.structures import Target


class Resize:
    """Scales the shorter side to `short_edge`, the longer to at most `long_edge`; boxes follow."""

    def __init__(self, short_edge: int, long_edge: int) -> None:
        self.short_edge, self.long_edge = short_edge, long_edge

    def __call__(self, image: np.ndarray, target: Target, seed: Sequence[int]) -> tuple[np.ndarray, Target]:
        return _resize_both(image, target, self.short_edge, self.long_edge)


class Augment:
    """An albumentations pipeline around which boxes stay valid, then a resize to one of `short_edges`.

    Everything random follows from `seed`, (seed, epoch, index of the sample): neither the number of workers nor a
    resumed run can change what a sample looks like.
    """

    def __init__(
        self,
        transforms: Sequence[dict[str, dict[str, Any]] | str],
        short_edges: Sequence[int],
        long_edge: int,
        *,
        min_visibility: float = 0.1,
    ) -> None:
        self.short_edges, self.long_edge = list(short_edges), long_edge
        self.pipeline = build_pipeline(transforms, min_visibility) if transforms else None

    def __call__(self, image: np.ndarray, target: Target, seed: Sequence[int]) -> tuple[np.ndarray, Target]:
        rng = np.random.default_rng(list(seed))
        short_edge = self.short_edges[rng.integers(len(self.short_edges))]
        if self.pipeline is not None:
            self.pipeline.set_random_seed(int(rng.integers(2**31)))
            image, target = _run_pipeline(self.pipeline, image, target)
        return _resize_both(image, target, short_edge, self.long_edge)


def _run_pipeline(pipeline: Any, image: np.ndarray, target: Target) -> tuple[np.ndarray, Target]:
    """Objects and ignore boxes move with the picture; what leaves it or loses its area is dropped."""
    boxes = torch.cat([target.boxes, target.ignore_boxes])
    moved = pipeline(image=image, bboxes=boxes.numpy(), index=np.arange(len(boxes)))
    height, width = moved["image"].shape[:2]
    corners = np.asarray(moved["bboxes"], dtype=np.float32).reshape(-1, 4).clip(0, [width, height, width, height])
    solid = (corners[:, 2:] > corners[:, :2]).all(axis=1)
    boxes = torch.from_numpy(corners[solid])
    index = torch.from_numpy(np.asarray(moved["index"], dtype=np.int64)[solid])
    is_object = index < len(target.boxes)
    labels = target.labels[index[is_object]]
    return moved["image"], Target(boxes[is_object], labels, boxes[~is_object], target.image_id)


def build_augment(config: AugmentConfig, input: InputConfig) -> Augment:
    return Augment(
        config.transforms,
        config.short_edges or [input.short_edge],
        input.long_edge,
        min_visibility=config.min_visibility,
    )


def build_pipeline(transforms: Sequence[dict[str, dict[str, Any]] | str], min_visibility: float) -> Any:
    """An albumentations.Compose from `[name, {name: {argument: value}}, ...]`.

    Raises `UserError` for an unknown name or argument (with near names), a bad value, or a transform that cannot
    move boxes.
    """
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask the network for a newer version
    import albumentations as A

    steps = [_build_transform(entry) for entry in transforms]
    boxes = A.BboxParams(
        format="pascal_voc", label_fields=["index"], min_visibility=min_visibility, clip=True, filter_invalid_bboxes=True
    )
    return A.Compose(steps, bbox_params=boxes)


def _build_transform(entry: dict[str, dict[str, Any]] | str) -> Any:
    import albumentations as A

    if isinstance(entry, dict) and len(entry) != 1:
        raise UserError(f"augment.transforms: expected one 'Name: {{arguments}}' in an entry, got {entry!r}")
    name, arguments = (entry, {}) if isinstance(entry, str) else next(iter(entry.items()))
    arguments = dict(arguments or {})
    known = {
        key: value
        for key, value in vars(A).items()
        if inspect.isclass(value) and issubclass(value, A.BasicTransform | A.BaseCompose) and not key.startswith("Base")
    }
    if name not in known:
        raise UserError(f"augment.transforms: albumentations has no transform '{name}'.{did_you_mean(name, known)}")
    accepted = [key for key in inspect.signature(known[name].__init__).parameters if key != "self"]
    for key in arguments:
        if key not in accepted:
            near = did_you_mean(key, accepted) or f" It takes {', '.join(accepted)}."
            raise UserError(f"augment.transforms: {name} has no argument '{key}'.{near}")
    if "transforms" in arguments:  # OneOf, SomeOf, Sequential ...
        arguments["transforms"] = [_build_transform(inner) for inner in arguments["transforms"]]
    try:
        transform = known[name](**arguments)
    except (TypeError, ValueError) as error:  # pydantic's ValidationError is a ValueError
        raise UserError(f"augment.transforms: {name}: {' '.join(str(error).split())}") from None
    if isinstance(transform, A.DualTransform) and A.core.type_definitions.Targets.BBOXES not in transform._targets:
        raise UserError(f"augment.transforms: {name} moves pixels but cannot move boxes with them")
    return transform


def _resize_both(image: np.ndarray, target: Target, short_edge: int, long_edge: int) -> tuple[np.ndarray, Target]:
    old = image.shape[:2]
    new = resized_size((old[0], old[1]), short_edge, long_edge)
    factor = target.boxes.new_tensor([new[1] / old[1], new[0] / old[0]] * 2)
    boxes, ignore = target.boxes * factor, target.ignore_boxes * factor
    return resize(image, new), Target(boxes, target.labels, ignore, target.image_id)
