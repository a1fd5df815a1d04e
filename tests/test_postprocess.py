"""From raw predictions to detections: by hand, and against torchvision and plain references."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import nms

from retinanet.boxes import decode_boxes
from retinanet.config import PostprocessConfig
from retinanet.postprocess import Postprocessor, build_postprocessor, hard_nms, soft_nms
from retinanet.structures import Category, Detections, Predictions

SIZE = torch.tensor([[100, 200]])  # height, width


def predict(boxes: list[list[float]], scores: list[list[float]], levels: list[int] | None = None) -> Predictions:
    """Predictions whose anchors are the boxes (deltas 0), with these probabilities by class."""
    probabilities = torch.tensor([scores], dtype=torch.float64)
    logits = torch.log(probabilities / (1 - probabilities)).float()
    anchors = torch.tensor(boxes, dtype=torch.float32)
    return Predictions(logits, torch.zeros(1, len(boxes), 4), anchors, levels or [len(boxes)])


def detect(predictions: Predictions, **options: Any) -> Detections:
    (found,) = Postprocessor(**options)(predictions, SIZE)
    return found


def assert_found(found: Detections, boxes: list[list[float]], scores: list[float], labels: list[int]) -> None:
    torch.testing.assert_close(found.boxes, torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    torch.testing.assert_close(found.scores, torch.tensor(scores, dtype=torch.float32))
    assert found.labels.tolist() == labels


A, B, C = [0, 0, 10, 10], [50, 0, 60, 10], [100, 0, 110, 10]  # far from each other
NEAR_A = [1, 0, 11, 10]  # IoU with A: 90 / 110


def test_best_first_and_above_the_threshold() -> None:
    found = detect(predict([A, B, C], [[0.3, 0.04], [0.02, 0.9], [0.06, 0.01]]))
    assert_found(found, [B, A, C], [0.9, 0.3, 0.06], [1, 0, 0])


def test_a_score_at_the_threshold_is_not_above_it() -> None:
    assert_found(detect(predict([A], [[0.5]]), score_threshold=0.5), [], [], [])
    assert_found(detect(predict([A], [[0.5]]), score_threshold=0.49), [A], [0.5], [0])


def test_one_anchor_may_be_several_classes() -> None:
    assert_found(detect(predict([A], [[0.6, 0.01, 0.8]])), [A, A], [0.8, 0.6], [2, 0])


def test_top_k_counts_on_each_level() -> None:
    predictions = predict([A, B, C, [0, 50, 10, 60], [50, 50, 60, 60]], [[0.5], [0.9], [0.8], [0.3], [0.2]], levels=[3, 2])
    found = detect(predictions, topk_per_level=1)
    assert_found(found, [B, [0, 50, 10, 60]], [0.9, 0.3], [0, 0])  # the best of the first three, and of the last two


def test_top_k_counts_pairs_of_anchor_and_class() -> None:
    found = detect(predict([A, B], [[0.9, 0.8], [0.1, 0.7]]), topk_per_level=2)
    assert_found(found, [A, A], [0.9, 0.8], [0, 1])


def test_nms_within_a_class() -> None:
    # of two boxes of IoU 90 / 110 = .818 the weaker goes, unless they are of two classes
    assert_found(detect(predict([A, NEAR_A], [[0.6, 0], [0.7, 0]])), [NEAR_A], [0.7], [0])
    assert_found(detect(predict([A, NEAR_A], [[0.6, 0], [0, 0.7]])), [NEAR_A, A], [0.7, 0.6], [1, 0])
    assert_found(detect(predict([A, NEAR_A], [[0.6, 0], [0, 0.7]]), class_agnostic=True), [NEAR_A], [0.7], [1])


def test_nms_threshold() -> None:
    half = [0, 0, 10, 5]  # IoU exactly .5 with A: only a higher one is dropped
    assert len(detect(predict([A, half], [[0.6], [0.7]]))) == 2
    assert len(detect(predict([A, half], [[0.6], [0.7]]), nms_threshold=0.49)) == 1
    assert len(detect(predict([A, NEAR_A], [[0.6], [0.7]]), nms_threshold=0.82)) == 2


def test_a_dropped_box_drops_no_other() -> None:
    chain = [[0, 0, 10, 10], [3, 0, 13, 10], [6, 0, 16, 10]]  # IoU 7 / 13 between neighbours, 4 / 16 between the ends
    found = detect(predict(chain, [[0.9], [0.8], [0.7]]))
    assert_found(found, [chain[0], chain[2]], [0.9, 0.7], [0, 0])


def test_max_detections() -> None:
    predictions = predict([A, NEAR_A, B, C], [[0.9], [0.85], [0.6], [0.7]])
    # counted after NMS, which drops the second
    assert_found(detect(predictions, max_detections=2), [A, C], [0.9, 0.7], [0, 0])


def test_boxes_are_decoded_from_their_own_anchor() -> None:
    predictions = predict([A, B], [[0.2], [0.9]])
    predictions.box_deltas[0, 1] = torch.tensor([0.1, 0.5, math.log(2), 0])  # centre (55, 5) to (56, 10), width 20
    assert_found(detect(predictions), [[46, 5, 66, 15], A], [0.9, 0.2], [0, 0])


def test_boxes_are_clipped_before_nms() -> None:
    # apart from each other, IoU 40 * 10 / (60 + 40) * 10 = .4; clipped at y = 100 they are the same box
    inside, outside = [0, 90, 10, 100], [0, 90, 10, 130]
    found = detect(predict([inside, outside], [[0.8], [0.9]]))
    assert_found(found, [inside], [0.9], [0])


def test_boxes_outside_the_image_are_dropped() -> None:
    right, above = [210, 10, 230, 30], [20, -30, 40, 0]
    assert_found(detect(predict([right, A, above], [[0.9], [0.5], [0.8]])), [A], [0.5], [0])


def test_padding_is_outside_the_image() -> None:
    predictions = predict([[0, 0, 300, 300]], [[0.9]])
    for size in ([100, 200], [60, 50]):
        (found,) = Postprocessor()(predictions, torch.tensor([size]))
        assert found.boxes.tolist() == [[0, 0, size[1], size[0]]]


def test_boxes_in_original_pixels() -> None:
    predictions = predict([[10, 20, 30, 40], [150, 50, 300, 300]], [[0.9], [0.8]])
    (found,) = Postprocessor()(predictions, SIZE, torch.tensor([[50, 400]]))
    # height 100 was 50, width 200 was 400; the second is clipped first, at (200, 100)
    assert_found(found, [[20, 10, 60, 20], [300, 25, 400, 50]], [0.9, 0.8], [0, 0])


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_no_candidates(kind: str) -> None:
    no_anchors = Predictions(torch.zeros(1, 0, 1), torch.zeros(1, 0, 4), torch.zeros(0, 4), [0])
    for predictions in (predict([A, B], [[0.01], [0.04]]), no_anchors):
        found = detect(predictions, nms=kind)
        assert found.boxes.shape == (0, 4)
        assert found.scores.shape == (0,)
        assert found.labels.shape == (0,) and found.labels.dtype == torch.int64


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_a_level_without_candidates(kind: str) -> None:
    found = detect(predict([A, B, C], [[0.01], [0.9], [0.02]], levels=[1, 1, 1]), nms=kind)
    assert_found(found, [B], [0.9], [0])


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_nan_and_infinite_logits(kind: str) -> None:
    predictions = predict([A, B, C, [0, 50, 10, 60]], [[0.5], [0.5], [0.5], [0.5]])
    predictions.cls_logits[0, :, 0] = torch.tensor([math.nan, math.inf, -math.inf, 0])
    assert_found(detect(predictions, nms=kind), [B, [0, 50, 10, 60]], [1, 0.5], [0, 0])


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_box_that_is_not_finite_disturbs_no_other(kind: str, number: float) -> None:
    predictions = predict([A, A, B], [[0.9], [0.8], [0.99]])
    predictions.box_deltas[0, 2, 0] = number
    found = detect(predictions, nms=kind, score_threshold=0.4)
    # one of the two equal boxes is left: soft-NMS lowers .8 to .8 e^-2 = .11
    assert_found(found, [A], [0.9], [0])


def random_predictions(batch: int = 1, num_classes: int = 5, seed: int = 0) -> Predictions:
    """Boxes in an image of 100 x 200, on two levels; about half of the logits are above -3."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(160, 2, generator=generator) * torch.tensor([150.0, 60])
    side = torch.rand(160, 2, generator=generator) * 40 + 5
    logits = torch.randn(batch, 160, num_classes, generator=generator) * 2 - 3
    deltas = torch.randn(batch, 160, 4, generator=generator) * 0.2
    return Predictions(logits, deltas, torch.cat([corner, corner + side], dim=1), [120, 40])


