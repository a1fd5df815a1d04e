"""Kinds of errors, what each costs, and confusions: planted one by one, and by `tidecv` and pycocotools."""

from typing import Any

import numpy as np
import pytest
from test_report_figures import SOME, Box, data_set, detections, figures_of, random_set

from retinanet.data.annotations import Annotations
from retinanet.evaluation.coco import evaluate_rows
from retinanet.report import errors as module
from retinanet.report.errors import KINDS, Errors, confusion, costs, find_errors, list_findings, mended
from retinanet.report.matches import Seen, find_matches

A, FAR = [0.0, 0, 100, 100], [300.0, 300, 50, 50]
TRUTH: list[Box] = [(0, 0, A), (1, 1, A)]
RIGHT = ((0, 0, A, 0.9), (1, 1, A, 0.9))


def errors_of(rows: np.ndarray, truth: Annotations) -> tuple[Seen, Errors]:
    seen = Seen(rows, truth)
    return seen, find_errors(seen, find_matches(seen)[1], np.ones(len(rows), bool))


def counts_and_gains(rows: np.ndarray, truth: Annotations) -> tuple[dict[str, int], dict[str, float]]:
    figure = costs(*errors_of(rows, truth))
    return {row["name"]: row["count"] for row in figure["types"]}, {row["name"]: row["gain"] for row in figure["types"]}


@pytest.mark.parametrize(
    ("kind", "found", "others"),
    [
        ("class", [(0, 1, A, 0.95)], {}),  # the truth of class 0, called 1
        ("localisation", [(0, 0, [60.0, 0, 100, 100], 0.95)], {}),  # IoU 40 / 160
        ("both", [(0, 1, [60.0, 0, 100, 100], 0.95)], {"missed": 1}),
        ("duplicate", [(0, 0, A, 0.99), (0, 0, [5.0, 0, 100, 100], 0.95)], {}),
        ("background", [(0, 0, FAR, 0.95)], {"missed": 1}),
        ("background", [(0, 0, [90.0, 0, 100, 100], 0.95)], {"missed": 1}),  # IoU 10 / 190: next to nothing
        ("missed", [], {}),
    ],
)
def test_each_planted_error_is_of_its_kind_and_costs(
    kind: str, found: list[tuple[int, int, list[float], float]], others: dict[str, int]
) -> None:
    """The truth of image 0 is hit by nothing, or twice; that of image 1 is found by a weaker one, so that all of them cost."""
    counts, gains = counts_and_gains(detections(*found, RIGHT[1]), data_set(TRUTH, 2, "ab"))
    assert counts == {name: int(name == kind) + others.get(name, 0) for name in KINDS}
    for name in KINDS:
        assert gains[name] > 0 if counts[name] and name in ("class", "localisation", "missed") else gains[name] >= 0
        assert gains[name] == 0 or counts[name]


def test_what_mending_gains_by_hand() -> None:
    """One class, boxes in images 0 and 1: a false alarm of 0.95 before the hit of 0.9. Precision 1/2 up to recall 1/2, which
    51 of the 101 levels reach: AP50 51/202. Without the false alarm 51/101; with the missed box gone, 1/2 everywhere."""
    truth = data_set([(0, 0, A), (1, 0, A)], 2, "a")
    figure = costs(*errors_of(detections((0, 0, FAR, 0.95), (1, 0, A, 0.9)), truth))
    gains = {row["name"]: row["gain"] for row in figure["types"]}
    assert figure["AP50"] == pytest.approx(51 / 202)
    assert gains["background"] == figure["false_positives"] == pytest.approx(51 / 101 - 51 / 202)
    assert gains["missed"] == figure["false_negatives"] == pytest.approx(1 / 2 - 51 / 202)
    assert gains["class"] == gains["localisation"] == gains["both"] == gains["duplicate"] == 0


def test_of_several_errors_at_a_box_one_is_put_right_and_the_rest_go() -> None:
    """Class 0: two boxes too far off for the truth of image 0, the better one becomes its hit; image 1 is right already, so
    that its badly placed one goes: AP50 is 1."""
    off = [60.0, 0, 100, 100]
    rows = detections((0, 0, off, 0.8), (0, 0, [0.0, 60, 100, 100], 0.7), (1, 0, A, 0.9), (1, 0, off, 0.85))
    seen, errors = errors_of(rows, data_set([(0, 0, A), (1, 0, A)], 2, "a"))
    assert errors.kind[errors.kind >= 0].tolist() == [KINDS.index("localisation")] * 3
    assert mended(seen, errors, [KINDS.index("localisation")]) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_without_any_errors_ap50_is_one(seed: int) -> None:
    boxes, crowd, rows = random_set(seed, tied=seed == 1)
    truth = data_set(boxes, 12, crowd=crowd)
    seen, errors = errors_of(rows, truth)
    assert mended(seen, errors, range(len(KINDS))) == pytest.approx(1, abs=1e-12)
    assert mended(seen, errors, []) == pytest.approx(evaluate_rows(rows, truth)["AP50"], abs=1e-12)


