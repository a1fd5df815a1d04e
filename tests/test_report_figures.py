"""A report's figures: COCOeval itself is the reference, on images that are really drawn twice, or counted by hand."""

import contextlib
import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retinanet.data.annotations import AnnotationRow, Annotations, ImageRow
from retinanet.errors import UserError
from retinanet.evaluation.coco import NAMES, evaluate_rows
from retinanet.report import intervals
from retinanet.report.curves import calibration, precision_curves, score_curves
from retinanet.report.figures import build_figures, write_figures
from retinanet.report.intervals import interval, numbers, over_classes, resample
from retinanet.report.matches import Seen, find_matches, read_matches, write_matches
from retinanet.report.write import write_report
from retinanet.structures import Category

NOTHING = np.empty((0, 7))
Box = tuple[int, int, list[float]]  # image, label, [x, y, width, height]


def data_set(boxes: list[Box], images: int, names: str = "abc", crowd: tuple[int, ...] = ()) -> Annotations:
    """Images 10, 11, ... and classes 4, 5, ...; `crowd` are places in `boxes`."""
    rows = [AnnotationRow(i, n + 1, k, box, box[2] * box[3], n in crowd) for n, (i, k, box) in enumerate(boxes)]
    categories = [Category(4 + k, name) for k, name in enumerate(names)]
    return Annotations.pack("drawn", Path(), categories, [ImageRow(10 + i, f"{i}.png", 400, 400) for i in range(images)], rows)


def detections(*found: tuple[int, int, list[float], float]) -> np.ndarray:
    return np.array([[10 + i, *box, score, 4 + k] for i, k, box, score in found])


def random_set(seed: int, images: int = 12, tied: bool = False) -> tuple[list[Box], tuple[int, ...], np.ndarray]:
    """Boxes of all sizes, some crowds, images without any; detections near them, of other classes, and elsewhere."""
    rng = np.random.default_rng(seed)
    boxes: list[Box] = []
    rows = []
    for image in range(images):
        for _ in range(0 if image % 5 == 4 else int(rng.integers(1, 7))):
            side, label = float(rng.choice([14, 60, 150])), int(rng.integers(0, 3))
            box = [*rng.uniform(0, 250, 2), *rng.uniform(0.7 * side, 1.3 * side, 2)]
            boxes.append((image, label, box))
            for _ in range(int(rng.integers(0, 4))):
                moved = np.array(box) + rng.normal(0, 0.12 * side, 4)
                rows.append([image, *moved[:2], *np.abs(moved[2:]), rng.random(), label if rng.random() < 0.8 else 1])
        for _ in range(2):
            rows.append([image, *rng.uniform(0, 300, 2), *rng.uniform(5, 90, 2), rng.random(), rng.integers(0, 3)])
    found = np.array(rows) + np.array([10, 0, 0, 0, 0, 0, 4])
    found[:, 5] = np.round(found[:, 5], 1 if tied else 9)
    return boxes, tuple(np.flatnonzero(rng.random(len(boxes)) < 0.1).tolist()), found


def figures_of(rows: np.ndarray, truth: Annotations, samples: int = 20) -> dict[str, Any]:
    seen = Seen(rows, truth)
    return build_figures(seen, *find_matches(seen), evaluate_rows(rows, truth), title="a test", samples=samples)