def assert_equal(a: Detections, b: Detections, atol: float = 0) -> None:
    torch.testing.assert_close(a.boxes, b.boxes, rtol=0, atol=atol)
    torch.testing.assert_close(a.scores, b.scores, rtol=0, atol=atol)
    assert torch.equal(a.labels, b.labels)


def test_half_precision_predictions() -> None:
    rough = random_predictions()
    rough = rough._replace(cls_logits=rough.cls_logits.bfloat16(), box_deltas=rough.box_deltas.bfloat16())
    exact = rough._replace(cls_logits=rough.cls_logits.float(), box_deltas=rough.box_deltas.float())
    found = detect(rough)
    assert found.scores.dtype == found.boxes.dtype == torch.float32
    assert_equal(found, detect(exact))  # the same numbers: sigmoid, exp and all that follows are computed in float32


def reference(predictions: Predictions, k: int, threshold: float, overlap: float, most: int) -> Detections:
    """Plainly: sort each level, cut, decode, clip, NMS of one class after the other, sort again."""
    kept: list[tuple[float, list[float], int]] = []
    by_class: dict[int, list[tuple[float, list[float]]]] = {}
    start = 0
    for size in predictions.level_sizes:
        pairs = [
            (score, anchor, label)
            for anchor in range(start, start + size)
            for label, score in enumerate(predictions.cls_logits[0, anchor].sigmoid().tolist())
            if score > threshold
        ]
        for score, anchor, label in sorted(pairs, reverse=True)[:k]:
            x1, y1, x2, y2 = decode_boxes(predictions.box_deltas[0, anchor], predictions.anchors[anchor]).tolist()
            box = [min(max(x1, 0), 200), min(max(y1, 0), 100), min(max(x2, 0), 200), min(max(y2, 0), 100)]
            by_class.setdefault(label, []).append((score, box))
        start += size
    for label, candidates in by_class.items():
        scores, boxes = torch.tensor([c[0] for c in candidates]), torch.tensor([c[1] for c in candidates])
        kept += [(*candidates[i], label) for i in nms(boxes, scores, overlap).tolist()]
    kept = sorted(kept, reverse=True)[:most]
    return Detections(
        torch.tensor([k[1] for k in kept]), torch.tensor([k[0] for k in kept]), torch.tensor([k[2] for k in kept])
    )


