"""Anchors that follow from the data: their sizes and ratios, and where that is not enough a larger image or P2."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from retinanet.anchors import P2_STRIDES, STRIDES, build_anchors
from retinanet.config import AnchorConfig, Config, InputConfig, LossConfig, ModelConfig
from retinanet.coverage import REACHED, Coverage, anchor_coverage, best_iou, trained_boxes
from retinanet.data.annotations import Annotations
from retinanet.data.images import known_sizes
from retinanet.errors import UserError

TARGET = 0.99  # with this share of the boxes reached nothing is changed,
CLASS_TARGET, FEW = 0.9, 10  # ... and with this one of each class that has so many
SAMPLE, OF_CLASS = 3_000, 50  # boxes that the search looks at, and how many it wants of a rare class
DOUBLING = 0.02  # share of the boxes that twice the computation must bring
P2_COST = 2.9  # multiply-adds of a ResNet-50 detector with P2, against one without
SCALINGS = (1.0, 1.25, 1.5, 2.0)  # of the image's sides
BASES = [2 ** (n / 2) for n in range(7)]  # anchor sides to start from, in strides
TAILS = (0.1, 0.02)  # shares of the boxes that are wider than the first ratio of a start
NARROWEST = 16  # height / width of an anchor, or width / height
STEPS = (1 / 2, 1 / 4, 1 / 8)  # of the local search, in octaves
APART = 2 ** (1 / 3)  # nearer ratios would be the same anchor twice


@dataclass
class Suggestion:
    """What fits the data, with the coverage `before` and `after`; nothing `changed` if none that was tried does better."""

    anchors: AnchorConfig
    input: InputConfig
    before: Coverage
    after: Coverage
    fits: bool = False  # as it was
    boxes: int = 0  # that the search looked at
    cost: float = 1.0  # the computation, as a multiple of what it was
    value: float = -np.inf  # the search's score, less what the computation must bring

    @property
    def changed(self) -> bool:
        return self.after is not self.before

    @property
    def reason(self) -> str:
        """One line: what was found, or why nothing is suggested."""
        share = f"the anchors reach {self.before.share():.1%} of the boxes"
        if self.changed:
            return f"{share}, the suggested ones {self.after.share():.1%} (searched on {self.boxes} boxes)"
        return f"{share}: nothing to suggest" if self.fits else f"{share}, and none that were tried clearly more"

    def apply(self, config: Config) -> Config:
        """`config` with it; `augment.short_edges` grow with the image."""
        new = config.model_copy(deep=True)
        new.model.anchors, new.input = self.anchors, self.input
        if config.augment.short_edges is not None:
            growth = self.input.short_edge / config.input.short_edge
            new.augment.short_edges = [round(edge * growth) for edge in config.augment.short_edges]
        return new


class Variant(NamedTuple):
    """What is given to one search, and its computation as a multiple of the present detector's."""

    cost: float
    input: InputConfig
    levels: int


def suggest(
    annotations: Annotations,
    model: ModelConfig,
    input: InputConfig,
    loss: LossConfig,
    *,
    seed: int = 0,
    progress: bool = False,
) -> Suggestion:
    """Searches only if the present anchors do not fit: cheap changes first, a dearer one if it is worth its computation.

    The same for the same seed, which chooses the boxes to look at where there are many. Raises `UserError` without boxes.
    """
    annotations = replace(annotations, sizes=known_sizes(annotations, faults=[]))
    before = anchor_coverage(annotations, model, input, loss, progress=progress)
    if np.isnan(before.share()):
        raise UserError(f"{annotations.source} has no boxes to fit anchors to")
    as_it_is = Suggestion(model.anchors, input, before, before, fits=_fits(before, annotations.labels))
    if as_it_is.fits:
        return as_it_is

    def attempt(variant: Variant, num_ratios: int = 3) -> Suggestion:
        score, anchors, boxes = _search(variant, num_ratios, annotations, model.anchors, loss.foreground_iou, seed)
        after = anchor_coverage(annotations, model.model_copy(update={"anchors": anchors}), variant.input, loss)
        value = score - DOUBLING * float(np.log2(variant.cost))
        return Suggestion(anchors, variant.input, before, after, boxes=boxes, cost=variant.cost, value=value)

    best = as_it_is
    for variant in tqdm(_variants(annotations, model, input), desc="fitting anchors", disable=not progress, leave=False):
        best = max(best, attempt(variant), key=lambda found: found.value)
        if _fits(best.after, annotations.labels):
            return best
    more = attempt(Variant(best.cost, best.input, len(best.anchors.sizes)), num_ratios=5)
    if more.value > best.value + DOUBLING / 2:  # more shapes in a cell cost little, but are not what others use
        best = more
    clearly_more = best.after.share() > before.share() + DOUBLING / 4 or _fits(best.after, annotations.labels)
    return best if clearly_more else replace(as_it_is, boxes=best.boxes)


def _fits(coverage: Coverage, labels: np.ndarray) -> bool:
    trained = np.bincount(labels[coverage.kind >= REACHED])
    reached = np.bincount(labels[coverage.kind == REACHED], minlength=len(trained))
    return coverage.share() >= TARGET and bool((reached >= CLASS_TARGET * trained)[trained >= FEW].all())


