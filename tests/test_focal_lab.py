"""tools/focal_lab.py curves and distribution: the paper's numbers, shares of losses that are known, anchors counted by hand."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL, Run, mistake
from torch import Tensor

from laboratory.anchors import HardestNegatives, Imbalance, Negative, draw_negative
from laboratory.curves import curve, curves_table
from laboratory.distribution import GAMMAS, LogitHistogram, distribution_table
from laboratory.examination import as_the_model_counts, examine
from retinanet.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from retinanet.config import parse_config
from retinanet.data.coco import load_coco
from retinanet.data.images import read_image
from retinanet.errors import UserError
from retinanet.matcher import BACKGROUND, IGNORE, Matcher
from retinanet.model import build_model
from retinanet.structures import Batch, Category, Predictions, Target

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("p_t", "target", "cross_entropy", "focal", "ratio"),
    [  # -ln p_t; times alpha_t (1 - p_t)^2, alpha_t 0.25 for a target of 1 and 0.75 for one of 0
        (0.95, 1, 0.0512933, 3.20583e-5, 1600),  # 1 / (0.25 * 0.05^2)
        (0.05, 1, 2.9957323, 0.6759121, 4.432),  # 1 / (0.25 * 0.95^2)
        (0.99, 1, 0.0100503, 2.51259e-7, 40_000),
        (0.95, 0, 0.0512933, 9.61749e-5, 533.3),
        (0.05, 0, 2.9957323, 2.0277363, 1.477),
        (0.99, 0, 0.0100503, 7.53776e-7, 13_333),
    ],
)
def test_losses_of_the_paper_s_setting(p_t: float, target: int, cross_entropy: float, focal: float, ratio: float) -> None:
    (point,) = curve([p_t], gamma=2, alpha=0.25, target=target)
    assert point.cross_entropy == pytest.approx(cross_entropy, rel=1e-5)
    assert point.loss == pytest.approx(focal, rel=1e-5)
    assert point.ratio == pytest.approx(ratio, rel=1e-3)


def test_without_alpha_only_the_modulating_factor_is_left() -> None:
    easy, hard = curve([0.968, 0.2], gamma=2, alpha=None)
    assert easy.ratio == pytest.approx(1 / 0.032**2)  # 977: the paper's "1000 times lower"
    assert hard.loss / hard.cross_entropy == pytest.approx(0.64)  # 0.8^2
    for target in (0, 1):
        points = curve([0.1, 0.7], gamma=0, alpha=None, target=target)
        assert [point.loss for point in points] == pytest.approx([-math.log(0.1), -math.log(0.7)])


@pytest.mark.parametrize("target", [0, 1])
def test_gradients(target: int) -> None:
    """Of cross entropy by the logit 1 - p_t; of the focal loss (1 - p_t)^g (1 - p_t - g p_t ln p_t)."""
    assert [point.gradient for point in curve([0.1, 0.5, 0.9], 0, None, target)] == pytest.approx([0.9, 0.5, 0.1])
    (point,) = curve([0.5], 2, None, target)
    assert point.gradient == pytest.approx(0.25 * (0.5 + math.log(2)))


def test_curves_tool(run_tool: Run, tmp_path: Path) -> None:
    done = run_tool("focal_lab", "curves", "--alpha", "0.25", "--gamma", "0", "2", "--out", "lab")
    assert done.code == 0 and "1,600.0x" in done.out and "40,000.0x" in done.out
    rows = list(csv.DictReader((tmp_path / "lab" / "curves.csv").read_text().splitlines()))
    assert {(row["target"], row["gamma"]) for row in rows} == {("1", "0"), ("1", "2"), ("0", "0"), ("0", "2")}
    (row,) = [row for row in rows if (row["target"], row["gamma"], row["p_t"]) == ("1", "2", "0.95")]
    assert float(row["loss"]) == pytest.approx(3.20583e-5, rel=1e-5)
    assert (tmp_path / "lab" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len({row["p_t"] for row in rows}) == 999  # 0.001 to 0.999


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["curves", "--alpha", "1.5"], "--alpha 1.5: expected more than 0 and less than 1"),
        (["curves", "--gamma", "2", "-1"], "--gamma 2 -1: expected 0..100"),
        (["curves", "--gamma", "nan"], "--gamma nan: expected 0..100"),
        (["distribution", "--weights", "none.pt"], "weights none.pt do not exist"),
        (["distribution", "--weights", "none.pt", "--images", "0"], "--images 0: expected 1 or more"),
        (["distribution", "a.yaml", "b.yaml", "--weights", "x.pt"], "one config at most, got a.yaml, b.yaml"),
        (["ablation", "--seeds", "0"], "--seeds 0: expected 1 or more"),
    ],
)
def test_a_mistake_gets_one_line(run_tool: Run, arguments: list[str], said: str) -> None:
    assert said in mistake(run_tool("focal_lab", *arguments))


def test_table_without_alpha_has_one_side_and_with_it_two() -> None:
    assert curves_table([2.0], None).count("p_t") == 1
    assert curves_table([2.0], 0.25).count("p_t") == 2


def logits_of(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).logit()


def test_shares_of_known_losses() -> None:
    """990 easy negatives at p = 0.01 and 10 hard ones at p = 0.9.

    gamma 0: 990 * 0.0100503 = 9.950 beside 10 * 2.302585 = 23.026, of which the hardest 1 % are 23.026 / 32.976 = 69.8 %.
    gamma 2: 990 * 0.01^2 * 0.0100503 = 0.000995 beside 10 * 0.9^2 * 2.302585 = 18.651: 99.995 %.
    """
    histogram = LogitHistogram()
    histogram.add(logits_of(0.01).repeat(990))
    histogram.add(logits_of(0.9).repeat(10).reshape(2, 5))  # any shape
    assert histogram.hardest(0, 0.01) == pytest.approx(0.698, abs=2e-3)
    assert histogram.hardest(2, 0.01) == pytest.approx(0.99995, abs=1e-5)
    assert histogram.hardest(2, 1.0) == 1.0
    # Of the hardest 2 % the second half are easy ones, 10 of 990: 23.026 + 0.1005 of 32.976.
    assert histogram.hardest(0, 0.02) == pytest.approx(0.7013, abs=2e-3)
    figures = histogram.figures(GAMMAS)
    assert figures["samples"] == 1000 and figures["hardest_share"]["2"]["0.01"] == histogram.hardest(2, 0.01)
    assert figures["cumulative"]["0"][0] == 0.0 and figures["cumulative"]["0"][100] == pytest.approx(1.0)
    assert figures["cumulative"]["0"][99] == pytest.approx(0.302, abs=2e-3)  # all easy ones


def test_histogram_agrees_with_sorting_all_losses() -> None:
    """The definition: each gamma's own losses, sorted, normalised and cumulated, in float64."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(100_000, generator=generator, dtype=torch.float64) * 2.5 - 3
    histogram = LogitHistogram()
    for part in logits.float().split(7_000):
        histogram.add(part)
    for gamma in (0.0, 0.5, 1.0, 2.0, 5.0):
        p = logits.sigmoid()
        losses = np.sort((-(p**gamma) * torch.log1p(-p)).numpy())
        direct = np.concatenate([[0], np.cumsum(losses)]) / losses.sum()
        for fraction in (0.001, 0.01, 0.1, 0.5):
            assert histogram.hardest(gamma, fraction) == pytest.approx(1 - direct[round(100_000 * (1 - fraction))], abs=1e-4)