def test_as_tidecv_counts_and_weighs_them() -> None:
    """tidecv 1.0.1's own output for this set. Its recall levels are n / 100, COCOeval's are linspace(0, 1, 101): where a recall
    is such a number, as in one case here, they differ in the last bit, and one of 404 precisions changes places."""
    rng = np.random.default_rng(0)
    boxes: list[Box] = []
    rows: list[list[float]] = []
    for image in range(60):
        for _ in range(rng.integers(1, 7)):
            side = rng.choice([20.0, 60, 120])
            box = [*rng.uniform(0, 300, 2), *rng.uniform(0.7 * side, 1.3 * side, 2)]
            label = int(rng.integers(0, 4))
            boxes.append((image, label, box))
            for _ in range(rng.integers(0, 4)):
                moved = np.array(box) + rng.normal(0, rng.choice([0.03, 0.15, 0.3]) * side, 4)
                moved[2:] = abs(moved[2:]) + 1
                score, guess = rng.random(), label if rng.random() < 0.7 else rng.integers(0, 4)
                rows.append([image + 10, *moved, score, guess + 4])
        for _ in range(2):
            box, score = [*rng.uniform(0, 300, 2), *rng.uniform(5, 90, 2)], rng.random()
            rows.append([image + 10, *box, score, rng.integers(1, 5) + 3])
    figure = costs(*errors_of(np.array(rows), data_set(boxes, 60, "abcd")))
    assert [row["count"] for row in figure["types"]] == [54, 77, 27, 47, 114, 63]
    gains = [100 * row["gain"] for row in figure["types"]]
    assert gains == pytest.approx([5.98681284, 11.61833404, 1.64112463, 1.02483445, 5.96926028, 9.37419552], abs=100 / 404)
    assert [gains[n] for n in (0, 2, 3, 4, 5)] == pytest.approx([5.98681284, 1.64112463, 1.02483445, 5.96926028, 9.37419552])
    specials = [100 * figure[key] for key in ("AP50", "false_positives", "false_negatives")]
    assert specials == pytest.approx([23.51754755, 28.46265067, 20.82300298], abs=100 / 404)


def test_a_crowd_makes_no_error() -> None:
    """What lies in a crowd of its class is neither right nor wrong; the crowd itself is never missed."""
    inside = [(0, 0, [10.0 * n, 10, 20, 20], 0.9) for n in range(4)]
    truth = data_set([(0, 0, A), (0, 0, FAR)], 1, "a", crowd=(0,))
    counts, _ = counts_and_gains(detections(*inside), truth)
    assert counts == {**dict.fromkeys(KINDS, 0), "missed": 1}


@pytest.mark.parametrize("boxes", [[], SOME])
def test_nothing_found(boxes: list[Box]) -> None:
    """All is missed: without what is missed, nothing is wrong. Without truth there is nothing to gain."""
    figure = costs(*errors_of(np.empty((0, 7)), data_set(boxes, 3)))
    assert [row["count"] for row in figure["types"]] == [0, 0, 0, 0, 0, len(boxes)]
    assert [row["gain"] for row in figure["types"]] == ([0, 0, 0, 0, 0, 1.0] if boxes else [None] * 6)


def matrix(rows: np.ndarray, truth: Annotations, threshold: float = 0) -> list[list[int]]:
    seen = Seen(rows, truth)
    return confusion(seen, find_matches(seen)[1], seen.score >= threshold).tolist()