@pytest.mark.parametrize("seed", range(3))
def test_equals_a_plain_reference(seed: int) -> None:
    predictions = random_predictions(seed=seed)
    found = detect(predictions, topk_per_level=60, nms_threshold=0.4, max_detections=50)
    assert_equal(found, reference(predictions, 60, 0.05, 0.4, 50), atol=1e-4)
    assert len(found) == 50


@pytest.mark.parametrize("num_classes", [5, 20])  # few candidates, and more than 1000: torchvision has two ways
def test_equals_torchvision(num_classes: int) -> None:
    predictions = random_predictions(2, num_classes)
    settings = SimpleNamespace(
        score_thresh=0.05,
        topk_candidates=1000,
        nms_thresh=0.5,
        detections_per_img=10_000,
        box_coder=BoxCoder((1.0, 1.0, 1.0, 1.0)),
    )
    heads = {
        "cls_logits": list(predictions.cls_logits.split([120, 40], dim=1)),
        "bbox_regression": list(predictions.box_deltas.split([120, 40], dim=1)),
    }
    anchors = [list(predictions.anchors.split([120, 40]))] * 2
    sizes = [(100, 200), (90, 150)]
    theirs = TorchvisionRetinaNet.postprocess_detections(settings, heads, anchors, sizes)
    ours = Postprocessor(max_detections=300)(predictions, torch.tensor(sizes))
    for a, b in zip(ours, theirs, strict=True):
        # torchvision keeps boxes that clipping has left without area, and counts them
        solid = (b["boxes"][:, 2:] > b["boxes"][:, :2]).all(dim=1).nonzero()[:300, 0]
        assert_equal(a, Detections(b["boxes"][solid], b["scores"][solid], b["labels"][solid]), atol=1e-4)
        assert len(a) > 100


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_batch_equals_singles(kind: str) -> None:
    predictions, sizes = random_predictions(3), torch.tensor([[100, 200], [70, 120], [100, 90]])
    originals = torch.tensor([[50, 100], [140, 240], [100, 90]])
    postprocess = Postprocessor(nms=kind)
    together = postprocess(predictions, sizes, originals)
    for i, found in enumerate(together):
        cut = slice(i, i + 1)
        single = predictions._replace(cls_logits=predictions.cls_logits[cut], box_deltas=predictions.box_deltas[cut])
        assert_equal(postprocess(single, sizes[cut], originals[cut])[0], found)