def test_histogram_at_its_ends() -> None:
    histogram = LogitHistogram()
    assert histogram.hardest(2, 0.1) is None
    assert distribution_table(histogram, histogram).count(" -") == 2 * len(GAMMAS) * 3  # two parts, three fractions
    histogram.add(torch.zeros(0))
    histogram.add(torch.tensor([-1e4, 1e4]))
    assert histogram.counts[[0, -1]].tolist() == [1, 1]
    assert histogram.hardest(0, 0.5) == pytest.approx(1)
    for wrong in (math.nan, math.inf):
        with pytest.raises(UserError, match="not all finite"):
            histogram.add(torch.tensor([0.0, wrong]))


def test_anchors_are_counted_by_level_and_kind() -> None:
    imbalance = Imbalance()
    sizes = [4, 2, 0, 1, 1]
    imbalance.add(torch.tensor([0, BACKGROUND, BACKGROUND, IGNORE, 1, 1, BACKGROUND, BACKGROUND]), sizes)
    imbalance.add(torch.full((8,), BACKGROUND), sizes)  # an image without objects
    rows = {level: row.tolist() for level, row in imbalance.rows().items()}
    assert rows == {  # foreground, background, ignored: means of the two
        "P3": [0.5, 3.0, 0.5],
        "P4": [1.0, 1.0, 0.0],
        "P5": [0.0, 0.0, 0.0],
        "P6": [0.0, 1.0, 0.0],
        "P7": [0.0, 1.0, 0.0],
        "all": [1.5, 6.0, 0.5],
    }
    lines = imbalance.table().splitlines()
    assert lines[1].split()[-3:] == ["6", ":", "1"] and lines[-1].split()[-3:] == ["4", ":", "1"]
    assert lines[3].split()[-1] == "-"  # no ratio without foreground
    assert Imbalance().rows()["all"].tolist() == [0, 0, 0]  # no image could be read
    six = Imbalance()
    six.add(torch.full((6,), BACKGROUND), [1] * 6)
    assert list(six.rows())[:2] == ["P2", "P3"]


