"""What happens to a picture between its file and the batch: augmentation (training only), then the resize."""

import inspect
import os
import random
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from retinanet.config import AugmentConfig, InputConfig
from retinanet.data.images import Size, resize, resized_size
from retinanet.errors import UserError, did_you_mean
from retinanet.structures import Target

FLIPS = {"HorizontalFlip": 1, "VerticalFlip": 0}  # OpenCV's number of the axis
ABSTRACT = {"BasicTransform", "DualTransform", "ImageOnlyTransform", "Transform3D", "BaseCompose", "Lambda"}


Look = tuple[np.ndarray, Target]


class Resize:
    """Scales the shorter side to `short_edge`, the longer to at most `long_edge`; boxes follow."""

    def __init__(self, short_edge: int, long_edge: int, rounding: str = "nearest") -> None:
        self.short_edge, self.long_edge, self.rounding = short_edge, long_edge, rounding
        self.largest = (min(short_edge, long_edge), long_edge)  # sides that no result exceeds

    def result_size(self, size: Size, seed: Sequence[int]) -> Size:
        """What a picture of this (height, width) becomes."""
        return resized_size(size, self.short_edge, self.long_edge, self.rounding)

    def __call__(self, image: np.ndarray, target: Target, seed: Sequence[int], size: Size | None = None) -> Look:
        """`size` is what the boxes refer to: the picture's own, or that in full of one decoded smaller."""
        old = size or (image.shape[0], image.shape[1])
        new = self.result_size(old, seed)
        new_side, old_side = (target.boxes.new_tensor([side[1], side[0]] * 2) for side in (new, old))
        # In this order a box at the border stays at it: with new / old it could end up a rounding error outside.
        boxes, ignore = target.boxes * new_side / old_side, target.ignore_boxes * new_side / old_side
        solid, solid_ignore = _solid(boxes), _solid(ignore)
        return resize(image, new), Target(boxes[solid], target.labels[solid], ignore[solid_ignore], target.image_id)


class Augment:
    """An albumentations pipeline around which boxes stay valid, then a resize to one of `short_edges`.

    Everything random follows from `seed`, (seed, epoch, index of the sample): neither the number of workers nor a
    resumed run can change what a sample looks like.

    Where only flips move boxes, transforms are called one by one: the same pictures, without the pipeline's costs for boxes.
    """

    def __init__(
        self,
        transforms: Sequence[dict[str, dict[str, Any]] | str],
        short_edges: Sequence[int],
        long_edge: int,
        *,
        min_visibility: float = 0.1,
        rounding: str = "nearest",
    ) -> None:
        self.resizes = [Resize(short_edge, long_edge, rounding) for short_edge in short_edges]
        self.largest = (max(resize_both.largest[0] for resize_both in self.resizes), long_edge)
        self.pipeline = build_pipeline(transforms, min_visibility) if transforms else None
        self.only_flips_move = all(_flips_or_moves_nothing(step) for step in self.pipeline or ())

    def result_size(self, size: Size, seed: Sequence[int]) -> Size:
        """What a picture of this (height, width) becomes, where `only_flips_move`."""
        return self._begin(seed)[1].result_size(size, seed)

    def __call__(self, image: np.ndarray, target: Target, seed: Sequence[int], size: Size | None = None) -> Look:
        """`size` as in `Resize`; other than the picture's own only where `only_flips_move`."""
        rng, resize_both = self._begin(seed)
        if self.pipeline is None:
            return resize_both(image, target, seed, size)
        # Not set_random_seed: it gives every transform the same numbers, and two flips would always come together.
        self.pipeline.set_random_state(rng, random.Random(int(rng.integers(2**62))))
        if not self.only_flips_move:
            return resize_both(*_run_pipeline(self.pipeline, image, target), seed)
        size = size or (image.shape[0], image.shape[1])
        self.pipeline.py_random.random()  # which the pipeline would draw for itself
        for step in self.pipeline:
            image, target = _run_step(step, image, target, size)
        return resize_both(_checked(image), target, seed, size)

    def _begin(self, seed: Sequence[int]) -> tuple[np.random.Generator, Resize]:
        rng = np.random.default_rng(list(seed))
        return rng, self.resizes[rng.integers(len(self.resizes))]


def _flips_or_moves_nothing(step: Any) -> bool:
    import albumentations as A

    return type(step).__name__ in FLIPS or isinstance(step, A.ImageOnlyTransform)


