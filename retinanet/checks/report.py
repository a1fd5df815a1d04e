"""What a check found, as text and as pictures."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from retinanet.checks.check import Check
from retinanet.checks.kinds import KINDS
from retinanet.coverage import NOT_TRAINED, REACHED
from retinanet.data.faults import Fault
from retinanet.data.images import read_image
from retinanet.visualize import draw_boxes

GREEN, RED, GREY = (30, 200, 60), (235, 30, 30), (150, 150, 150)
ORDER = ("error", "warning", "note")


def report(result: Check, numbers: Mapping[str, dict[str, Any]], named: int) -> str:
    """The numbers of each split, its anchors, and the findings by kind: `named` of each with their place, the rest counted."""
    lines = []
    for name, data in result.splits.items():
        lines += [f"\n{name}: {data.source}", _summary(numbers[name]), "", result.coverage[name].table(data)]
    by_kind: dict[str, list[tuple[str, Fault]]] = {}
    for split, findings in result.findings.items():
        for finding in findings:
            by_kind.setdefault(finding.kind, []).append((split, finding))
    for kind in sorted(by_kind, key=lambda kind: ORDER.index(KINDS[kind].severity)):
        found = by_kind[kind]
        lines.append(f"\n{KINDS[kind].severity}: {kind}: {len(found)}   -> {KINDS[kind].hint}")
        for split, finding in found[:named]:
            number = "" if finding.annotation is None else f", annotation {finding.annotation}"
            lines.append(f"  {split}: {finding.file}{number}: {finding.message}")
        if len(found) > named:
            lines.append(f"  ... and {len(found) - named} more")
    return "\n".join(lines)


def _summary(numbers: Mapping[str, Any]) -> str:
    """One line; boxes by class and by size stand in the table of the anchors."""
    images, boxes, crowds = (numbers[key] for key in ("images", "boxes", "crowds"))
    stored, trained = (
        " ... ".join(f"{height} x {width}" for height, width in numbers[key])
        for key in ("image_sizes", "image_sizes_in_training")
    )
    return (
        f"  {images} images, {numbers['images_without_boxes']} without boxes; "
        f"{boxes} boxes, {crowds} crowds ({crowds / max(1, crowds + boxes):.0%})\n"
        f"  height x width, least ... median ... largest: {stored}; trained at {trained}"
    )


def verdict(result: Check) -> str:
    """The last line: fit to train, or what to do first."""
    counts = Counter(finding.kind for findings in result.findings.values() for finding in findings)
    for severity, sentence in (("error", "not fit to train"), ("warning", "fit to train, with warnings")):
        kinds = [kind for kind in KINDS if counts[kind] and KINDS[kind].severity == severity]
        if kinds:
            what = f"{result.count(severity)} {severity}{'s' * (result.count(severity) > 1)}"
            return f"\n{sentence}: {what}. First: {kinds[0]} ({counts[kinds[0]]}): {KINDS[kinds[0]].hint}"
    return "\nfit to train"


def worst_pictures(result: Check) -> list[tuple[str, int]]:
    """(split, image index) of the pictures that can be read, by the number of boxes that no anchor reaches or are at fault."""
    ranked = []
    for split, data in result.splits.items():
        bad = np.isin(result.coverage[split].kind, (REACHED, NOT_TRAINED), invert=True)
        bad |= np.any([mask for kind, mask in result.faults[split].items() if KINDS[kind].severity != "note"], axis=0)
        scores = np.bincount(data.image_of[bad], minlength=len(data))
        ranked += [(-int(score), split, index) for index, score in enumerate(scores) if result.readable[split][index]]
    return [(split, index) for _, split, index in sorted(ranked, key=lambda entry: entry[0])]


def draw(result: Check, split: str, index: int) -> np.ndarray:
    """The picture, its boxes green where an anchor reaches them, red where none does, grey where they are not trained."""
    data, coverage = result.splits[split], result.coverage[split]
    rows = slice(data.offsets[index], data.offsets[index + 1])
    boxes = data.coco_boxes[rows].copy()
    boxes[:, 2:] += boxes[:, :2]
    colors = [{REACHED: GREEN, NOT_TRAINED: GREY}.get(kind, RED) for kind in coverage.kind[rows].tolist()]
    labels = data.labels[rows].tolist()
    captions = [data.categories[label].name for label in labels]
    return draw_boxes(read_image(data.path(index)), boxes, labels, captions, colors=colors)
