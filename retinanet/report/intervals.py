"""The twelve COCO numbers of each class for images counted any number of times: bootstrap intervals, and parts of the data."""

import numpy as np
from tqdm import tqdm

from retinanet.evaluation.coco import NAMES
from retinanet.report.matches import IOUS, Matches

LEVELS = np.linspace(0, 1, 101)  # recall
EPSILON = np.spacing(1)  # COCOeval's guard against 0 / 0
CONFIDENCE = 95  # percent
UNDEFINED = 0.2  # of the resamples: where more have nothing to measure, the boxes are in too few images for an interval
BLOCK = 20_000_000  # weights of detections held at a time: 80 MB
LIMITS = ((0, 1), (0, 10), (0, 100), (1, 100), (2, 100), (3, 100))  # size and detections an image of AR1 .. ARl


def resample(images: int, samples: int, seed: int) -> np.ndarray:
    """How often each image is drawn in each of S bootstrap resamples, [S, I] int32."""
    return np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), samples).astype(np.int32)


def numbers(matches: Matches, weights: np.ndarray) -> np.ndarray:
    """`NAMES` [S, K, 12] of each class, image i counted `weights[s, i]` times; NaN where there is nothing to measure.

    With weights of 1 these are COCOeval's, and their means over the classes (`over_classes`) its twelve numbers.
    """
    result = np.full((len(weights), matches.classes, len(NAMES)), np.nan)
    bounds = np.searchsorted(matches.label, np.arange(matches.classes + 1))
    size = np.maximum(1, BLOCK // np.maximum(1, np.diff(bounds)))
    parts = [(k, n) for k in np.unique(matches.truth_label).tolist() for n in range(0, len(weights), size[k])]
    for label, begin in tqdm(parts, "intervals", unit="part", leave=False, delay=2):
        part, own = slice(begin, begin + size[label]), slice(*bounds[label : label + 2])
        result[part, label] = _of_class(matches, own, matches.truth_label == label, weights[part])
    return result


def over_classes(values: np.ndarray, axis: int = 1) -> np.ndarray:
    """The mean of what is not NaN; NaN where all is."""
    known = ~np.isnan(values)
    total, count = np.where(known, values, 0).sum(axis), known.sum(axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def interval(values: np.ndarray, value: float | None) -> tuple[float | None, float | None]:
    """The middle `CONFIDENCE` percent of the resamples' `values` [S], moved by their bias: their mean comes to lie on `value`.

    The envelope of a resample's curve is taken over more chance, so that AP grows a little with every resampling; summed over
    classes that is more than the interval is wide. None where there is no value, or too few resamples have one.
    """
    if value is None or not values.size or np.isnan(values).mean() > UNDEFINED:
        return None, None
    low, high = np.nanpercentile(values, [50 - CONFIDENCE / 2, 50 + CONFIDENCE / 2]) - np.nanmean(values) + value
    return min(float(low), value), max(float(high), value)


def envelope(right: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The best precision [..., H] at the recall of each hit or a higher one; `right` of the `kept` so far are hits."""
    return np.maximum.accumulate((right / (kept + EPSILON))[..., ::-1], axis=-1)[..., ::-1]


def average_precision(right: np.ndarray, kept: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """COCO's 101-point AP [S] of the hits [S, H]; only hits move the envelope. `positives` [S] are not 0."""
    reached = np.searchsorted(LEVELS, right / positives[:, None], side="right")  # levels up to each hit
    return (envelope(right, kept) * np.diff(reached, prepend=0)).sum(axis=1) / len(LEVELS)


def _of_class(matches: Matches, own: slice, truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[S, 12] of the class with the detections `own` and the boxes `truth` [A]."""
    weight, rank = weights[:, matches.image[own]], matches.rank[own]  # [S, D]
    ap, recall = np.full((4, len(IOUS), len(weights)), np.nan), np.full((len(LIMITS), len(IOUS), len(weights)), np.nan)
    for area in range(4):
        positives = weights[:, matches.truth_image[truth & matches.sought[:, area]]].sum(axis=1)
        known, divisor = positives > 0, np.maximum(positives, 1)
        for iou in range(len(IOUS) if known.any() else 0):
            hits, counted = matches.hits[own, area, iou], matches.counted[own, area, iou]
            kept = np.cumsum(weight[:, counted], axis=1, dtype=np.int32)[:, hits[counted]]
            right = weight[:, hits]
            for n, (size, most) in enumerate(LIMITS):
                if size == area:
                    recall[n, iou] = np.where(known, right[:, rank[hits] < most].sum(axis=1) / divisor, np.nan)
            right = np.cumsum(right, axis=1, dtype=np.int32)
            ap[area, iou] = np.where(known, average_precision(right, kept, divisor), np.nan)
    columns = [ap[0].mean(axis=0), ap[0, 0], ap[0, 5], *ap[1:].mean(axis=1), *recall.mean(axis=1)]
    return np.stack(columns, axis=1)
