"""What is wrong with detections and what each kind of error costs, in the manner of TIDE (Bolya et al. 2020)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from retinanet.evaluation.matching import BEYOND, Pairs, assign, judge, ranks
from retinanet.report.intervals import average_precision
from retinanet.report.matches import BACKGROUND, IOUS, Seen

KINDS = ("class", "localisation", "both", "duplicate", "background", "missed")
CLASS, LOCALISATION, BOTH, DUPLICATE, NOTHING, MISSED = range(len(KINDS))
FOREGROUND = float(IOUS[0])
MOST = 2000  # findings


@dataclass
class Errors:
    """Of D detections and A boxes. Detections that COCOeval does not count (crowds, sizes) are neither right nor an error."""

    kind: np.ndarray  # [D]: place in KINDS; -1 for what is no false alarm
    box: np.ndarray  # [D]: the box that it is about, -1 for none
    iou: np.ndarray  # [D]: with that box
    hits: np.ndarray  # [D] bool
    found: np.ndarray  # [A] bool: by a hit
    missed: np.ndarray  # [A] bool: to be found, and neither found nor the box of a class or localisation error


def find_errors(seen: Seen, boxes: np.ndarray, kept: np.ndarray) -> Errors:
    """The errors among the detections `kept` [D] bool; `boxes` [D] are what each found at IoU 0.5 (`find_matches`).

    A false alarm is, the first that fits: *localisation*, the box of its class that overlaps most does so by 0.1 to 0.5;
    *class*, a box of another class overlaps by 0.5; *duplicate*, a box of its class does, which a better one took;
    *background*, nothing overlaps by 0.1; *both*, the rest: only another class, by 0.1 to 0.5. This is `tidecv`'s order.
    """
    hits, counted = judge(boxes, seen.ignored, seen.outside)
    hits, alarm = hits & kept, counted & ~hits & kept
    related = alarm[seen.pairs.detection] & ~seen.ignored[seen.pairs.box]
    same = seen.same_class
    own, own_iou = _nearest(seen.pairs_where(related & same), len(kept))
    other, other_iou = _nearest(seen.pairs_where(related & ~same), len(kept))
    cases = {
        -1: ~alarm,
        LOCALISATION: (own_iou >= BACKGROUND) & (own_iou < FOREGROUND),
        CLASS: other_iou >= FOREGROUND,
        DUPLICATE: own_iou >= FOREGROUND,
        NOTHING: other_iou < BACKGROUND,
    }
    kind = np.select([*cases.values()], [*cases], BOTH)
    by_own = np.isin(kind, (LOCALISATION, DUPLICATE))
    box, iou = np.where(by_own, own, other), np.where(by_own, own_iou, other_iou)
    found, covered = np.zeros((2, len(seen.ignored)), bool)
    found[boxes[hits]] = True
    covered[box[np.isin(kind, (CLASS, LOCALISATION))]] = True
    return Errors(kind, box, iou, hits, found, ~(seen.ignored | found | covered))


def _nearest(pairs: Pairs, detections: int) -> tuple[np.ndarray, np.ndarray]:
    """For each detection the box that overlaps most, of equal ones the first, and the IoU; -1 and 0 without one."""
    box, iou = np.full(detections, -1), np.zeros(detections)
    order = np.lexsort((-pairs.box, pairs.iou))  # of values written to one place the last stays
    box[pairs.detection[order]], iou[pairs.detection[order]] = pairs.box[order], pairs.iou[order]
    return box, iou


def costs(seen: Seen, errors: Errors) -> dict[str, Any]:
    """The figure `errors`: of each kind how many there are, and the AP50 that mending it alone would gain; None without boxes.

    Mended, the best scored class or localisation error of a box that nothing found becomes a hit; all others go, missed
    boxes too. So it is in `tidecv`, which differs in looking at the 100 best of an image rather than of each of its classes,
    in blaming detections inside crowds, and in giving AP 0 instead of none to classes without (remaining) boxes.
    """
    ap50 = mended(seen, errors, ())

    def gain(better: float | None) -> float | None:
        return None if ap50 is None or better is None else better - ap50

    counts = [*np.bincount(errors.kind[errors.kind >= 0], minlength=MISSED)[:MISSED].tolist(), int(errors.missed.sum())]
    types = [
        {"name": name, "count": count, "gain": gain(mended(seen, errors, (kind,)))}
        for kind, (name, count) in enumerate(zip(KINDS, counts, strict=True))
    ]
    hits, label, found = errors.hits, seen.label, errors.found
    return {
        "AP50": ap50,
        "types": types,
        "false_positives": gain(_ap50(seen, hits, hits, label, ~seen.ignored)),
        "false_negatives": gain(_ap50(seen, hits, hits | (errors.kind >= 0), label, found)),
    }


def mended(seen: Seen, errors: Errors, kinds: Sequence[int]) -> float | None:
    """AP50 without the errors of `kinds`; 1 if there is no box left to be found, None if there was none."""
    chosen = np.isin(errors.kind, kinds)
    put_right = chosen & _first_of_its_box(seen, errors)
    hits = errors.hits | put_right
    label = np.where(put_right, seen.annotations.labels[errors.box] if len(errors.found) else -1, seen.label)
    wanted = ~seen.ignored & ~(errors.missed & (MISSED in kinds))
    return _ap50(seen, hits, hits | ((errors.kind >= 0) & ~chosen), label, wanted)


def _first_of_its_box(seen: Seen, errors: Errors) -> np.ndarray:
    """[D] bool: class and localisation errors with the best score for a box that nothing found."""
    able = np.flatnonzero(np.isin(errors.kind, (CLASS, LOCALISATION)) & ~np.append(errors.found, False)[errors.box])
    able = able[np.argsort(-seen.score[able], kind="stable")]
    first = np.zeros(len(errors.kind), bool)
    first[able[np.unique(errors.box[able], return_index=True)[1]]] = True
    return first


def _ap50(seen: Seen, hits: np.ndarray, kept: np.ndarray, label: np.ndarray, wanted: np.ndarray) -> float | None:
    """Mean AP of the detections `kept` at IoU 0.5 over the classes that have boxes `wanted` [A]."""
    positives = np.bincount(seen.annotations.labels[wanted], minlength=seen.classes)
    if not positives.any():
        return None if seen.ignored.all() else 1.0
    order = np.flatnonzero(kept)
    order = order[np.lexsort((seen.image[order], -seen.score[order], label[order]))]
    bounds = np.searchsorted(label[order], np.arange(seen.classes + 1))
    values = []
    for number in np.flatnonzero(positives).tolist():
        place = 1 + np.flatnonzero(hits[order[bounds[number] : bounds[number + 1]]])
        values.append(average_precision(np.arange(1, len(place) + 1)[None], place[None], positives[number, None]).item())
    return float(np.mean(values))


def confusion(seen: Seen, boxes: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Truth by prediction, [K + 1, K + 1], background last.

    The detections `kept` [D] bool of an image choose, whatever their class, as in `assign` at IoU 0.5: the best score first,
    among the boxes not taken the one that overlaps most. What then lies by half in a crowd, of whatever class, is left out.
    """
    kept = kept & (boxes != BEYOND)
    pairs = seen.pairs_where(kept[seen.pairs.detection])
    rank = ranks(seen.score, seen.image)
    found = assign(pairs, rank, seen.annotations.crowd, seen.ignored, FOREGROUND, max_detections=len(rank))
    hits, counted = judge(found, seen.ignored, seen.outside)
    result = np.zeros((seen.classes + 1, seen.classes + 1), np.int64)
    truth, alarms = seen.annotations.labels, kept & counted & ~hits
    lost = ~seen.ignored
    lost[found[hits]] = False
    np.add.at(result, (truth[found[hits]], seen.label[hits]), 1)
    np.add.at(result, (seen.classes, seen.label[alarms]), 1)
    np.add.at(result, (truth[lost], seen.classes), 1)
    return result


