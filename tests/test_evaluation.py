"""The COCO numbers: pycocotools driven directly is the reference, and curves small enough to count by hand."""

import contextlib
import gc
import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from retinanet.boxes import encode_boxes
from retinanet.config import InputConfig
from retinanet.criterion import RetinaNetLoss
from retinanet.data.annotations import AnnotationRow, Annotations, ImageRow
from retinanet.data.coco import load_coco
from retinanet.data.loader import evaluation_loader
from retinanet.data.transforms import Resize
from retinanet.errors import UserError
from retinanet.evaluation.coco import NAMES, Engine, best_thresholds, choose_evaluator, evaluate_rows, metrics_table
from retinanet.evaluation.run import Evaluation, evaluate_model, map_categories, read_results
from retinanet.postprocess import Postprocessor
from retinanet.results import COLUMNS, write_json
from retinanet.structures import Category, Predictions, Target

CATEGORIES: list[dict[str, Any]] = [{"id": 40, "name": "zebra"}, {"id": 2, "name": "bird"}, {"id": 5, "name": "cup"}]
NOTHING = np.empty((0, COLUMNS))
ENGINES: list[Engine] = ["pycocotools", "faster-coco-eval"]


def load(folder: Path, truth: dict[str, Any]) -> Annotations:
    file = folder / "truth.json"
    file.write_text(json.dumps(truth))
    return load_coco(file, folder)


def truth_of(boxes: list[list[float]], *, category: int = 2, **more: Any) -> dict[str, Any]:
    """One image, number 7, of 200x200 with these boxes of one class."""
    return {
        "images": [{"id": 7, "file_name": "7.png", "height": 200, "width": 200}],
        "categories": CATEGORIES,
        "annotations": [
            {"id": n, "image_id": 7, "category_id": category, "bbox": box, **more} for n, box in enumerate(boxes, start=1)
        ],
    }


def found(*boxes_and_scores: tuple[list[float], float], category: int = 2) -> np.ndarray:
    return np.array([[7, *box, score, category] for box, score in boxes_and_scores])