# --- soft-NMS


def test_soft_nms_by_hand() -> None:
    # IoU of A and NEAR_A is 9/11: .8 becomes .8 exp(-(9/11)^2 / .5) = .2096
    found = detect(predict([A, NEAR_A, B], [[0.9], [0.8], [0.3]]), nms="soft", soft_nms_sigma=0.5)
    lowered = 0.8 * math.exp(-((9 / 11) ** 2) / 0.5)
    assert_found(found, [A, B, NEAR_A], [0.9, 0.3, lowered], [0, 0, 0])


def test_soft_nms_leaves_other_classes_alone() -> None:
    predictions = predict([A, NEAR_A], [[0.9, 0], [0, 0.8]])
    assert_found(detect(predictions, nms="soft"), [A, NEAR_A], [0.9, 0.8], [0, 1])
    agnostic = detect(predictions, nms="soft", class_agnostic=True)
    assert_found(agnostic, [A, NEAR_A], [0.9, 0.8 * math.exp(-((9 / 11) ** 2) / 0.5)], [0, 1])


def soft_nms_reference(
    boxes: list[list[float]], scores: list[float], groups: list[int], sigma: float, threshold: float, most: int
) -> list[tuple[int, float]]:
    """Bodla et al. 2017, figure 2, one box at a time."""

    def iou(a: list[float], b: list[float]) -> float:
        w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        if w <= 0 or h <= 0:
            return 0.0
        return w * h / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h)

    left = {i: score for i, score in enumerate(scores) if score > threshold}
    kept: list[tuple[int, float]] = []
    while left and len(kept) < most:
        best = max(left, key=lambda i: left[i])
        kept.append((best, left.pop(best)))
        for i in list(left):
            if groups[i] == groups[best]:
                left[i] *= math.exp(-(iou(boxes[best], boxes[i]) ** 2) / sigma)
            if left[i] <= threshold:
                del left[i]
    return kept


@pytest.mark.parametrize(("sigma", "threshold", "most"), [(0.5, 0.05, 200), (0.1, 0.2, 200), (0.5, 0.0, 10), (2.0, 0.05, 200)])
def test_soft_nms_equals_a_plain_reference(sigma: float, threshold: float, most: int) -> None:
    generator = torch.Generator().manual_seed(4)
    boxes = random_predictions().anchors[:80]
    scores = torch.rand(80, generator=generator)
    groups = torch.randint(0, 2, (80,), generator=generator)
    before = scores.clone()
    kept, lowered = soft_nms(boxes, scores, groups, sigma, threshold, most)
    expected = soft_nms_reference(boxes.tolist(), scores.tolist(), groups.tolist(), sigma, threshold, most)
    assert kept.tolist() == [i for i, _ in expected]
    torch.testing.assert_close(lowered, torch.tensor([score for _, score in expected]), rtol=1e-5, atol=1e-6)
    assert torch.equal(scores, before)  # the caller's scores are left alone


def test_soft_nms_with_a_tiny_sigma_is_hard_nms_at_any_overlap() -> None:
    boxes = torch.tensor([A, NEAR_A, B, C], dtype=torch.float32)
    kept, scores = soft_nms(boxes, torch.tensor([0.5, 0.9, 0.8, 0.01]), torch.zeros(4, dtype=torch.int64), 1e-4, 0.05, 100)
    assert kept.tolist() == [1, 2]
    torch.testing.assert_close(scores, torch.tensor([0.9, 0.8]))


# --- building


def test_names_and_ids_come_with_the_detections() -> None:
    categories = [Category(7, "cat"), Category(3, "dog")]
    postprocess = build_postprocessor(PostprocessConfig(score_threshold=0.4, max_detections=2), categories)
    (found,) = postprocess(predict([A, B, C], [[0.5, 0.3], [0.1, 0.9], [0.45, 0.1]]), SIZE)
    assert_found(found, [B, A], [0.9, 0.5], [1, 0])
    assert found.names == ["dog", "cat"]
    assert found.category_ids == [3, 7]


