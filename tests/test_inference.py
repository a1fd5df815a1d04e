"""The fast copy of a detector that inference runs on, beside the plain model it was made from."""

import copy
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from equality import Found, compare
from torch import Tensor, nn

from retinanet import RetinaNet
from retinanet.anchors import AnchorGenerator
from retinanet.backbone import FrozenBatchNorm2d
from retinanet.inference import detect_batches, prepare
from retinanet.postprocess import Postprocessor
from retinanet.structures import Batch, Predictions, Target

SIZES = torch.tensor([[96, 128], [70, 128]])


def lively(norm: str, head_norm: str = "none") -> RetinaNet:
    """Random weights, and statistics as far from 0 and 1 as trained ones, so that a norm left out or folded twice shows."""
    torch.manual_seed(3)
    anchors = AnchorGenerator([8, 16, 32, 64, 128])
    model = RetinaNet(5, "resnet18", norm=norm, fpn_channels=32, head_convs=2, head_norm=head_norm, anchors=anchors)
    for name, values in [*model.named_buffers(), *model.named_parameters()]:
        if values.ndim == 1 and "backbone" in name and values.is_floating_point():
            low, high = (-0.3, 0.3) if name.endswith(("bias", "running_mean")) else (0.4, 1.6)
            values.data.uniform_(low, high)
    nn.init.normal_(model.cls_subnet.final.weight, std=0.3)
    nn.init.zeros_(model.cls_subnet.final.bias)  # type: ignore[arg-type]
    return model.train()


def images() -> Tensor:
    return torch.randint(0, 256, (2, 3, 96, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def plain(model: RetinaNet) -> Predictions:
    return copy.deepcopy(model).eval()(images(), SIZES)


@pytest.mark.parametrize(("norm", "head_norm"), [("frozen", "none"), ("batch", "none"), ("group", "group")])
def test_folded_norms_compute_the_same(norm: str, head_norm: str) -> None:
    model = lively(norm, head_norm)
    fast = prepare(model)
    left = [m for m in fast.modules() if isinstance(m, FrozenBatchNorm2d | nn.BatchNorm2d)]
    assert not left
    expected, found = plain(model), fast(images(), SIZES)
    spread = float(expected.cls_logits.std())
    assert spread > 0.5  # or equality would mean little
    torch.testing.assert_close(found.cls_logits, expected.cls_logits, rtol=1e-4, atol=1e-4 * spread)
    torch.testing.assert_close(found.box_deltas, expected.box_deltas, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.anchors, expected.anchors)


def test_the_same_is_detected() -> None:
    model = lively("frozen")
    batch = Batch(
        images(), SIZES, SIZES, [Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))] * 2, []
    )
    postprocess = Postprocessor(score_threshold=0.55)
    (_, found, losses), *more = detect_batches(prepare(model), [batch], postprocess, device=torch.device("cpu"))
    expected = postprocess(plain(model), SIZES)
    assert losses is None and not more
    agreement = compare(*([Found(d.boxes, d.scores, d.labels) for d in some] for some in (found, expected)))
    assert agreement.count >= 100
    assert agreement.share == 1.0  # score to 1e-4, box to 0.01 px


def test_bf16_reaches_the_convolutions_and_nothing_else() -> None:
    model = lively("frozen")
    fast = prepare(model, "bf16")
    for name, values in [*fast.named_parameters(), *fast.named_buffers()]:
        kept = name in ("mean", "std") or "anchor_generator" in name
        assert values.dtype == (torch.float32 if kept else torch.bfloat16), name
    expected, found = plain(model), fast(images(), SIZES)
    assert found.cls_logits.dtype == torch.bfloat16
    assert torch.equal(found.anchors, expected.anchors)
    error = (found.cls_logits.float() - expected.cls_logits).std() / expected.cls_logits.std()
    assert 0 < error < 0.05  # 2^-9 by rounding in each of some 25 layers: 25^0.5 * 2^-9 is 1 %


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_model_itself_is_left_alone(precision: str) -> None:
    """Also where it has the format and the layout already that it is copied to."""
    model = lively("batch").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    before = copy.deepcopy(model.state_dict())
    fast = prepare(model, precision)
    fast(images(), SIZES)
    with torch.no_grad():
        for values in fast.parameters():
            values.zero_()  # shares no memory
    assert model.training and all(values.requires_grad for values in model.parameters())
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_what_is_no_detector_of_ours_is_returned() -> None:
    other = nn.Conv2d(3, 3, 1)
    assert prepare(other, "bf16", compile=True) is other
    assert other.weight.dtype == torch.float32


def compiled() -> list[np.ndarray]:
    found = prepare(lively("frozen"), compile=True)(images(), SIZES)
    return [found.cls_logits.numpy(), found.box_deltas.numpy()]


@pytest.mark.slow  # half a minute of compiling
def test_compiled_it_computes_the_same() -> None:
    """In a process of its own: the compiler's native code has ended one, a segmentation fault, in which OpenVINO and
    onnxruntime had run before."""
    expected = plain(lively("frozen"))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        logits, deltas = pool.submit(compiled).result()
    np.testing.assert_allclose(logits, expected.cls_logits.numpy(), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(deltas, expected.box_deltas.numpy(), rtol=1e-3, atol=1e-3)