def pycocotools(truth: dict[str, Any], rows: np.ndarray, category_ids: list[int] | None = None) -> np.ndarray:
    """The twelve numbers, by the steps of pycocotools' own demo. Annotations are numbered from 1: it takes 0 for none."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO()
        gt.dataset = {**truth, "annotations": [{**a, "id": n} for n, a in enumerate(truth["annotations"], start=1)]}
        gt.createIndex()
        results = [
            {"image_id": int(r[0]), "bbox": r[1:5], "score": r[5], "category_id": int(r[6])} for r in np.asarray(rows).tolist()
        ]
        evaluation = COCOeval(gt, gt.loadRes(results), "bbox")
        if category_ids is not None:
            evaluation.params.catIds = category_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def random_set(seed: int) -> tuple[dict[str, Any], np.ndarray]:
    """Images with and without boxes, crowds, areas that are not width times height, an annotation 0; detections near
    the boxes, elsewhere, and in images without any box."""
    rng = np.random.default_rng(seed)
    images: list[dict[str, Any]] = [
        {"id": int(i), "file_name": f"{i}.png", "height": 400, "width": 500} for i in rng.permutation(90)[:15]
    ]
    annotations: list[dict[str, Any]] = []
    rows: list[list[float]] = []
    for n, image in enumerate(images):
        for _ in range(0 if n % 5 == 0 else int(rng.integers(1, 8))):
            side = float(rng.choice([12, 60, 150]))  # small, medium and large in COCO's sense
            box = [*rng.uniform(0, 250, 2), *rng.uniform(0.7 * side, 1.3 * side, 2)]
            category = int(rng.choice([2, 5, 40]))
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": image["id"],
                    "category_id": category,
                    "bbox": box,
                    "area": box[2] * box[3] * rng.uniform(0.5, 1),
                    "iscrowd": int(rng.random() < 0.15),
                }
            )
            for _ in range(int(rng.integers(0, 3))):
                moved = [value + rng.normal(0, 0.08 * side) for value in box]
                guess = category if rng.random() < 0.8 else 5
                rows.append([image["id"], *moved[:2], *np.abs(moved[2:]), rng.random(), guess])
        for _ in range(2):
            rows.append([image["id"], *rng.uniform(0, 300, 2), *rng.uniform(5, 90, 2), rng.random(), rng.choice([2, 5, 40])])
    return {"images": images, "categories": CATEGORIES, "annotations": annotations}, np.array(rows)


@pytest.mark.parametrize("engine", ENGINES)
def test_real_results_give_the_published_numbers(real_data: Path, engine: Engine) -> None:
    folder = real_data / "evaluation"
    truth = load_coco(folder / "instances_val2014_100.json", folder)
    metrics = evaluate_rows(read_results(folder / "instances_val2014_fakebbox100_results.json", truth), truth, engine=engine)
    listed = {  # cocoapi's own results on its own files
        "AP": 0.504581, "AP50": 0.696973, "AP75": 0.572982, "APs": 0.585626, "APm": 0.519400, "APl": 0.501398,
        "AR1": 0.386813, "AR10": 0.593680, "AR100": 0.595353, "ARs": 0.639811, "ARm": 0.566421, "ARl": 0.564291,
    }  # fmt: skip
    assert {name: metrics[name] for name in NAMES} == pytest.approx(listed, abs=1e-6)
    assert metrics["images"] == 100
    values = [row["AP"] for row in metrics["per_class"].values() if row["AP"] is not None]
    assert np.mean(values) == pytest.approx(0.504581, abs=1e-6)  # AP is the mean over the classes that occur


def assert_same_numbers(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Every number of the whole and of each class."""
    assert list(first["per_class"]) == list(second["per_class"])
    classes = zip(first["per_class"].values(), second["per_class"].values(), strict=True)
    for one, other in [({name: m[name] for name in NAMES} for m in (first, second)), *classes]:
        assert {name for name in one if one[name] is None} == {name for name in other if other[name] is None}
        known = [name for name in one if one[name] is not None]
        np.testing.assert_allclose([one[name] for name in known], [other[name] for name in known], rtol=0, atol=1e-12)


def test_both_engines_agree_on_real_results(real_data: Path) -> None:
    folder = real_data / "evaluation"
    truth = load_coco(folder / "instances_val2014_100.json", folder)
    rows = read_results(folder / "instances_val2014_fakebbox100_results.json", truth)
    first, second = (evaluate_rows(rows, truth, engine=engine) for engine in ENGINES)
    assert [first["evaluator"], second["evaluator"]] == ENGINES
    assert_same_numbers(first, second)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0, 1, 30, 250]), st.integers(0, 12), st.booleans())