def row_of_anchors(n: int) -> Tensor:
    """[n, 4], 10 x 10, 20 pixels apart."""
    left = torch.arange(n)[:, None] * 20.0
    return torch.cat([left, left * 0, left + 10, left * 0 + 10], dim=1)


def test_hardest_negatives_are_found_where_they_were_planted() -> None:
    anchors = torch.cat([row_of_anchors(8), torch.tensor([[41.0, 0, 51, 10]])])  # the last lies on number 2
    logits = torch.full((9, 3), -5.0)
    logits[2, 1] = 3.0  # the hardest, taken for class 1
    logits[8, 1] = 2.5  # the same mistake, IoU 9 / 11
    logits[0, 0] = 9.0  # foreground
    logits[1, 0] = 8.0  # ignored
    logits[5, 2], logits[6, 0], logits[7, 0] = 2.0, 1.0, 0.5
    matches = torch.tensor([0, IGNORE, *[BACKGROUND] * 7])
    boxes = torch.tensor([[0.0, 0, 10, 10], [45.0, 0, 55, 10]])
    hardest = HardestNegatives(4)
    hardest.add(7, logits, anchors, matches, boxes, torch.tensor([2.0, 3.0]))
    sigmoid = [1 / (1 + math.exp(-logit)) for logit in (3.0, 2.0, 1.0)]  # three of an image, so not the fourth
    found = hardest.found
    assert [(one.image_id, one.label) for one in found] == [(7, 1), (7, 2), (7, 0)]
    assert [one.score for one in found] == pytest.approx(sigmoid)
    assert found[0].box == (80.0, 0.0, 100.0, 30.0)  # twice as wide and three times as high as it was
    assert [one.iou for one in found] == pytest.approx([5 / 15, 0, 0])
    # A second image, without objects: two better ones push the worst out.
    logits = torch.tensor([[4.0, 0], [3.5, 0]])
    hardest.add(9, logits, row_of_anchors(2), torch.full((2,), BACKGROUND), torch.zeros(0, 4), torch.ones(2))
    assert [one.image_id for one in hardest.found] == [9, 9, 7, 7]
    hardest.add(1, logits, row_of_anchors(2), torch.zeros(2).long(), boxes, torch.ones(2))  # no background at all
    assert len(hardest.found) == 4


def test_examination_of_a_hand_made_batch() -> None:
    """Five anchors: one on the object (class 1), one in the crowd, three of background; two classes."""
    anchors = row_of_anchors(5)
    logits = torch.tensor([[7.0, 1.5], [6.0, 6.0], [-1.0, -2.0], [-3.0, -4.0], [-5.0, 2.0]])
    target = Target(anchors[:1].clone(), torch.tensor([1]), anchors[1:2].clone(), image_id=30)
    sizes = torch.tensor([[32, 96], [32, 96]])
    unreadable = Target.empty(31)
    batch = Batch(torch.zeros(2, 3, 32, 96, dtype=torch.uint8), sizes, sizes * 2, [target, unreadable], ["a", "b"], [])
    batch.readable = [True, False]
    batch.faults = ["b: truncated"]

    class Stub(torch.nn.Module):
        def forward(self, images: Tensor, image_sizes: Tensor) -> Predictions:
            return Predictions(logits.expand(2, -1, -1), torch.zeros(2, 5, 4), anchors, [3, 2])

    found = examine(Stub(), [batch], Matcher(), device=CPU)

    def logits_in(histogram: LogitHistogram) -> list[float]:
        return sorted(((np.repeat(np.arange(len(histogram.counts)), histogram.counts) + 0.5) / 256 - 40).tolist())

    assert logits_in(found.positives) == pytest.approx([-1.5], abs=1 / 256)  # its own class alone, with the sign turned
    assert logits_in(found.negatives) == pytest.approx([-5, -4, -3, -2, -1, 2], abs=1 / 256)  # not 7, not 6
    assert found.imbalance.counts.tolist() == [[1, 1, 1], [0, 2, 0]] and found.imbalance.images == 1
    assert found.hardest.found[0].box == (160.0, 0.0, 180.0, 20.0)  # the fifth, in the original's pixels
    assert found.hardest.found[0].label == 1


