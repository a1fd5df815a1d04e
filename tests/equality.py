"""Whether an imported detector finds what the original finds, in the same pixels."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from peers import Found, pad
from PIL import Image
from torch import Tensor

from retinanet.checkpoint import Checkpoint
from retinanet.postprocess import build_postprocessor

SCORES, PIXELS = 1e-4, 0.01  # what "the same" allows


class Agreement(NamedTuple):
    """`share` of the expected detections that are there again, and the largest differences among those."""

    count: int
    share: float
    score: float
    pixels: float


def compare(ours: Sequence[Found], theirs: Sequence[Found], scores: float = SCORES, pixels: float = PIXELS) -> Agreement:
    """Over all images. A detection is there again if one of ours has its label, its score and its box."""
    assert len(ours) == len(theirs)
    count = same = 0
    worst_score = worst_pixels = 0.0
    for a, b in zip(ours, theirs):
        count += max(len(a.scores), len(b.scores))
        if not len(a.scores) or not len(b.scores):
            continue
        score = (b.scores[:, None] - a.scores).abs()  # [theirs, ours]
        shift = (b.boxes[:, None] - a.boxes).abs().amax(2)
        good = (b.labels[:, None] == a.labels) & (score <= scores) & (shift <= pixels)
        distance = torch.where(good, score / scores + shift / pixels, torch.inf)
        nearest = distance.argmin(1)
        matched = {int(n): row for row, n in enumerate(nearest) if good[row, n]}  # each of ours counts once
        same += len(matched)
        for n, row in matched.items():
            worst_score, worst_pixels = max(worst_score, float(score[row, n])), max(worst_pixels, float(shift[row, n]))
    return Agreement(count, same / max(count, 1), worst_score, worst_pixels)


def pictures(folder: Path, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Different photographs brought to these (height, width): uint8 [3, height, width]."""
    files = sorted((folder / "coco_mini" / "val2017").glob("*.jpg"))
    found = []
    for file, (height, width) in zip(files, sizes):
        with Image.open(file) as image:
            small = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
        found.append(torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(height, width, 3).permute(2, 0, 1))
    assert len(found) == len(sizes)
    return found


def detect(checkpoint: Checkpoint, images: Sequence[Tensor], originals: Sequence[tuple[int, int]] | None = None) -> list[Found]:
    """What the checkpoint's detector finds in a batch of RGB images [3, h, w] on the 0..255 scale, in float32."""
    with torch.inference_mode():
        sizes = torch.tensor([image.shape[1:] for image in images])
        predictions = checkpoint.build()(pad([image.float() for image in images]), sizes)
        postprocess = build_postprocessor(checkpoint.config.postprocess, checkpoint.categories)
        detections = postprocess(predictions, sizes, None if originals is None else torch.tensor(originals))
    return [Found(found.boxes, found.scores, found.labels) for found in detections]


def changeable(checkpoint: Checkpoint) -> Checkpoint:
    """A copy whose config and dict of weights may be changed."""
    return replace(checkpoint, config=checkpoint.config.model_copy(deep=True), model=dict(checkpoint.model))
