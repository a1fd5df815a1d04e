"""The training objective on a handful of anchors, computed by hand.

With logits of 0 every probability is 1/2: focal loss (alpha 1/4, gamma 2) is 1/4 * 1/4 ln 2 for a positive and
3/4 * 1/4 ln 2 for a negative.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from retinanet import criterion
from retinanet.config import LossConfig
from retinanet.criterion import OF_BOXES, OF_DELTAS, RetinaNetLoss, build_criterion
from retinanet.matcher import ATSSMatcher, Matcher
from retinanet.structures import Predictions, Target

BOX_LOSSES = [*OF_DELTAS, *OF_BOXES]
POSITIVE, NEGATIVE = math.log(2) / 16, 3 * math.log(2) / 16

ANCHORS = torch.tensor(
    [
        [0.0, 0, 10, 10],
        [0, 0, 10, 4.5],  # IoU 0.45 with the first: between the thresholds of a box there
        [100, 0, 110, 10],
        [200, 0, 210, 20],
    ]
)
FIRST = ANCHORS[:1]  # a box that fits the first anchor


def target(boxes: Tensor | None = None, labels: tuple[int, ...] = (), crowds: Tensor | None = None) -> Target:
    none = torch.zeros(0, 4)
    return Target(none if boxes is None else boxes, torch.tensor(labels, dtype=torch.int64), none if crowds is None else crowds)


def predictions(batch: int = 1, num_classes: int = 2, dtype: torch.dtype = torch.float32) -> Predictions:
    """All logits and deltas 0, with gradients."""
    logits = torch.zeros(batch, 4, num_classes, dtype=dtype, requires_grad=True)
    deltas = torch.zeros(batch, 4, 4, dtype=dtype, requires_grad=True)
    return Predictions(logits, deltas, ANCHORS, [4])


def random_predictions(batch: int, dtype: torch.dtype = torch.float32) -> Predictions:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, 4, 2, generator=generator)
    deltas = 0.3 * torch.randn(batch, 4, 4, generator=generator)  # boxes still overlap their anchors: no loss is flat there
    return Predictions(logits.to(dtype).requires_grad_(), deltas.to(dtype).requires_grad_(), ANCHORS, [4])


def backward(losses: dict[str, Tensor]) -> None:
    sum(losses.values()).backward()


def test_by_hand() -> None:
    out = predictions()
    with torch.no_grad():
        out.box_deltas[0, 0] = torch.tensor([0.1, -0.2, 0.3, 0.4])  # the box is the anchor itself: all should be 0
        out.box_deltas[0, 2:] = 9  # background has no box loss
    losses = RetinaNetLoss()(out, [target(FIRST, (1,))])
    assert list(losses) == ["loss_cls", "loss_box"]
    # the first anchor is a positive of class 1 and a negative of class 0, the second is ignored, two are background
    assert losses["loss_cls"].item() == pytest.approx(POSITIVE + 5 * NEGATIVE, rel=1e-6)
    assert losses["loss_box"].item() == pytest.approx(1.0, rel=1e-6)  # .1 + .2 + .3 + .4
    backward(losses)
    # a positive's slope at p = 1/2 is alpha / 4 * (2 / 2 * ln(1/2) - 1/2), a negative's -3 times that
    slope = (-math.log(2) - 0.5) / 16
    expected = torch.tensor([[-3 * slope, slope], [0, 0], [-3 * slope, -3 * slope], [-3 * slope, -3 * slope]])
    torch.testing.assert_close(out.cls_logits.grad[0], expected)
    signs = torch.tensor([[1.0, -1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    assert torch.equal(out.box_deltas.grad[0], signs)


def test_each_box_teaches_its_own_anchors_and_class() -> None:
    out = predictions(num_classes=3)
    with torch.no_grad():
        out.cls_logits[0, 0, 2] = 50  # right: nothing to pay
        out.cls_logits[0, 2, 0] = 50
    boxes = torch.tensor([[100.0, 0, 110, 10], [0, 0, 10, 10]])
    losses = RetinaNetLoss()(out, [target(boxes, (0, 2))])
    # two positives that are right; each has two other classes, the background anchor three; two anchors are foreground
    assert losses["loss_cls"].item() == pytest.approx(7 * NEGATIVE / 2, rel=1e-6)


def test_box_targets_are_deltas_of_the_matched_box() -> None:
    box = torch.tensor([[101.0, 2, 111, 12]])  # the third anchor moved by (1, 2), sides of 10: deltas .1 and .2
    losses = RetinaNetLoss()(predictions(), [target(box, (0,))])
    assert losses["loss_box"].item() == pytest.approx(0.3, rel=1e-5)


def test_normalised_by_the_foreground_of_the_batch() -> None:
    boxes = torch.cat([ANCHORS[0:1], ANCHORS[2:3], ANCHORS[3:4]])
    targets = [target(boxes, (0, 0, 1)), target(FIRST, (0,)), target()]
    out = random_predictions(3)
    sums, losses = RetinaNetLoss().sums(out, targets), RetinaNetLoss()(out, targets)
    assert sums.num_foreground.item() == 4  # 3, 1 and 0
    assert sums.num_foreground.dtype == torch.float32
    torch.testing.assert_close(losses["loss_cls"], sums.loss_cls / 4)
    torch.testing.assert_close(losses["loss_box"], sums.loss_box / 4)


def test_batch_equals_the_sum_of_singles() -> None:
    targets = [target(FIRST, (1,)), target(), target(ANCHORS[2:], (0, 1), crowds=FIRST)]
    out = random_predictions(3)
    criterion = RetinaNetLoss()
    together = criterion.sums(out, targets)
    singles = [
        criterion.sums(Predictions(out.cls_logits[i : i + 1], out.box_deltas[i : i + 1], ANCHORS, [4]), [targets[i]])
        for i in range(3)
    ]
    for total, *parts in zip(together, *singles):
        torch.testing.assert_close(total, torch.stack(parts).sum())


def test_no_objects() -> None:
    out = predictions()
    losses = RetinaNetLoss()(out, [target()])
    assert losses["loss_cls"].item() == pytest.approx(8 * NEGATIVE, rel=1e-6)  # divided by 1, not by 0
    assert losses["loss_box"].item() == 0
    backward(losses)
    assert not out.box_deltas.grad.any()
    assert (out.cls_logits.grad > 0).all()


@pytest.mark.parametrize("box_loss", BOX_LOSSES)
def test_all_anchors_ignored_and_no_objects(box_loss: str) -> None:
    everywhere = torch.tensor([[-1000.0, -1000, 1000, 1000]])
    out = random_predictions(1)
    losses = RetinaNetLoss(box_loss=box_loss)(out, [target(crowds=everywhere)])
    assert losses["loss_cls"].item() == losses["loss_box"].item() == 0
    backward(losses)
    assert not out.cls_logits.grad.any() and not out.box_deltas.grad.any()


@pytest.mark.parametrize("logit", [-1e4, -3.0, 0.0, 3.0, 1e4])
def test_ignored_anchors_contribute_nothing(logit: float) -> None:
    crowd = torch.tensor([[190.0, -10, 220, 30]])  # around the fourth anchor
    truth = target(FIRST, (1,), crowds=crowd)
    plain, changed = predictions(), predictions()
    with torch.no_grad():
        changed.cls_logits[0, [1, 3]] = logit  # between the thresholds, and inside the crowd
        changed.box_deltas[0, 1:] = 7
    first, second = RetinaNetLoss()(plain, [truth]), RetinaNetLoss()(changed, [truth])
    assert torch.equal(first["loss_cls"], second["loss_cls"])
    assert torch.equal(first["loss_box"], second["loss_box"])
    assert first["loss_cls"].item() == pytest.approx(POSITIVE + 3 * NEGATIVE, rel=1e-6)
    backward(second)
    assert not changed.cls_logits.grad[0, [1, 3]].any()
    assert changed.cls_logits.grad[0, [0, 2]].all()
    assert not changed.box_deltas.grad[0, 1:].any()


def test_smooth_l1() -> None:
    out = predictions()
    with torch.no_grad():
        out.box_deltas[0, 0] = torch.tensor([0.05, -0.2, 0.0, 1.0])
    losses = RetinaNetLoss(box_loss="smooth_l1", box_loss_options={"beta": 0.1})(out, [target(FIRST, (1,))])
    # .05^2 / .2 + (.2 - .05) + 0 + (1 - .05)
    assert losses["loss_box"].item() == pytest.approx(0.0125 + 0.15 + 0.95, rel=1e-5)


def test_giou() -> None:
    out = predictions()
    with torch.no_grad():
        out.box_deltas[0, 2, 0] = 0.5  # the third anchor, moved by half its width
    truth = target(ANCHORS[[0, 2]], (1, 1))
    losses = RetinaNetLoss(box_loss="giou")(out, [truth])
    # 0 for the first and 1 - 50 / 150 for the other, whose hull is the union; by two foreground anchors
    assert losses["loss_box"].item() == pytest.approx((0 + 2 / 3) / 2, abs=1e-6)
    backward(losses)
    assert out.box_deltas.grad[0, 2, 0] > 0  # back to the left
    assert not out.box_deltas.grad[0, [1, 3]].any()


@pytest.mark.parametrize("box_loss", BOX_LOSSES)
def test_weight_of_the_box_loss(box_loss: str) -> None:
    truth = [target(FIRST + 1, (1,))]
    one = RetinaNetLoss(box_loss=box_loss)(random_predictions(1), truth)
    three = RetinaNetLoss(box_loss=box_loss, box_loss_weight=3.0)(random_predictions(1), truth)
    torch.testing.assert_close(three["loss_box"], one["loss_box"] * 3)
    assert torch.equal(three["loss_cls"], one["loss_cls"])
    assert one["loss_box"] > 0


@pytest.mark.parametrize("box_loss", BOX_LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_inside_autocast(box_loss: str, dtype: torch.dtype) -> None:
    criterion, truth = RetinaNetLoss(box_loss=box_loss), [target(FIRST + 1, (1,))]
    half = random_predictions(1, dtype)
    exact = Predictions(half.cls_logits.float(), half.box_deltas.float(), ANCHORS, [4])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = criterion(half, truth)
    for name, expected in criterion(exact, truth).items():
        assert losses[name].dtype == torch.float32
        assert torch.equal(losses[name], expected)
    backward(losses)
    assert half.cls_logits.grad.isfinite().all() and half.box_deltas.grad.isfinite().all()


def spoil_logits(out: Predictions) -> None:
    out.cls_logits[0, 2, 0] = math.nan


def spoil_deltas(out: Predictions) -> None:
    out.box_deltas[0, 0, 3] = math.nan


@pytest.mark.parametrize(("spoil", "name"), [(spoil_logits, "loss_cls"), (spoil_deltas, "loss_box")])
@pytest.mark.parametrize("box_loss", BOX_LOSSES)
def test_nan_shows_in_the_loss(spoil: Callable[[Predictions], None], name: str, box_loss: str) -> None:
    out = predictions()
    with torch.no_grad():
        spoil(out)
    losses = RetinaNetLoss(box_loss=box_loss)(out, [target(FIRST, (1,))])
    assert [key for key, loss in losses.items() if loss.isnan()] == [name]


def test_extreme_predictions_have_finite_gradients() -> None:
    for box_loss in ("l1", "smooth_l1", "giou"):
        out = predictions()
        with torch.no_grad():
            out.cls_logits.fill_(1e4)
            out.box_deltas.fill_(1e4)
        losses = RetinaNetLoss(box_loss=box_loss)(out, [target(FIRST, (1,))])
        backward(losses)
        assert all(loss.isfinite() for loss in losses.values())
        assert out.cls_logits.grad.isfinite().all() and out.box_deltas.grad.isfinite().all()


def test_as_many_targets_as_images() -> None:
    with pytest.raises(ValueError, match="zip"):
        RetinaNetLoss()(predictions(2), [target()])


def test_matching_follows_the_matcher_given() -> None:
    truth = [target(torch.tensor([[0.0, 0, 10, 10]]), (1,))]
    generous = RetinaNetLoss(Matcher(foreground_iou=0.45, background_iou=0.4))
    assert RetinaNetLoss().sums(predictions(), truth).num_foreground == 1
    assert generous.sums(predictions(), truth).num_foreground == 2  # IoU 1 and 0.45


def test_build_criterion_follows_the_config() -> None:
    config = LossConfig(
        alpha=0.5,
        gamma=0,
        box_loss="smooth_l1",
        smooth_l1_beta=0.5,
        box_loss_weight=2,
        foreground_iou=0.7,
        background_iou=0.5,
        low_quality_matches=False,
    )
    out = predictions()
    with torch.no_grad():
        out.box_deltas[0, 0, 0] = 1
    sums = build_criterion(config).sums(out, [target(FIRST, (1,))])
    # ln 2 / 2 for each of 2 classes and 4 anchors: the second, at .45, is background now
    assert sums.loss_cls.item() == pytest.approx(8 * math.log(2) / 2, rel=1e-6)
    assert sums.loss_box.item() == pytest.approx(2 * (1 - 0.25), rel=1e-6)
    far = target(torch.tensor([[100.0, 0, 110, 4]]), (1,))  # IoU .4 with the third: not the .7, and no low-quality match
    assert build_criterion(config).sums(predictions(), [far]).num_foreground == 0


def test_build_criterion_gives_each_box_loss_its_own_numbers() -> None:
    """The box is the anchor, the prediction lies beside it: by hand from the formulas."""
    focal_l1 = 0.5 * math.e * (1 - 2 * math.log(0.5)) / 4  # at 1, with beta 1/2
    # half a side to the right: IoU 50 / 150, centres 5 apart, hull 15 x 10
    focal_eiou = (1 / 3) ** 1.5 * (2 / 3 + 25 / (15**2 + 10**2))
    for settings, expected in (
        ({"box_loss": "focal_l1", "focal_l1_beta": 0.5}, focal_l1),
        ({"box_loss": "focal_eiou", "focal_eiou_gamma": 1.5}, focal_eiou),
    ):
        out = predictions()
        with torch.no_grad():
            out.box_deltas[0, 0] = torch.tensor([1.0 if "l1" in str(settings["box_loss"]) else 0.5, 0, 0, 0])
        sums = build_criterion(LossConfig(**settings)).sums(out, [target(FIRST, (1,))])  # type: ignore[arg-type]
        assert sums.loss_box.item() == pytest.approx(expected, rel=1e-5), settings


def test_without_alpha_and_gamma_the_loss_is_cross_entropy() -> None:
    sums = build_criterion(LossConfig(alpha=None, gamma=0)).sums(predictions(), [target(FIRST, (1,))])
    assert sums.loss_cls.item() == pytest.approx(6 * math.log(2), rel=1e-6)  # 3 anchors that count, 2 classes


def test_build_criterion_chooses_the_matcher() -> None:
    """Three anchors a cell: of two cells ATSS looks at the nearer one alone, with topk 1."""
    matcher = build_criterion(LossConfig(matcher="atss", atss_topk=1), anchors_per_cell=3).matcher
    assert isinstance(matcher, ATSSMatcher) and (matcher.topk, matcher.anchors_per_cell) == (1, 3)
    assert isinstance(build_criterion(LossConfig()).matcher, Matcher)


@pytest.mark.parametrize("matcher", [Matcher(), ATSSMatcher(topk=2, anchors_per_cell=3)])
@pytest.mark.parametrize("box_loss", BOX_LOSSES)
def test_the_host_never_waits_for_a_gpu(box_loss: str, matcher: Matcher | ATSSMatcher) -> None:
    """Tensors without data that say they are on a GPU: what needs a value on the host (`item`, a mask as index) raises."""
    with FakeTensorMode():
        anchors, some, none = (torch.empty(n, 4, device="cuda") for n in (24, 2, 0))
        logits, deltas = (torch.empty(2, 24, n, device="cuda", requires_grad=True) for n in (3, 4))
        targets = [Target(boxes, torch.empty(len(boxes), dtype=torch.int64, device="cuda"), some) for boxes in (some, none)]
        sums = RetinaNetLoss(matcher, box_loss=box_loss).sums(Predictions(logits, deltas, anchors, [18, 6]), targets)
        assert sums.loss_cls.requires_grad and sums.loss_box.requires_grad
        with pytest.raises(DynamicOutputShapeException):  # so that the above says something
            logits[logits > 0]


@pytest.mark.parametrize("box_loss", BOX_LOSSES)
def test_the_gpus_way_through_the_box_loss_gives_the_same(box_loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All anchors instead of the foreground alone, and NaN in the deltas of one that does not count."""
    pairs, found = criterion._pairs, []
    for select in (True, False):
        monkeypatch.setattr(criterion, "_pairs", lambda *tensors, select, way=select: pairs(*tensors, select=way))
        out = random_predictions(2)
        deltas = torch.where(torch.arange(4)[:, None] == 3, torch.nan, out.box_deltas)
        sums = RetinaNetLoss(box_loss=box_loss).sums(out._replace(box_deltas=deltas), [target(FIRST + 1, (1,)), target()])
        sums.loss_box.backward()
        assert out.box_deltas.grad is not None and sums.num_foreground == 1
        found.append((sums.loss_box.detach(), out.box_deltas.grad))
    assert found[0][0] > 0 and found[0][1].isfinite().all()
    torch.testing.assert_close(found[1], found[0])