def test_both_engines_agree_on_whatever_results(seed: int, number: int, objects: int, shuffled: bool) -> None:
    """Scores and boxes that are often equal, crowds, all sizes, images and classes with nothing, image ids in any order, and
    up to 250 detections of the same class in an image, of which COCO counts 100."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(4) if shuffled else np.arange(4)
    scale = 8.0 * 4.0 ** rng.integers(0, 3, (2, max(number, objects), 1))  # small, medium, large in COCO's sense
    found, boxes = (rng.integers(0, [4, 4, 6, 6], (n, 4)) * s[:n] for n, s in zip((number, objects), scale, strict=True))
    annotations = [
        AnnotationRow(int(rng.integers(0, 3)), n, int(rng.integers(0, 2)), box, box[2] * box[3], bool(rng.random() < 0.2))
        for n, box in enumerate(boxes.tolist())
    ]
    images = [ImageRow(int(i), f"{i}.png", 200, 200) for i in ids]
    truth = Annotations.pack("drawn", Path(), [Category(4, "a"), Category(2, "b"), Category(9, "c")], images, annotations)
    which = ids[rng.integers(0, 4, number) // 2], found, rng.integers(0, 5, number) / 5, rng.choice([4, 4, 4, 2, 9], number)
    rows = np.column_stack(which).astype(np.float64)
    first, second = (evaluate_rows(rows, truth, engine=engine) for engine in ENGINES)
    assert_same_numbers(first, second)
    if number:  # pycocotools cannot load an empty list
        expected = pycocotools(truth.to_coco(), rows)
        np.testing.assert_allclose([-1 if first[n] is None else first[n] for n in NAMES], expected, rtol=0, atol=1e-12)


def test_pycocotools_stands_in_where_the_faster_library_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert choose_evaluator("auto") == "faster-coco-eval"
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)  # importing it is an ImportError
    metrics = evaluate_rows(found(([10, 10, 50, 50], 0.9)), load(tmp_path, truth_of([[10, 10, 50, 50]])))
    assert metrics["AP"] == pytest.approx(1) and metrics["evaluator"] == "pycocotools"
    assert gc.isenabled()  # again
    assert metrics_table(metrics).endswith("evaluated with pycocotools")
    with pytest.raises(UserError, match=r"evaluation\.engine faster-coco-eval cannot be imported .*pip install"):
        choose_evaluator("faster-coco-eval")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("seed", range(4))
def test_random_sets_agree_with_pycocotools(tmp_path: Path, seed: int, engine: Engine) -> None:
    truth, rows = random_set(seed)
    metrics = evaluate_rows(rows, load(tmp_path, truth), engine=engine)
    expected = pycocotools(truth, rows)
    assert expected.min() >= 0  # every number is measured here
    np.testing.assert_allclose([metrics[name] for name in NAMES], expected, atol=1e-12)


def test_each_class_agrees_with_pycocotools_on_that_class_alone(tmp_path: Path) -> None:
    truth, rows = random_set(11)
    metrics = evaluate_rows(rows, load(tmp_path, truth))
    for category in CATEGORIES:
        row, expected = metrics["per_class"][category["name"]], pycocotools(truth, rows, [category["id"]])
        np.testing.assert_allclose([row["AP"], row["AP50"], row["AR100"]], expected[[0, 1, 8]], atol=1e-12)
        own = [a for a in truth["annotations"] if a["category_id"] == category["id"] and not a["iscrowd"]]
        assert row["boxes"] == len(own)
    assert np.mean([row["AP"] for row in metrics["per_class"].values()]) == pytest.approx(metrics["AP"])


def test_annotation_number_0_is_found_like_any_other(tmp_path: Path) -> None:
    """pycocotools marks an unmatched detection with annotation 0, so that a match with annotation 0 counts as none."""
    truth = truth_of([[10, 10, 50, 50]])
    truth["annotations"][0]["id"] = 0
    assert evaluate_rows(found(([10, 10, 50, 50], 0.9)), load(tmp_path, truth))["AP"] == pytest.approx(1)


def test_missing_area_and_iscrowd_are_filled_in(tmp_path: Path) -> None:
    """Without `area` pycocotools raises KeyError; 50 x 50 = 2500 lies between 32^2 and 96^2: medium."""
    metrics = evaluate_rows(found(([10, 10, 50, 50], 0.9)), load(tmp_path, truth_of([[10, 10, 50, 50]])))
    assert (metrics["AP"], metrics["APs"], metrics["APm"], metrics["APl"]) == (pytest.approx(1), None, pytest.approx(1), None)


def test_no_detections_give_zeros(tmp_path: Path) -> None:
    truth = truth_of([[0, 0, 10, 10], [20, 20, 50, 50], [80, 80, 110, 110]])  # small, medium, large
    metrics = evaluate_rows(NOTHING, load(tmp_path, truth))
    assert {name: metrics[name] for name in NAMES} == dict.fromkeys(NAMES, 0.0)
    assert metrics["detections"] == 0
    assert metrics["per_class"]["bird"] == {"AP": 0.0, "AP50": 0.0, "AR100": 0.0, "boxes": 3, "threshold": None}


@pytest.mark.parametrize("rows", [NOTHING, found(([10, 10, 50, 50], 0.9))])
@pytest.mark.parametrize("boxes", [[], [[10.0, 10.0, 50.0, 50.0]]])
def test_without_truth_there_is_nothing_to_measure(tmp_path: Path, rows: np.ndarray, boxes: list[list[float]]) -> None:
    metrics = evaluate_rows(rows, load(tmp_path, truth_of(boxes, iscrowd=1)))  # no box at all, or a crowd only
    assert {name: metrics[name] for name in NAMES} == dict.fromkeys(NAMES)
    assert all(row["AP"] is None and row["boxes"] == 0 for row in metrics["per_class"].values())
    write_json(tmp_path / "metrics.json", metrics)
    written = (tmp_path / "metrics.json").read_text()
    assert '"AP": null' in written and "NaN" not in written
    assert "AP is - (COCO's -1): the data set has no boxes to find" in metrics_table(metrics)


def test_detection_inside_a_crowd_counts_neither_way(tmp_path: Path) -> None:
    """A perfect hit and, with more confidence, one inside the crowd: as a false positive it would halve the precision."""
    truth = truth_of([[10, 10, 50, 50], [100, 100, 90, 90]])
    truth["annotations"][1]["iscrowd"] = 1
    rows = found(([110, 110, 20, 20], 0.95), ([10, 10, 50, 50], 0.9))
    assert evaluate_rows(rows, load(tmp_path, truth))["AP"] == pytest.approx(1)
    truth["annotations"][1]["bbox"] = [0, 150, 5, 5]  # the crowd is elsewhere
    assert evaluate_rows(rows, load(tmp_path, truth))["AP"] == pytest.approx(0.5)


def test_unknown_ids_are_named(tmp_path: Path) -> None:
    truth = load(tmp_path, truth_of([[10, 10, 50, 50]]))
    rows = found(([10, 10, 50, 50], 0.9), ([10, 10, 50, 50], 0.8))
    rows[1, 0] = 8
    with pytest.raises(UserError, match=r"image_id 8, which .*truth\.json does not"):
        evaluate_rows(rows, truth)
    rows[1, 0], rows[1, 6] = 7, 1  # as if labels were numbered from 1
    with pytest.raises(UserError, match=r"category_id 1, which .*truth\.json does not"):
        evaluate_rows(rows, truth)
    many = np.repeat(rows[:1], 9, axis=0)
    many[:, 0] = range(100, 109)
    with pytest.raises(UserError, match=r"image_id 100, 101, 102, 103, 104, 105, 106, 107, \.\.\., which"):
        evaluate_rows(many, truth)


def test_threshold_of_the_best_f1(tmp_path: Path) -> None:
    """4 boxes. Precision, recall, F1 from the best score down:
    .9 hit 1, 1/4, .40 | .8 hit 1, 2/4, .67 | .7 miss 2/3, 2/4, .57 | .6 hit 3/4, 3/4, .75 | .5 miss 3/5, 3/4, .67"""
    boxes: list[list[float]] = [[0, 0, 40, 40], [50, 0, 40, 40], [100, 0, 40, 40], [150, 0, 40, 40]]
    far: list[float] = [50, 150, 40, 40]
    rows = found((boxes[0], 0.9), (boxes[1], 0.8), (far, 0.7), (boxes[2], 0.6), (far, 0.5))
    truth = load(tmp_path, truth_of(boxes))
    row = evaluate_rows(rows, truth)["per_class"]["bird"]
    assert row["threshold"] == 0.6
    assert row["AR100"] == pytest.approx(3 / 4)
    # Precision at recall 0 .. 0.50 is 1, at 0.51 .. 0.75 3/4, beyond 0: (51 + 25 * 3/4) / 101
    assert row["AP50"] == pytest.approx((51 + 25 * 0.75) / 101)
    rows = np.concatenate([rows, found((far, 0.65), (far, 0.64))])  # two more misses before the third hit
    assert evaluate_rows(rows, truth)["per_class"]["bird"]["threshold"] == 0.8  # at .6 now 3/6, 3/4: F1 .60 < .67
    every = [(box, 0.3) for box in boxes]
    assert evaluate_rows(found(*every), truth)["per_class"]["bird"]["threshold"] == 0.3  # all found: F1 is 1


def test_equal_scores_stay_or_go_together(tmp_path: Path) -> None:
    """2 boxes, one found at .9; at .5 the other one and four misses. COCO's curve takes the hit first, where F1 would be 1.
    A threshold cannot: at .5 it is 2 * 2 / (6 + 2) = .50, at .9 2 * 1 / (1 + 2) = .67."""
    boxes: list[list[float]] = [[0, 0, 40, 40], [50, 0, 40, 40]]
    misses: list[tuple[list[float], float]] = [([150, 40.0 * n, 20, 20], 0.5) for n in range(4)]
    rows = found((boxes[0], 0.9), (boxes[1], 0.5), *misses)
    metrics = evaluate_rows(rows, load(tmp_path, truth_of(boxes)))
    assert metrics["per_class"]["bird"]["threshold"] == 0.9
    assert best_thresholds(metrics) == {"bird": 0.9}  # cup and zebra were not found: they have none


def test_crowds_and_their_detections_do_not_count_for_the_threshold(tmp_path: Path) -> None:
    """Boxes found at .9 and .4, and twenty detections at .6 inside a crowd, which are neither right nor wrong: F1 is 1 at
    .4. As misses they would make it 2 * 2 / (22 + 2), less than 2 * 1 / (1 + 2) at .9."""
    boxes: list[list[float]] = [[0, 0, 40, 40], [50, 0, 40, 40]]
    truth = truth_of([*boxes, [100, 100, 90, 90]])
    truth["annotations"][2]["iscrowd"] = 1
    inside: list[tuple[list[float], float]] = [([110.0 + n, 110, 40, 40], 0.6) for n in range(20)]
    rows = found((boxes[0], 0.9), *inside, (boxes[1], 0.4))
    assert evaluate_rows(rows, load(tmp_path, truth))["per_class"]["bird"]["threshold"] == 0.4


def test_class_without_a_hit_has_no_threshold(tmp_path: Path) -> None:
    truth = load(tmp_path, truth_of([[0, 0, 40, 40]]))
    metrics = evaluate_rows(found(([100, 100, 40, 40], 0.9)), truth)
    assert metrics["per_class"]["bird"]["threshold"] is None
    assert metrics["per_class"]["cup"] == {"AP": None, "AP50": None, "AR100": None, "boxes": 0, "threshold": None}


def test_table_names_what_is_not_measured(tmp_path: Path) -> None:
    table = metrics_table(evaluate_rows(found(([0, 0, 40, 40], 0.875)), load(tmp_path, truth_of([[0, 0, 40, 40]]))))
    lines = table.splitlines()
    assert lines[0] == "AP 100.0  AP50 100.0  AP75 100.0  APs -  APm 100.0  APl -"
    assert lines[1] == "AR1 100.0  AR10 100.0  AR100 100.0  ARs -  ARm 100.0  ARl -"
    assert [line.split() for line in lines[3:6]] == [
        ["bird", "100.0", "100.0", "100.0", "1", "0.88"],
        ["cup", "-", "-", "-", "0", "-"],
        ["zebra", "-", "-", "-", "0", "-"],
    ]
    assert "no boxes of that size or class" in lines[6]


class Planted(nn.Module):
    """Answers for each image the boxes planted for it, which it knows by the image's grey value.

    `boxes` are [x, y, width, height] in original pixels, like the truth.
    """

    def __init__(self, boxes: dict[int, list[list[float]]], sizes: dict[int, tuple[int, int]], labels: list[int]) -> None:
        super().__init__()
        self.boxes, self.sizes, self.labels = boxes, sizes, labels
        self.anchor = torch.tensor([0.0, 0.0, 100.0, 100.0])

    def forward(self, images: Tensor, image_sizes: Tensor) -> Predictions:
        slots = max(map(len, self.boxes.values()))
        logits = torch.full((len(images), slots, 3), -20.0)
        deltas = torch.zeros(len(images), slots, 4)
        for n, (image, (height, width)) in enumerate(zip(images, image_sizes.tolist(), strict=True)):
            grey = int(image[0, 0, 0])
            for slot, (x, y, w, h) in enumerate(self.boxes.get(grey, [])):
                to_x, to_y = width / self.sizes[grey][1], height / self.sizes[grey][0]
                box = torch.tensor([x * to_x, y * to_y, (x + w) * to_x, (y + h) * to_y])
                deltas[n, slot] = encode_boxes(box, self.anchor)
                logits[n, slot, self.labels[slot % len(self.labels)]] = 3.0 - slot
        return Predictions(logits, deltas, self.anchor.expand(slots, 4), [slots])


SIZES = {40: (90, 160), 80: (200, 100), 120: (64, 64), 160: (150, 330), 200: (100, 200)}  # by grey value
BOXES: dict[int, list[list[float]]] = {
    40: [[10, 20, 50, 60], [100, 5, 40, 40]],
    80: [[3, 150, 90, 45]],
    120: [[0, 0, 64, 64], [8, 8, 20, 30]],
    160: [[200, 30, 130, 120]],
    200: [],
}
LABELS = [1, 0]  # of the first and the second box of an image: cup, bird


def planted(folder: Path) -> Annotations:
    """Grey images of many sizes, number 1000 + grey value, whose truth is `BOXES`."""
    for grey, size in SIZES.items():
        Image.new("RGB", size[::-1], (grey, grey, grey)).save(folder / f"{grey}.png")
    category = [5, 2]  # of LABELS
    boxes = [(grey, n, box) for grey, some in BOXES.items() for n, box in enumerate(some)]
    return load(
        folder,
        {
            "images": [{"id": 1000 + g, "file_name": f"{g}.png", "height": h, "width": w} for g, (h, w) in SIZES.items()],
            "categories": CATEGORIES,
            "annotations": [
                {"id": k, "image_id": 1000 + grey, "category_id": category[n], "bbox": box}
                for k, (grey, n, box) in enumerate(boxes, start=1)
            ],
        },
    )


def evaluate(annotations: Annotations, model: nn.Module | None = None, batch_size: int = 2, **more: Any) -> Evaluation:
    return evaluate_model(
        model or Planted(BOXES, SIZES, LABELS),
        annotations,
        Postprocessor(categories=annotations.categories),
        InputConfig(short_edge=64, long_edge=128),
        device=torch.device("cpu"),
        precision="fp32",
        batch_size=batch_size,
        workers=0,
        **more,
    )


def by_image(rows: np.ndarray) -> np.ndarray:
    return rows[np.lexsort((-rows[:, 5], rows[:, 0]))]


def test_planted_boxes_are_found_where_they_are(tmp_path: Path) -> None:
    """The model answers in pixels of the resized image; the rows must come back in those of the original."""
    annotations = planted(tmp_path)
    result = evaluate(annotations)
    assert result.metrics["AP"] == pytest.approx(1)
    assert result.metrics["images"] == 5 and result.metrics["detections"] == 6
    expected = [
        [1000 + grey, *box, torch.tensor(3.0 - n).sigmoid().item(), [5, 2][n]]
        for grey, some in BOXES.items()
        for n, box in enumerate(some)
    ]
    np.testing.assert_allclose(by_image(result.rows), expected, atol=2e-3)
    assert result.losses == {}


@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_the_batch_size_changes_nothing(tmp_path: Path, batch_size: int) -> None:
    """With 5 in a batch images of all sizes are padded to one; with 1 hardly any padding is left."""
    annotations = planted(tmp_path)
    one, other = evaluate(annotations), evaluate(annotations, batch_size=batch_size)
    np.testing.assert_allclose(by_image(one.rows), by_image(other.rows), atol=1e-3)
    assert one.metrics == other.metrics


def test_an_unreadable_image_has_no_detections_and_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Class cup has a box in each of 4 images. With one of them lost recall ends at 3/4: the points 0, 0.01 ... 0.75
    of the 101 have precision 1."""
    annotations = planted(tmp_path)
    (tmp_path / "160.png").write_bytes(b"not a picture")
    stand_in = 128  # the grey of the empty picture that fills its place in the batch: what is found there must not count
    model = Planted({**BOXES, stand_in: [[0, 0, 10, 10]]}, {**SIZES, stand_in: (32, 32)}, LABELS)
    result = evaluate(annotations, model)
    assert 1160 not in result.rows[:, 0]
    assert result.metrics["images"] == 5
    assert result.metrics["per_class"]["cup"]["AP"] == pytest.approx(76 / 101)
    assert result.metrics["per_class"]["bird"]["AP"] == pytest.approx(1)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "160.png" in line]
    assert line.startswith("warning: evaluated as an image without detections:")