def _variants(annotations: Annotations, model: ModelConfig, input: InputConfig) -> list[Variant]:
    """By rising computation: the image as it is and larger, at most twice its own resolution; with P2 or without."""
    own, levels = np.median(annotations.sizes.min(axis=1)), len(model.anchors.sizes)
    found = []
    for scaling in SCALINGS:
        short = round(input.short_edge * scaling / 32) * 32 if scaling > 1 else input.short_edge
        growth = short / input.short_edge
        if scaling == 1 or (growth > 1 and short <= 2 * own):
            larger = input.model_copy(update={"short_edge": short, "long_edge": round(input.long_edge * growth)})
            found.append(Variant(growth**2, larger, levels))
            if levels < len(P2_STRIDES):
                found.append(Variant(growth**2 * P2_COST, larger, len(P2_STRIDES)))
    return sorted(found, key=lambda variant: variant.cost)


def _search(
    variant: Variant, num_ratios: int, annotations: Annotations, like: AnchorConfig, foreground_iou: float, seed: int
) -> tuple[float, AnchorConfig, int]:
    """The best anchors found for a variant, with their score and the boxes looked at: from the best of some starts uphill
    in ever smaller steps.

    A geometry is the finest anchor's side and the ratios; sizes double from level to level.
    """
    boxes, image_sizes, weights = _sample(annotations, variant.input, seed)
    finest = (P2_STRIDES if variant.levels == len(P2_STRIDES) else STRIDES)[0]

    def scored(geometry: list[float]) -> tuple[float, list[float]]:
        if not BASES[0] <= geometry[0] / finest <= BASES[-1] or max(geometry[-1], 1 / geometry[1]) > NARROWEST:
            return -np.inf, geometry  # smaller ones would miss what lies between cells, and so would narrower ones
        iou = best_iou(build_anchors(_anchors(geometry, like, variant.levels)), boxes, image_sizes)
        return float(((iou >= foreground_iou) + 0.1 * iou) @ weights), geometry  # of equals the closer fit is better

    starts = _ratio_starts(boxes, num_ratios)
    score, best = max(scored([finest * base, *ratios]) for base in BASES for ratios in starts)
    for step in STEPS:
        before = -np.inf
        while score > before:
            before = score
            for coordinate in range(len(best)):
                for factor in (2**step, 2**-step):
                    moved = [value * factor if n == coordinate else value for n, value in enumerate(best)]
                    score, best = max((score, best), scored([moved[0], *_apart(moved[1:])]))
    return score, _anchors(best, like, variant.levels), len(boxes)


def _sample(annotations: Annotations, input: InputConfig, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Some boxes [n, 4], their image sizes [n, 2] and weights [n], half by box, half by class: a rare class counts, too."""
    trained = trained_boxes(annotations, input)
    labels = annotations.labels[trained.rows]
    of_class, classes = np.bincount(labels)[labels], len(np.unique(labels))  # [N]: boxes of the same class
    rate = np.maximum(SAMPLE / len(labels), min(OF_CLASS, SAMPLE / classes) / of_class).clip(max=1)
    weights = (1 / len(labels) + 1 / (of_class * classes)) / rate
    chosen = torch.from_numpy(np.flatnonzero(np.random.default_rng(seed).random(len(labels)) < rate))
    weight = torch.from_numpy(weights).float()[chosen]
    return trained.boxes[chosen], trained.image_sizes[chosen], weight / weight.sum()


def _ratio_starts(boxes: Tensor, num_ratios: int) -> list[list[float]]:
    """Octaves around 1, and quantiles of the boxes' own ratios."""
    sides = boxes[:, 2:] - boxes[:, :2]
    log_ratio = (sides[:, 1] / sides[:, 0]).log2().clamp(-3, 3)
    quantiles = [log_ratio.quantile(torch.linspace(tail, 1 - tail, num_ratios)) for tail in TAILS]
    octaves = torch.arange(num_ratios) - num_ratios // 2
    return [_apart((2.0**start).tolist()) for start in (octaves, *quantiles)]


def _apart(ratios: Sequence[float]) -> list[float]:
    """`ratios` in order, pushed apart from the middle one where they are nearly the same."""
    spread, middle = sorted(ratios), len(ratios) // 2
    for n in range(middle + 1, len(spread)):
        spread[n] = max(spread[n], spread[n - 1] * APART)
    for n in range(middle - 1, -1, -1):
        spread[n] = min(spread[n], spread[n + 1] / APART)
    return spread


def _anchors(geometry: Sequence[float], like: AnchorConfig, levels: int) -> AnchorConfig:
    """In round numbers, with the default's three scales an octave."""
    base = round(geometry[0] * 2) / 2
    update = {"sizes": [base * 2**n for n in range(levels)], "ratios": [round(ratio, 2) for ratio in geometry[1:]]}
    return AnchorConfig.model_validate(like.model_dump() | update | {"scales": AnchorConfig().scales})