def test_labels_become_the_model_s_by_name(make_coco: Callable[..., dict[str, str]]) -> None:
    data = make_coco("val", n=2)
    annotations = load_coco(Path(data["annotations"]), Path(data["path"]))  # red, green
    known = as_the_model_counts(annotations, (Category(1, "blue"), Category(2, "green")))
    assert known.categories[1].name == "green"
    assert known.labels[annotations.labels == 1].tolist() == [1, 1]
    assert known.crowd.tolist() == (annotations.labels == 0).tolist()  # the model knows no red: neither object nor background
    with pytest.raises(UserError, match="none of the classes"):
        as_the_model_counts(annotations, (Category(1, "blue"),))


def test_a_negative_is_drawn_with_what_surrounds_it(make_coco: Callable[..., dict[str, str]]) -> None:
    data = make_coco("val", n=2, size=(200, 200))
    annotations = load_coco(Path(data["annotations"]), Path(data["path"]))
    x, y, width, height = annotations.coco_boxes[0]
    image = read_image(annotations.path(0))
    red = Negative(0.9, 10, (x, y, x + width, y + height), 1, 0.3)
    picture = draw_negative(red, annotations).astype(int)
    share = (picture[..., 0] - picture[..., 2] > 150).mean()
    assert 0.1 < share < 0.6  # the crop is twice as large as the red box, which others may hide in part
    corner = draw_negative(Negative(0.5, 11, (-30.0, 180.0, 20.0, 230.0), 0, 0.0), annotations)
    assert corner.ndim == 3 and min(corner.shape[:2]) >= 360  # 70 x 70 pixels of it lie in the image; enlarged
    outside = draw_negative(Negative(0.5, 11, (300.0, 300.0, 310.0, 310.0), 0, 0.0), annotations)  # in the padding
    assert outside.size and image.shape == (200, 200, 3)


@pytest.fixture
def weights(tmp_path: Path, make_coco: Callable[..., dict[str, str]]) -> Path:
    data = make_coco("val", n=4)
    content: dict[str, Any] = {"model": {**SMALL, "num_classes": 2}, "input": {"short_edge": 64, "long_edge": 96}}
    config = parse_config({**content, "data": {"val": data, "workers": 0}})
    torch.manual_seed(0)
    model = build_model(config.model, config.input)
    path = tmp_path / "best.pt"
    save_checkpoint(path, Checkpoint(config, (Category(3, "red"), Category(7, "green")), model.state_dict()))
    return path


def test_distribution_tool(run_tool: Run, weights: Path, tmp_path: Path) -> None:
    done = run_tool("focal_lab", "distribution", "--weights", weights, "--images", "3", "--hardest", "5", "--out", "lab")
    assert done.code == 0, done
    assert "3 of 4 images" in done.out and "background : foreground" in done.out
    found = json.loads((tmp_path / "lab" / "distribution.json").read_text())
    assert found["images"] == 3 and len(found["hardest_negatives"]) == 5
    assert {"score", "box", "iou", "taken_for", "image_id", "label"} == set(found["hardest_negatives"][0])
    mean = found["anchors_per_image"]["all"]
    # 96 x 64 pixels or 64 x 96: P3 to P7 have 12 x 8, 6 x 4, 3 x 2, 2 x 1 and 1 x 1 cells; 9 anchors in each. Both in a batch
    # are padded to 96 x 96: 144 + 36 + 9 + 4 + 1 cells.
    assert 9 * 129 <= sum(mean.values()) <= 9 * 194
    assert found["positives"]["samples"] == round(3 * mean["foreground"]) > 0
    assert found["negatives"]["samples"] == 2 * round(3 * mean["background"])  # of each class
    for name in ("distribution.png", "anchors.png"):
        assert (tmp_path / "lab" / name).read_bytes().startswith(b"\x89PNG")
    assert read_image(tmp_path / "lab" / "hardest_negatives.jpg").shape[2] == 3


def test_distribution_needs_data_and_finite_weights(run_tool: Run, weights: Path) -> None:
    said = mistake(run_tool("focal_lab", "distribution", "--weights", weights, "data.val=null"))
    assert "data.val is not set" in said
    checkpoint = load_checkpoint(weights)
    checkpoint.model["cls_subnet.final.bias"].fill_(math.nan)
    save_checkpoint(weights, checkpoint)
    done = run_tool("focal_lab", "distribution", "--weights", weights)
    assert done.code == 2 and "logits are not all finite" in done.err.splitlines()[-1]  # after the progress bar