def test_where_no_image_can_be_read_nothing_is_measured(tmp_path: Path) -> None:
    """AP 0 would say that the detector is bad."""
    annotations = planted(tmp_path)
    for picture in tmp_path.glob("*.png"):
        picture.unlink()
    with pytest.raises(
        UserError, match=rf"^none of the 5 images of .* can be read; the first: .*{tmp_path.name}.*: no such file"
    ):
        evaluate(annotations, Planted(BOXES, SIZES, LABELS))


def test_no_image_has_a_detection(tmp_path: Path) -> None:
    result = evaluate(planted(tmp_path), Planted({0: [[0, 0, 1, 1]]}, SIZES, LABELS))
    assert result.rows.shape == (0, COLUMNS)
    assert result.metrics["AP"] == 0


def test_losses_and_samples_come_from_the_same_forward(tmp_path: Path) -> None:
    """The losses must be those of the criterion called by hand on the one batch with all images."""
    annotations = planted(tmp_path)
    model = Planted(BOXES, SIZES, LABELS).train()
    result = evaluate(annotations, model, criterion=RetinaNetLoss(), num_samples=3, batch_size=5)
    (batch,) = evaluation_loader(annotations, Resize(64, 128), 5, 0)
    expected = RetinaNetLoss()(model(batch.images, batch.image_sizes), batch.targets)
    assert result.losses == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-5)
    assert len(result.samples) == 3
    for index, detections in result.samples:
        grey = int(annotations.image_ids[index]) - 1000
        assert len(detections) == len(BOXES[grey])
    assert model.training  # as it came