def as_listed(values: np.ndarray, metrics: dict[str, Any]) -> None:
    """`values` [K, 12] are those of `evaluate_rows`."""
    expected = [np.nan if metrics[name] is None else metrics[name] for name in NAMES]
    np.testing.assert_allclose(over_classes(values[None])[0], expected, rtol=0, atol=1e-9)
    for row, of_class in zip(values, metrics["per_class"].values(), strict=True):
        listed = [np.nan if of_class[name] is None else of_class[name] for name in ("AP", "AP50", "AR100")]
        np.testing.assert_allclose(row[[0, 1, 8]], listed, rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_numbers_of_images_counted_once_are_cocoevals(seed: int) -> None:
    boxes, crowd, rows = random_set(seed, tied=seed == 0)
    truth = data_set(boxes, 12, crowd=crowd)
    matches, _ = find_matches(Seen(rows, truth))
    as_listed(numbers(matches, np.ones((1, 12), np.int32))[0], evaluate_rows(rows, truth))


def test_numbers_of_real_results_are_the_published_ones(real_data: Path) -> None:
    from retinanet.data.coco import load_coco
    from retinanet.evaluation.run import read_results

    folder = real_data / "evaluation"
    truth = load_coco(folder / "instances_val2014_100.json", folder)
    rows = read_results(folder / "instances_val2014_fakebbox100_results.json", truth)
    matches, _ = find_matches(Seen(rows, truth))
    as_listed(numbers(matches, np.ones((1, 100), np.int32))[0], evaluate_rows(rows, truth))
    assert over_classes(numbers(matches, np.ones((1, 100), np.int32)))[0, 0] == pytest.approx(0.504581, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_images_counted_several_times_are_as_if_they_stood_there_so_often(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also not at all; and several resamples at once are each as if alone."""
    boxes, crowd, rows = random_set(seed)
    weights = np.stack([np.ones(12, np.int32), np.random.default_rng(seed).integers(0, 4, 12).astype(np.int32)])
    matches, _ = find_matches(Seen(rows, data_set(boxes, 12, crowd=crowd)))
    copies = [image for image, often in enumerate(weights[1]) for _ in range(often)]
    copied_boxes = [(new, k, box) for new, old in enumerate(copies) for i, k, box in boxes if i == old]
    marks = [n in crowd for old in copies for n, (i, _, _) in enumerate(boxes) if i == old]
    copied_rows = [rows[rows[:, 0] == 10 + old] + np.array([new - old, *[0] * 6]) for new, old in enumerate(copies)]
    truth = data_set(copied_boxes, len(copies), crowd=tuple(np.flatnonzero(marks).tolist()))
    as_listed(numbers(matches, weights)[1], evaluate_rows(np.concatenate(copied_rows), truth))
    monkeypatch.setattr(intervals, "BLOCK", 1)  # one resample at a time
    as_listed(numbers(matches, weights)[1], evaluate_rows(np.concatenate(copied_rows), truth))


@pytest.mark.parametrize("tied", [False, True])
def test_precision_curves_are_pycocotools_to_the_last_bit(tied: bool) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    boxes, _, rows = random_set(7, tied=tied)
    truth = data_set([box for box in boxes if box[1] != 2], 12, crowd=(1, 5))  # a class without boxes
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO()
        gt.dataset = truth.to_coco()
        gt.createIndex()
        results = [{"image_id": int(r[0]), "bbox": r[1:5], "score": r[5], "category_id": int(r[6])} for r in rows.tolist()]
        reference = COCOeval(gt, gt.loadRes(results), "bbox")
        reference.evaluate()
        reference.accumulate()
    expected = reference.eval["precision"][:, :, :, 0, 2]
    found = precision_curves(find_matches(Seen(rows, truth))[0])
    assert (expected[..., 2] == -1).all() and np.isnan(found[..., 2]).all()
    np.testing.assert_array_equal(found[..., :2], expected[..., :2])
    curves = figures_of(rows, truth)["curves"]
    assert curves["precision"]["0.50"] == pytest.approx(expected[0, :, :2].mean(axis=1).tolist())
    assert curves["precision"]["mean"] == pytest.approx(expected[:, :, :2].mean(axis=(0, 2)).tolist())


def test_f1_precision_and_recall_against_the_score() -> None:
    """Scores .9 right, .6 wrong, .6 right, .2 wrong, of 4 boxes: from .6 on (kept 3, right 2) precision 2/3, recall 2/4,
    F1 2 * 2 / (3 + 4)."""
    rates = score_curves(np.array([0.9, 0.6, 0.6, 0.2]), np.array([True, False, True, False]), 4, np.array([0, 0.6, 0.61, 1]))
    np.testing.assert_allclose(rates["p"], [2 / 4, 2 / 3, 1, np.nan])
    np.testing.assert_allclose(rates["r"], [2 / 4, 2 / 4, 1 / 4, 0])
    np.testing.assert_allclose(rates["f1"], [4 / 8, 4 / 7, 2 / 5, 0])


def test_classes_stand_at_their_best_f1() -> None:
    boxes, crowd, rows = random_set(3)
    curves = (figures := figures_of(rows, data_set(boxes, 12, crowd=crowd)))["curves"]["by_class"]
    for row in figures["classes"]:
        assert row["f1"] >= max(value for value in curves[row["name"]]["f1"] if value is not None)
        assert row["f1"] == pytest.approx(2 * row["precision"] * row["recall"] / (row["precision"] + row["recall"]))


def test_calibration() -> None:
    """In 0.8 .. 0.9 a mean of 0.85 with half right: 0.35 apart; one of 1.0 right; 0.02 wrong. ECE (2 * .35 + 0 + .02) / 4."""
    result = calibration(np.array([0.8, 0.9 - 1e-9, 1.0, 0.02]), np.array([True, False, True, False]))
    assert result["ece"] == pytest.approx((2 * 0.35 + 0.02) / 4)
    assert [row["count"] for row in result["bins"]] == [1, 0, 0, 0, 0, 0, 0, 0, 2, 1]
    assert result["bins"][8]["precision"] == 0.5 and result["bins"][8]["confidence"] == pytest.approx(0.85)
    assert result["bins"][9]["high"] == 1 and np.isnan(result["bins"][1]["precision"])


def test_parts_by_size_and_crowding() -> None:
    """Each group of images is as a data set of its own."""
    boxes, crowd, rows = random_set(5)
    truth = data_set(boxes, 12, crowd=crowd)
    figures = figures_of(rows, truth)
    metrics = evaluate_rows(rows, truth)
    assert [row["AP"] for row in figures["by_size"]] == [metrics[name] for name in ("APs", "APm", "APl")]
    assert sum(row["boxes"] for row in figures["by_size"]) == len(boxes) - len(crowd)  # none lies on a limit
    number = np.bincount([i for n, (i, _, _) in enumerate(boxes) if n not in crowd], minlength=12)
    for name, low, high in (("1 box", 1, 1), ("2-4 boxes", 2, 4), ("5-9 boxes", 5, 9)):
        chosen = np.flatnonzero((number >= low) & (number <= high))
        row = next(row for row in figures["by_crowding"] if row["name"] == name)
        part = evaluate_rows(rows[np.isin(rows[:, 0], 10 + chosen)], truth.select(chosen.tolist()))
        assert row["AP50"] == pytest.approx(part["AP50"], abs=1e-9) and row["AR100"] == pytest.approx(part["AR100"], abs=1e-9)
        assert (row["images"], row["boxes"]) == (len(chosen), number[chosen].sum())


def test_the_interval_of_a_share() -> None:
    """400 images with a box each, 240 of them found and nothing else: AR100 is a share, 0.6 +- 1.96 * sqrt(.6 * .4 / 400)."""
    box = [10.0, 10.0, 50.0, 50.0]
    truth = data_set([(i, 0, box) for i in range(400)], 400, "a")
    rows = detections(*[(i, 0, box, 0.9) for i in range(240)])
    recall = figures_of(rows, truth, samples=2000)["summary"][8]
    assert recall["name"] == "AR100" and recall["value"] == pytest.approx(0.6)
    assert [recall["low"], recall["high"]] == pytest.approx([0.552, 0.648], abs=0.006)
    assert resample(400, 3, 1).sum(axis=1).tolist() == [400] * 3


def test_an_interval_lies_around_its_value() -> None:
    values = np.linspace(0.5, 0.7, 2001)  # its middle 95 %: 0.505 .. 0.695; its mean, 0.6, comes to lie on 0.55
    assert interval(values, 0.55) == pytest.approx((0.455, 0.645))
    assert interval(values, None) == interval(np.empty(0), 0.5) == (None, None)
    values[::3] = np.nan  # boxes in one image: a third of the resamples are without it
    assert interval(values, 0.55) == (None, None)
    assert interval(np.r_[np.zeros(98), np.ones(2)], 0.02)[1] == 0.02  # never without the value


def test_what_has_few_images_has_no_interval() -> None:
    box = [10.0, 10.0, 50.0, 50.0]
    one = figures_of(detections((0, 0, box, 0.9)), data_set([(0, 0, box)], 1))
    assert one["summary"][0]["value"] == pytest.approx(1) and one["summary"][0]["low"] is None
    boxes: list[Box] = [(0, 0, box), *((i, 1, box) for i in range(30))]
    rows = detections(*[(i, 1, box, 0.9) for i in range(30)])
    classes = figures_of(rows, data_set(boxes, 30), samples=200)["classes"]
    assert (classes[0]["AP"], classes[0]["AP_low"]) == (0, None)
    assert [classes[1]["AP_low"], classes[1]["AP_high"]] == pytest.approx([1, 1])


FORM = ["about", "summary", "classes", "curves", "confusion", "errors", "calibration", "by_size", "by_crowding", "findings"]
SOME: list[Box] = [(0, 0, [10, 10, 40, 40]), (0, 1, [100, 100, 40, 40]), (1, 0, [10, 10, 200, 200])]
FOUND = detections((0, 0, [10, 10, 40, 40], 0.5), (0, 1, [12, 10, 40, 40], 0.5), (2, 1, [5, 5, 9, 9], 0.5))


@pytest.mark.parametrize(
    ("boxes", "rows", "names", "crowd"),
    [
        (SOME, NOTHING, "abc", ()),
        ([], FOUND, "abc", ()),
        ([], NOTHING, "a", ()),
        (SOME, FOUND, "abc", ()),  # equal scores, a class without truth, an image without boxes
        (SOME, FOUND, "abc", (0, 1, 2)),
        (SOME[:1], FOUND[:1], "a", ()),
        (SOME, FOUND * [1, 1, 1, 0, 1, 1, 1], "ab", ()),  # boxes without area
        (SOME, FOUND + np.array([0, 0, 0, 0, 0, 3, 0]), "ab", ()),  # scores that are no probabilities
    ],
)  # fmt: skip
def test_whatever_comes_has_the_same_form_and_no_nan(
    boxes: list[Box], rows: np.ndarray, names: str, crowd: tuple[int, ...], tmp_path: Path
) -> None:
    figures = figures_of(rows, data_set(boxes, 3, names, crowd))
    assert list(figures) == FORM
    write_figures(figures, tmp_path)
    assert json.loads((tmp_path / "figures.json").read_text()) == figures  # NaN would have been refused
    assert [row["name"] for row in figures["summary"]] == list(NAMES)
    curves = figures["curves"]
    lists = [*curves["precision"].values(), *(curves[key] for key in ("recall", "score", "f1", "p", "r"))]
    assert {len(values) for values in lists} == {101}
    assert figures["about"]["boxes"] == len(boxes) - len(crowd) and figures["about"]["detections"] == len(rows)
    assert len(figures["confusion"]["counts"]) == len(names) + 1
    if not figures["about"]["boxes"]:
        assert figures["summary"][0]["value"] is figures["errors"]["AP50"] is curves["precision"]["mean"][0] is None


def test_tables_are_safe_for_spreadsheets(tmp_path: Path) -> None:
    truth = data_set(SOME, 3, "ab")
    truth.categories = (Category(4, '=1+1,"x"'), Category(5, "-b"))
    write_figures(figures_of(FOUND, truth), tmp_path)
    with (tmp_path / "classes.csv").open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.reader(file))
    assert [row[0] for row in rows] == ["name", '\'=1+1,"x"', "'-b"]
    assert [len(row) for row in rows] == [11] * 3 and float(rows[1][2]) >= 0
    assert (tmp_path / "confusion.csv").read_text("utf-8-sig").splitlines()[1].startswith('"\'=1+1,""x""",1,')
    names = [line.split(",")[0] for line in (tmp_path / "errors.csv").read_text("utf-8-sig").splitlines()]
    assert names[1:] == [
        "class",
        "localisation",
        "both",
        "duplicate",
        "background",
        "missed",
        "false_positives",
        "false_negatives",
    ]
    assert len((tmp_path / "summary.csv").read_text().splitlines()) == 13


def test_matches_on_disk_give_the_same_numbers(tmp_path: Path) -> None:
    boxes, crowd, rows = random_set(2)
    matches, _ = find_matches(Seen(rows, data_set(boxes, 12, crowd=crowd)))
    write_matches(tmp_path / "matches.npz", matches)
    again, weights = read_matches(tmp_path / "matches.npz"), resample(12, 5, 0)
    np.testing.assert_array_equal(numbers(again, weights), numbers(matches, weights))
    assert again.fingerprint == matches.fingerprint


def test_a_name_that_is_no_utf8_stops_no_report(tmp_path: Path) -> None:
    boxes, crowd, rows = random_set(2)
    truth = data_set(boxes, 12, crowd=crowd)
    write_report(rows, truth, evaluate_rows(rows, truth), tmp_path, "r\udcff.json")
    assert "<h1>r?.json: evaluation</h1>" in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_scores_that_are_no_probabilities_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    boxes, crowd, rows = random_set(2)
    truth = data_set(boxes, 12, crowd=crowd)
    write_report(rows, truth, evaluate_rows(rows, truth), tmp_path, "r")
    assert "outside 0..1" not in capsys.readouterr().out
    rows[:2, 5] = 90, -1
    write_report(rows, truth, evaluate_rows(rows, truth), tmp_path, "r")
    assert f"note: 2 of {len(rows)} scores lie outside 0..1" in capsys.readouterr().out


@pytest.mark.parametrize("change", [b"", b"not an archive", "image", "label", "truth_image", "hits", "rank", "sought"])
def test_damaged_matches_are_named(tmp_path: Path, change: bytes | str) -> None:
    boxes, crowd, rows = random_set(2)
    file = tmp_path / "matches.npz"
    write_matches(file, find_matches(Seen(rows, data_set(boxes, 12, crowd=crowd)))[0])
    if isinstance(change, bytes):
        file.write_bytes(change)
    else:
        with np.load(file) as held:
            content = dict(held)
        changes = {
            "hits": lambda c: c[:-1],
            "rank": lambda c: c[:-1],
            "sought": lambda c: c.astype(int),
            "label": lambda c: c + 0.5,
        }
        content[change] = changes.get(change, lambda column: column + 100)(content[change])
        np.savez(file, **content)
    with pytest.raises(UserError, match=r"matches\.npz: cannot be read: .*write the report again"):
        read_matches(file)


def test_the_fingerprint_is_of_the_data_not_of_its_order() -> None:
    boxes, _, _ = random_set(4)
    first = Seen(NOTHING, data_set(boxes, 12)).fingerprint()
    assert Seen(NOTHING, data_set(boxes[::-1], 12)).fingerprint() == first
    moved = [(i, k, [box[0] + 1e-3 * (n == 0), *box[1:]]) for n, (i, k, box) in enumerate(boxes)]
    assert Seen(NOTHING, data_set(moved, 12)).fingerprint() != first
    assert math.isfinite(int(first, 16))