def test_gradients_stop() -> None:
    predictions = predict([A], [[0.5]])
    predictions.box_deltas.requires_grad_()
    assert not detect(predictions).boxes.requires_grad


def test_inputs_are_left_alone() -> None:
    predictions: Predictions = random_predictions()
    copies: list[Tensor] = [predictions.cls_logits.clone(), predictions.box_deltas.clone(), predictions.anchors.clone()]
    for kind in ("hard", "soft"):
        detect(predictions, nms=kind)
    assert all(torch.equal(a, b) for a, b in zip(predictions[:3], copies))


@pytest.mark.parametrize("most", [5, 100, 5000])
def test_hard_nms_of_many_equals_torchvisions_on_each_class(most: int) -> None:
    """Of the 4,000 candidates twice as many as are wanted are enough, or all are looked at."""
    torch.manual_seed(0)
    corner = 300 * torch.rand(4000, 2)
    boxes, scores = torch.cat([corner, corner + 10 + 90 * torch.rand(4000, 2)], dim=1), torch.rand(4000)
    labels = torch.randint(0, 5, (4000,))
    expected = torch.cat([(labels == c).nonzero()[:, 0][nms(boxes[labels == c], scores[labels == c], 0.5)] for c in range(5)])
    expected = expected[scores[expected].argsort(descending=True)]
    assert len(expected) > 1100 and (len(expected) > most) == (most < 5000)
    keep, kept_scores = hard_nms(boxes, scores, labels, 0.5, most)
    assert keep.tolist() == expected[:most].tolist()
    assert torch.equal(kept_scores, scores[keep])


def test_hard_nms_looks_further_where_few_of_the_first_survive() -> None:
    """Of 300 copies of a box one is kept, and the first 200 candidates are such; a box elsewhere comes last."""
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]] * 300 + [[50.0, 50.0, 60.0, 60.0]])
    keep, _ = hard_nms(boxes, torch.linspace(0.9, 0.1, 301), torch.zeros(301, dtype=torch.int64), 0.5, 100)
    assert keep.tolist() == [0, 300]


def test_classes_are_kept_apart_exactly() -> None:
    """Shifted in float32 the second class's boxes, 80 classes and 4000 pixels away, would lose their last digits: their IoU
    is just below the threshold, and rounding to 1/32 of a pixel would lift it above."""
    boxes = torch.tensor([[0.0, 0.0, 4000.0, 1.0], [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.499, 1.0]])
    labels = torch.tensor([0, 79, 79])
    assert hard_nms(boxes, torch.tensor([0.9, 0.8, 0.7]), labels, 0.4995, 10)[0].tolist() == [0, 1, 2]
    assert hard_nms(boxes, torch.tensor([0.9, 0.8, 0.7]), labels, 0.498, 10)[0].tolist() == [0, 1]


def test_a_nan_hides_no_other_class_of_its_anchor() -> None:
    assert_found(detect(predict([A], [[math.nan, 0.9]])), [A], [0.9], [1])


@pytest.mark.parametrize("topk", [1, 5, 12, 200])
def test_the_best_pairs_are_those_of_all_anchors(topk: int) -> None:
    """Only the anchors with the best best class are looked at: against sorting all 90 pairs, three anchors having a NaN."""
    scores = torch.rand(30, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.9 + 0.06
    scores[4, 1], scores[5, 1], scores[6] = math.nan, math.nan, torch.tensor([0.99, math.nan, 0.985])
    boxes = [[20.0 * n, 0, 20.0 * n + 10, 10] for n in range(30)]  # apart: NMS takes none
    found = Postprocessor(topk_per_level=topk, max_detections=200)(predict(boxes, scores.tolist()), torch.tensor([[20, 700]]))[
        0
    ]
    pairs = sorted(
        ((s, n, k) for n, row in enumerate(scores.tolist()) for k, s in enumerate(row) if not math.isnan(s)), reverse=True
    )
    got = list(zip((found.boxes[:, 0] / 20).round().int().tolist(), found.labels.tolist(), strict=True))
    assert got == [(n, k) for _, n, k in pairs[:topk]]