def test_categories_are_mapped_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Labels of the data set follow ascending ids: bird 2, cup 5, zebra 40."""
    annotations = load(tmp_path, truth_of([]))
    same = [Category(2, "bird"), Category(5, "cup"), Category(40, "zebra")]
    assert map_categories(same, annotations) == [2, 5, 40]
    assert capsys.readouterr().out == ""
    assert map_categories([Category(0, "zebra"), Category(1, "cup"), Category(2, "bird")], annotations) == [40, 5, 2]
    note = "truth.json numbers classes otherwise than the model: matched by name (zebra 40 instead of 0, cup 5 instead of 1)"
    assert note in capsys.readouterr().out  # bird is 2 in both
    assert map_categories([Category(5, "bird"), Category(2, "dog")], annotations) == [2, -1]
    out = capsys.readouterr().out
    assert "has no class dog: such detections are left out" in out
    assert "the model does not know cup, zebra: their boxes cannot be found" in out
    with pytest.raises(UserError, match=r"none of the classes of the model \(dog, cat\) is in .*truth\.json \(bird"):
        map_categories([Category(2, "dog"), Category(5, "cat")], annotations)


def test_a_model_with_other_ids_is_evaluated_by_name(tmp_path: Path) -> None:
    """The same planted boxes from a model whose labels are (other, cup, bird) with ids of its own."""
    annotations = planted(tmp_path)
    result = evaluate_model(
        Planted(BOXES, SIZES, [1, 2]),
        annotations,
        Postprocessor(categories=[Category(1, "other"), Category(2, "cup"), Category(3, "bird")]),
        InputConfig(short_edge=64, long_edge=128),
        device=torch.device("cpu"),
        precision="fp32",
        batch_size=2,
        workers=0,
    )
    assert result.metrics["AP"] == pytest.approx(1)
    assert set(result.rows[:, 6]) == {5, 2}


def test_losses_are_those_of_the_models_own_labels(tmp_path: Path) -> None:
    """Data that numbers the classes otherwise gives the same losses; boxes of a class unknown to the model are ignored."""
    annotations = planted(tmp_path)  # labels by ascending id: bird, cup, zebra
    model = Planted(BOXES, SIZES, [1, 2])

    def losses(names: list[str]) -> dict[str, float]:
        return evaluate_model(
            model,
            annotations,
            Postprocessor(categories=[Category(n, name) for n, name in enumerate(names, start=1)]),
            InputConfig(short_edge=64, long_edge=128),
            device=torch.device("cpu"),
            precision="fp32",
            batch_size=5,
            workers=0,
            criterion=RetinaNetLoss(),
        ).losses

    (batch,) = evaluation_loader(annotations, Resize(64, 128), 5, 0)
    own = [replace(t, labels=torch.tensor([2, 1, 0])[t.labels]) for t in batch.targets]  # bird is 2, cup 1, zebra 0
    expected = RetinaNetLoss()(model(batch.images, batch.image_sizes), own)
    assert losses(["zebra", "cup", "bird"]) == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-5)

    cups = [Target(t.boxes[t.labels == 1], t.labels[t.labels == 1], t.boxes[t.labels != 1], t.image_id) for t in batch.targets]
    expected = RetinaNetLoss()(model(batch.images, batch.image_sizes), cups)  # cup is label 1 in ("other", "cup", "more") too
    assert losses(["other", "cup", "more"]) == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-5)


def test_results_go_by_the_names_of_classes_and_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """bird is 2, cup 5 in the data; the file has them as 0 and 2, and image 7 as 1."""
    truth = load(tmp_path, truth_of([[0, 0, 40, 40]]))
    entries = [
        {"image_id": 1, "file_name": "photos/7.png", "category_id": 0, "category_name": "bird", "bbox": [0, 0, 40, 40]},
        {"image_id": 1, "file_name": "photos/7.png", "category_id": 2, "category_name": "cup", "bbox": [0, 0, 9, 9]},
        {"image_id": 1, "file_name": "photos/7.png", "category_id": 3, "category_name": "dog", "bbox": [0, 0, 9, 9]},
        {"image_id": 7, "category_id": 2, "bbox": [1, 1, 9, 9]},  # without names: by its ids
    ]
    file = tmp_path / "r.json"
    write_json(file, [{**entry, "score": 0.5} for entry in entries])
    rows = read_results(file, truth)
    assert rows[:, [0, 6]].tolist() == [[7, 2], [7, 5], [7, 2]]
    out = capsys.readouterr().out
    assert f"truth.json numbers classes otherwise than {file}: matched by name (bird 2 instead of 0, cup 5 instead of 2)" in out
    assert "has no class dog: such detections are left out" in out and "cannot be found" not in out
    assert f"{file} numbers 1 images otherwise than" in out

    write_json(file, [{**entries[0], "score": 0.5, "file_name": "8.png"}])
    with pytest.raises(UserError, match=r"r\.json: entry 0 is of 8\.png, which .*truth\.json does not have"):
        read_results(file, truth)
    write_json(file, [{**entries[2], "score": 0.5}])
    with pytest.raises(UserError, match=r"none of the classes of .*r\.json \(dog"):
        read_results(file, truth)
    write_json(file, [])
    assert read_results(file, truth).shape == (0, COLUMNS)


def test_detections_of_a_class_that_the_data_lacks_are_left_out(tmp_path: Path) -> None:
    annotations = planted(tmp_path)
    result = evaluate_model(
        Planted(BOXES, SIZES, [0, 1]),
        annotations,
        Postprocessor(categories=[Category(1, "cup"), Category(2, "dog"), Category(3, "zebra")]),
        InputConfig(short_edge=64, long_edge=128),
        device=torch.device("cpu"),
        precision="fp32",
        batch_size=2,
        workers=0,
    )
    assert set(result.rows[:, 6]) == {5}
    assert len(result.rows) == 4  # the first boxes of four images
    assert result.metrics["per_class"]["bird"]["AP"] == 0  # its two boxes were not found