def test_confusion_by_hand() -> None:
    """Image 0: its box of class 0 is taken by the better scored 1, so that the right one comes too late. Image 1: right.
    Image 2: a false alarm of class 0, and a box of class 2 that nothing found. Below the threshold: left out."""
    truth = data_set([(0, 0, A), (1, 1, A), (2, 2, A)], 3)
    rows = detections((0, 0, A, 0.8), (0, 1, A, 0.9), (1, 1, A, 0.7), (2, 0, FAR, 0.6), (2, 2, A, 0.1))
    expected = [[0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [2, 0, 0, 0]]
    assert matrix(rows, truth, 0.5) == expected
    assert matrix(rows[::-1], truth, 0.5) == expected  # in whatever order they come
    expected[2] = [0, 0, 1, 0]
    assert matrix(rows, truth) == expected


def test_confusion_leaves_crowds_out() -> None:
    """A prediction of another class inside a crowd is no false alarm; one mostly outside is."""
    truth = data_set([(0, 0, A)], 1, "ab", crowd=(0,))
    assert matrix(detections((0, 1, [0.0, 0, 10, 10], 0.9)), truth) == [[0] * 3] * 3
    assert matrix(detections((0, 1, [96.0, 0, 10, 10], 0.9)), truth) == [[0] * 3, [0] * 3, [0, 1, 0]]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("threshold", [0, 0.4])
def test_confusion_of_one_class_are_pycocotools_matches(seed: int, threshold: float) -> None:
    """Coarse boxes and scores, crowds, several images."""
    from test_matching import cocoeval_matches

    rng = np.random.default_rng(seed)
    found, boxes = (rng.integers(0, [6, 6, 5, 5], (n, 4)).astype(np.float64) for n in (60, 12))
    scores, images, where = rng.integers(0, 10, 60) / 10, np.sort(rng.integers(0, 3, 60)), np.sort(rng.integers(0, 3, 12))
    crowd = rng.random(12) < 0.2
    columns = zip(where.tolist(), boxes.tolist(), boxes[:, 2:].prod(axis=1).tolist(), crowd.tolist(), strict=True)
    annotations: list[dict[str, Any]] = [
        {"id": n, "image_id": image, "category_id": 1, "bbox": box, "area": area, "iscrowd": int(ignored)}
        for n, (image, box, area, ignored) in enumerate(columns, start=1)
    ]
    kept = scores >= threshold
    expected, ignored = cocoeval_matches(found[kept], scores[kept], images[kept], annotations, 0.5)
    right = int(((expected >= 0) & ~ignored).sum())
    alarms = int(((expected < 0) & ~ignored).sum())
    truth = data_set([(int(i), 0, box.tolist()) for i, box in zip(where, boxes)], 3, "a", tuple(np.flatnonzero(crowd).tolist()))
    rows = np.column_stack([images + 10, found, scores, np.full(60, 4)])
    assert matrix(rows, truth, threshold) == [[right, int((~crowd).sum()) - right], [alarms, 0]]


def test_findings_are_the_worst_of_each_kind_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Class 0 is found at 0.9; above its best score lie two false alarms, below it one more, which is none at that score."""
    small, large = [0.0, 0, 20, 20], [0.0, 0, 200, 200]
    truth = data_set([(0, 0, A), (1, 0, A), (2, 1, small), (3, 1, large)], 4, "ab")
    rows = detections((0, 0, A, 0.9), (1, 0, A, 0.9), (2, 0, FAR, 0.95), (3, 0, FAR, 0.97), (0, 0, FAR, 0.2))
    findings = figures_of(rows, truth)["findings"]
    assert [(row["kind"], row["image_id"]) for row in findings] == [
        ("background", 13), ("missed", 13), ("background", 12), ("missed", 12)
    ]  # fmt: skip
    alarm, miss = findings[:2]
    assert alarm == {
        "kind": "background", "image_id": 13, "file_name": "3.png", "class": "a", "predicted": "a", "score": 0.97,
        "box": FAR, "truth": None, "iou": None,
    }  # fmt: skip
    assert miss == {
        "kind": "missed", "image_id": 13, "file_name": "3.png", "class": "b", "predicted": None, "score": None,
        "box": None, "truth": large, "iou": None,
    }  # fmt: skip
    monkeypatch.setattr(module, "MOST", 2)
    seen, errors = errors_of(rows, truth)
    assert [row["kind"] for row in list_findings(seen, errors)] == ["background", "missed"]


def test_findings_are_fair_over_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten surer false alarms of class 0 do not crowd out the one of class 1."""
    monkeypatch.setattr(module, "MOST", 3)
    rows = detections(*((0, 0, [40.0 * n, 300, 20, 20], 0.8) for n in range(10)), (0, 1, FAR, 0.6))
    found = list_findings(*errors_of(rows, data_set([], 1, "ab")))
    assert sorted(row["class"] for row in found) == ["a", "a", "b"]
    assert [row["score"] for row in found] == [0.8, 0.8, 0.6]


def test_a_finding_names_both_classes() -> None:
    moved = [0.0, 20, 100, 100]  # IoU 80 / 120
    truth = data_set(TRUTH, 2, "ab")
    (finding,) = (row for row in figures_of(detections((0, 1, moved, 0.9), RIGHT[1]), truth)["findings"])
    assert (finding["kind"], finding["class"], finding["predicted"]) == ("class", "a", "b")
    assert (finding["truth"], finding["box"], finding["score"]) == (A, moved, 0.9)
    assert finding["iou"] == pytest.approx(80 / 120)