def list_findings(seen: Seen, errors: Errors) -> list[dict[str, Any]]:
    """The figure `findings`: of each kind the worst first, a false alarm by its score, a miss by its area; kinds in turns.

    At most `MOST`, as many of each kind as there are, and of each class within it.
    """
    truth = seen.annotations
    alarms, missed = np.flatnonzero(errors.kind >= 0), np.flatnonzero(errors.missed)
    detection = np.append(alarms, np.full(len(missed), -1))
    box = np.append(errors.box[alarms], missed)
    kind = np.append(errors.kind[alarms], np.full(len(missed), MISSED))
    label = np.append(seen.label[alarms], truth.labels[missed])
    label[box >= 0] = truth.labels[box[box >= 0]]
    badness = np.append(seen.score[alarms], truth.areas[missed])
    turn = ranks(badness, kind * seen.classes + label)
    place = np.empty(len(kind), np.int64)
    place[np.lexsort((-badness, turn))] = np.arange(len(kind))
    chosen = np.argsort(ranks(-place, kind), kind="stable")[:MOST]
    chosen = chosen[np.lexsort((kind[chosen], ranks(badness[chosen], kind[chosen])))]
    return [_finding(seen, errors, KINDS[kind[n]], detection[n], box[n]) for n in chosen.tolist()]


def _finding(seen: Seen, errors: Errors, kind: str, detection: int, box: int) -> dict[str, Any]:
    truth, by_detection = seen.annotations, detection >= 0
    image = int(seen.image_at[seen.image[detection] if by_detection else seen.truth_image[box]])
    predicted = truth.categories[seen.label[detection]].name if by_detection else None
    return {
        "kind": kind,
        "image_id": int(truth.image_ids[image]),
        "file_name": truth.file_names[image],
        "class": truth.categories[truth.labels[box]].name if box >= 0 else predicted,
        "predicted": predicted,
        "score": float(seen.score[detection]) if by_detection else None,
        "box": seen.boxes[detection].tolist() if by_detection else None,
        "truth": truth.coco_boxes[box].tolist() if box >= 0 else None,
        "iou": float(errors.iou[detection]) if by_detection and box >= 0 else None,
    }