def _run_step(step: Any, image: np.ndarray, target: Target, size: Size) -> Look:
    """A flip, or a transform of pixels alone. `size` (height, width) is what the boxes refer to."""
    axis = FLIPS.get(type(step).__name__)
    if axis is None:
        return np.ascontiguousarray(step(image=image)["image"]), target
    if not step.should_apply():
        return image, target
    import cv2

    boxes, ignore = target.boxes.clone(), target.ignore_boxes.clone()
    for flipped in (boxes, ignore):
        near, far = 1 - axis, 3 - axis  # x1 and x2, or y1 and y2
        flipped[:, [near, far]] = size[axis] - flipped[:, [far, near]]
    return cv2.flip(image, axis), Target(boxes, target.labels, ignore, target.image_id)


def _run_pipeline(pipeline: Any, image: np.ndarray, target: Target) -> Look:
    """Objects and ignore boxes move with the picture; what leaves it or loses its area is dropped."""
    boxes = torch.cat([target.boxes, target.ignore_boxes])
    moved = pipeline(image=image, bboxes=boxes.numpy(), index=np.arange(len(boxes)))
    picture = _checked(moved["image"])
    height, width = picture.shape[:2]
    border = np.array([width, height, width, height], dtype=np.float32)
    corners = np.asarray(moved["bboxes"], dtype=np.float32).reshape(-1, 4).clip(0, border)
    solid = (corners[:, 2:] > corners[:, :2]).all(axis=1)
    boxes = torch.from_numpy(corners[solid])
    index = torch.from_numpy(np.asarray(moved["index"], dtype=np.int64)[solid])
    is_object = index < len(target.boxes)
    labels = target.labels[index[is_object]]
    return picture, Target(boxes[is_object], labels, boxes[~is_object], target.image_id)


def _checked(picture: Any) -> np.ndarray:
    """What augmentation made of a picture. Raises `UserError` if it is no longer one."""
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise UserError(
            f"augment.transforms must leave a picture uint8 [height, width, 3], but made it {picture.dtype} "
            f"{list(picture.shape)}; leave out Normalize, ToFloat and ToTensorV2: the model normalises"
        )
    return picture  # type: ignore[no-any-return]


def build_augment(config: AugmentConfig, input: InputConfig) -> Augment:
    """Raises `UserError` also where `reduced_decode` does not go with the transforms."""
    augment = Augment(
        config.transforms,
        config.short_edges or [input.short_edge],
        input.long_edge,
        min_visibility=config.min_visibility,
        rounding=input.size_rounding,
    )
    if input.reduced_decode and not augment.only_flips_move:
        raise UserError(
            "input.reduced_decode: augment.transforms may move boxes by HorizontalFlip and VerticalFlip alone, since others "
            "count in pixels of the full picture"
        )
    return augment


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
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Got processor for bboxes")  # colours alone may change: then none moves
        return A.Compose(steps, bbox_params=boxes)


def _build_transform(entry: dict[str, dict[str, Any]] | str) -> Any:
    import albumentations as A

    name, arguments = (entry, {}) if not isinstance(entry, dict) or len(entry) != 1 else next(iter(entry.items()))
    arguments = {} if arguments is None else arguments
    if not isinstance(name, str) or not isinstance(arguments, dict) or not all(isinstance(key, str) for key in arguments):
        raise UserError(f"augment.transforms: expected a name, or one 'Name: {{argument: value}}' in an entry, got {entry!r}")
    known = {
        key: value
        for key, value in vars(A).items()
        if inspect.isclass(value) and issubclass(value, A.BasicTransform | A.BaseCompose) and key not in ABSTRACT
    }
    if name not in known:
        raise UserError(f"augment.transforms: albumentations has no transform '{name}'.{did_you_mean(name, known)}")
    accepted = [key for key in inspect.signature(known[name].__init__).parameters if key != "self"]
    for key in arguments:
        if key not in accepted:
            near = did_you_mean(key, accepted) or f" It takes {', '.join(accepted)}."
            raise UserError(f"augment.transforms: {name} has no argument '{key}'.{near}")
    if "transforms" in accepted:  # OneOf, SomeOf, Sequential ...
        inner = arguments.get("transforms")
        if not isinstance(inner, list) or not inner:
            raise UserError(f"augment.transforms: {name} needs a list 'transforms', got {inner!r}")
        arguments = {**arguments, "transforms": [_build_transform(entry) for entry in inner]}
    try:
        transform = known[name](**arguments)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error.__cause__, ValidationError):  # pydantic's, which albumentations passes on as one long text
            reason = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.__cause__.errors())
        raise UserError(f"augment.transforms: {name}: {reason}") from None
    if isinstance(transform, A.DualTransform) and A.core.type_definitions.Targets.BBOXES not in transform._targets:
        raise UserError(f"augment.transforms: {name} moves pixels but cannot move boxes with them")
    return transform


def _solid(boxes: torch.Tensor) -> torch.Tensor:
    """[N] bool: boxes with an area; of one narrower than float32 resolves there, scaling can leave none."""
    return (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
