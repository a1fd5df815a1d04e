"""The model: shapes, order of outputs, padding, initialisation, norms and freezing, the pyramid, pretrained backbones."""

import io
import math
import urllib.error
from collections.abc import Callable
from http.client import IncompleteRead
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from retinanet.anchors import STRIDES, AnchorGenerator
from retinanet.backbone import FrozenBatchNorm2d, ResNetBackbone, load_backbone_weights
from retinanet.config import Backbone, InputConfig, ModelConfig
from retinanet.criterion import RetinaNetLoss
from retinanet.errors import UserError
from retinanet.fpn import FPN
from retinanet.head import Subnet, prior_bias
from retinanet.model import RetinaNet, build_model
from retinanet.structures import Predictions, Target

TINY: dict[str, Any] = {"num_classes": 3, "backbone": "resnet18", "fpn_channels": 32, "head_convs": 1}
RESNET18_FILE = "resnet18-f37072fd.pth"  # torchvision's IMAGENET1K_V1


@pytest.fixture(autouse=True)
def _same_weights_each_time() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def model() -> RetinaNet:
    torch.manual_seed(0)
    return RetinaNet(**TINY).eval()


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def assert_same(a: Predictions, b: Predictions, **tolerance: float) -> None:
    torch.testing.assert_close(a.cls_logits, b.cls_logits, **tolerance)
    torch.testing.assert_close(a.box_deltas, b.box_deltas, **tolerance)
    assert torch.equal(a.anchors, b.anchors)
    assert a.level_sizes == b.level_sizes


# --- shapes


@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 32), (33, 70), (1, 1), (127, 129)])
def test_output_shapes(model: RetinaNet, height: int, width: int) -> None:
    with torch.no_grad():
        out = model(images(2, 3, height, width))
    # every level has ceil(side / stride) cells: all convolutions of stride 2 are padded
    cells = [math.ceil(height / stride) * math.ceil(width / stride) for stride in STRIDES]
    assert out.level_sizes == [9 * n for n in cells]
    total = sum(out.level_sizes)
    assert out.cls_logits.shape == (2, total, 3)
    assert out.box_deltas.shape == (2, total, 4)
    assert out.anchors.shape == (total, 4)
    assert all(t.dtype == torch.float32 for t in (out.cls_logits, out.box_deltas, out.anchors))


@pytest.mark.parametrize("name", get_args(Backbone))
def test_every_backbone(name: str) -> None:
    with torch.device("meta"):  # shapes only
        detector = RetinaNet(80, name)
        theirs = getattr(torchvision.models, name)(weights=None)
        c3, c4, c5 = detector.backbone(torch.zeros(1, 3, 64, 96))
        out = detector(torch.zeros(1, 3, 800, 1333))
    widths = [128, 256, 512] if name in ("resnet18", "resnet34") else [512, 1024, 2048]
    assert [c3.shape, c4.shape, c5.shape] == [(1, widths[0], 8, 12), (1, widths[1], 4, 6), (1, widths[2], 2, 3)]
    assert out.cls_logits.shape == (1, 200_700, 80)  # 9 (100 * 167 + 50 * 84 + 25 * 42 + 13 * 21 + 7 * 11)
    assert out.box_deltas.shape == (1, 200_700, 4)
    keys = {key for key in theirs.state_dict() if not key.startswith("fc.") and not key.endswith("num_batches_tracked")}
    assert set(detector.backbone.state_dict()) == keys  # torchvision's names, so that its weights fit


P2_SIZES = [8.0, 16, 32, 64, 128, 256]


def with_p2(**changes: Any) -> RetinaNet:
    return RetinaNet(**{**TINY, "anchors": AnchorGenerator(P2_SIZES), **changes})


@pytest.mark.parametrize(("height", "width"), [(64, 96), (33, 70), (1, 1)])
def test_output_shapes_with_p2(height: int, width: int) -> None:
    with torch.no_grad():
        out = with_p2().eval()(images(2, 3, height, width))
    cells = [math.ceil(height / stride) * math.ceil(width / stride) for stride in (4, 8, 16, 32, 64, 128)]
    assert out.level_sizes == [9 * n for n in cells]
    assert out.cls_logits.shape == (2, 9 * sum(cells), 3) and out.anchors.shape == (9 * sum(cells), 4)


def test_p2_is_one_level_more_and_changes_no_other(model: RetinaNet) -> None:
    """The same weights, under the same names, give the same P3..P7."""
    finer = with_p2(freeze_stages=2).eval()
    missing, unexpected = finer.load_state_dict(model.state_dict(), strict=False)
    assert unexpected == []
    assert missing == [f"fpn.{name}.{kind}" for name in ("lateral_c2", "output_p2") for kind in ("weight", "bias")]
    x = images(1, 3, 64, 96)
    with torch.no_grad():
        features, pyramid = finer.backbone(finer.normalize(x)), finer.fpn(finer.backbone(finer.normalize(x)))
        expected = model.fpn(model.backbone(model.normalize(x)))
    assert [tuple(f.shape[1:]) for f in features] == [(64, 16, 24), (128, 8, 12), (256, 4, 6), (512, 2, 3)]
    assert pyramid[0].shape == (1, 32, 16, 24)
    assert len(pyramid) == 6 and all(torch.equal(a, b) for a, b in zip(pyramid[1:], expected, strict=True))
    frozen = {name.split(".")[1] for name, value in finer.named_parameters() if not value.requires_grad}
    assert frozen == {"conv1", "layer1"}  # the stem and what makes C2, as without P2


def test_p2_is_made_of_c2_and_p3_by_hand() -> None:
    fpn = FPN([1, 1, 1, 1], 1)
    for parameter in fpn.parameters():
        nn.init.zeros_(parameter)
    for convolution in (fpn.lateral_c2, *fpn.lateral):
        nn.init.ones_(convolution.weight)
    with torch.no_grad():
        for convolution in (fpn.output_p2, *fpn.output):
            convolution.weight[0, 0, 1, 1] = 1
    features = [torch.full((1, 1, side, side), value) for side, value in ((8, 1000.0), (4, 100.0), (2, 10.0), (1, 1.0))]
    with torch.no_grad():
        pyramid = fpn(features)
    assert [float(level[0, 0, -1, -1]) for level in pyramid] == [1111, 111, 11, 1, 0, 0]  # each adds what is coarser


def test_a_step_of_training_with_p2_lowers_the_loss() -> None:
    finer = with_p2(norm="group").train()
    box = torch.tensor([[20.0, 20, 26, 26]])  # of the size that only P2's anchors have
    target, criterion = Target(box, torch.tensor([1]), torch.zeros(0, 4)), RetinaNetLoss()
    optimizer = torch.optim.SGD(finer.parameters(), lr=0.001)
    x, losses = images(1, 3, 64, 64), []
    for _ in range(3):
        parts = criterion(finer(x), [target])
        loss = parts["loss_cls"] + parts["loss_box"]
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]
    for convolution in (finer.fpn.lateral_c2, finer.fpn.output_p2):
        assert convolution.weight.grad is not None and convolution.weight.grad.abs().max() > 0


def test_one_return_type_in_every_mode(model: RetinaNet) -> None:
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        in_eval = model(x)
        in_training = model.train()(x)
        model.eval()
    assert type(in_eval) is type(in_training) is Predictions
    assert_same(in_eval, in_training)  # frozen norms: the mode changes nothing


def test_outputs_follow_the_anchors_order() -> None:
    # no hidden convolution, and a last one that passes channel 0 of its own cell on, plus a bias that names the channel
    subnet = Subnet(1, num_anchors=2, outputs=3, num_convs=0)
    nn.init.zeros_(subnet.final.weight)
    with torch.no_grad():
        subnet.final.weight[:, 0, 1, 1] = 1
        subnet.final.bias.copy_(torch.arange(6))  # anchor 0: 0 1 2, anchor 1: 3 4 5
    p3 = torch.tensor([[10.0, 20], [30, 40]])[None, None]
    p4 = torch.tensor([[50.0]])[None, None]
    out = subnet([p3, p4])
    cell = [10, 10, 20, 20, 30, 30, 40, 40, 50, 50]  # levels, rows, columns, then the two anchors
    expected = [[c + 0 + 3 * (r % 2), c + 1 + 3 * (r % 2), c + 2 + 3 * (r % 2)] for r, c in enumerate(cell)]
    assert out.tolist() == [expected]


def test_heads_are_shared_by_the_levels(model: RetinaNet) -> None:
    features = torch.randn(1, 32, 3, 3)
    with torch.no_grad():
        out = model.cls_subnet([features] * 5)
    first, *others = out.split(81, dim=1)  # 3 * 3 cells of 9
    assert all(torch.equal(first, other) for other in others)


def test_head_convolutions_and_norms() -> None:
    plain, normed = Subnet(64, 9, 4), Subnet(64, 9, 4, num_convs=2, norm="group")
    assert [type(layer) for layer in plain.convs] == [nn.Conv2d, nn.ReLU] * 4
    assert [type(layer) for layer in normed.convs] == [nn.Conv2d, nn.GroupNorm, nn.ReLU] * 2
    assert all(layer.bias is None for layer in normed.convs if isinstance(layer, nn.Conv2d))  # the norm has one
    assert all(layer.bias is not None for layer in plain.convs if isinstance(layer, nn.Conv2d))
    assert normed([torch.randn(1, 64, 2, 2)]).shape == (1, 36, 4)


# --- input


def test_normalisation_by_hand() -> None:
    small = RetinaNet(**TINY, mean=(10, 20, 30), std=(1, 2, 4))
    pixel = torch.tensor([12, 20, 22], dtype=torch.uint8).view(1, 3, 1, 1)
    assert small.normalize(pixel).flatten().tolist() == [2, 0, -2]  # (12 - 10) / 1, (20 - 20) / 2, (22 - 30) / 4
    assert torch.equal(small.state_dict()["mean"].flatten(), torch.tensor([10.0, 20, 30]))  # travels with the weights
    assert torch.equal(small.state_dict()["std"].flatten(), torch.tensor([1.0, 2, 4]))


def test_uint8_equals_float(model: RetinaNet) -> None:
    x = images(1, 3, 40, 72)
    with torch.no_grad():
        assert_same(model(x), model(x.float()), rtol=0, atol=0)


def test_padding_is_zero_after_normalising(model: RetinaNet) -> None:
    x = images(2, 3, 32, 48)
    sizes = torch.tensor([[32, 20], [7, 48]])
    normalized, plain = model.normalize(x, sizes), model.normalize(x)
    assert torch.equal(normalized[0, :, :, :20], plain[0, :, :, :20])
    assert torch.equal(normalized[1, :, :7], plain[1, :, :7])
    assert not normalized[0, :, :, 20:].any()
    assert not normalized[1, :, 7:].any()


@pytest.mark.parametrize("content", [0, 200, math.nan, math.inf])
def test_content_of_the_padding_cannot_matter(model: RetinaNet, content: float) -> None:
    x = images(2, 3, 64, 64).float()
    sizes = [(64, 40), (33, 64)]
    filled = x.clone()
    filled[0, :, :, 40:] = content
    filled[1, :, 33:] = content
    with torch.no_grad():
        assert_same(model(filled, sizes), model(x, sizes), rtol=0, atol=0)
        if math.isfinite(content):
            assert_same(model(filled.to(torch.uint8), torch.tensor(sizes)), model(x, sizes), rtol=0, atol=0)


def test_batch_of_two_equals_two_singles(model: RetinaNet) -> None:
    x, sizes = images(2, 3, 64, 96), torch.tensor([[64, 96], [50, 64]])
    with torch.no_grad():
        both = model(x, sizes)
        for i in range(2):
            one = model(x[i : i + 1], sizes[i : i + 1])
            single = Predictions(both.cls_logits[i : i + 1], both.box_deltas[i : i + 1], both.anchors, both.level_sizes)
            # not to the bit: convolutions may add in another order for another batch size
            assert_same(one, single, rtol=1e-4, atol=1e-5)


# --- initialisation


def test_prior() -> None:
    assert prior_bias(0.01) == pytest.approx(-4.59512, abs=1e-5)  # -ln 99
    assert prior_bias(0.5) == 0
    detector = RetinaNet(**TINY)
    assert torch.equal(detector.cls_subnet.final.bias, torch.full((27,), prior_bias(0.01)))
    assert not detector.box_subnet.final.bias.any()
    features = [torch.randn(1, 32, 4, 4)] * 5
    with torch.no_grad():
        probability = detector.cls_subnet(features).sigmoid()
    # weights of 0.01 leave little beside the bias
    assert probability.mean().item() == pytest.approx(0.01, rel=0.05)
    assert probability.max() < 0.02


def test_he_initialised_heads_keep_the_size_of_the_signal() -> None:
    torch.manual_seed(0)
    features = torch.randn(1, 256, 32, 32)
    size = features.square().mean()  # 1
    after = {init: Subnet(256, 9, 4, init=init).convs(features).square().mean() / size for init in ("paper", "he")}
    # N(0, 0.01), 2304 inputs: 2304 x 1e-4 at the first convolution, half of it behind each ReLU: 0.115^4 = 1.8e-4
    assert after["paper"].item() == pytest.approx(1.8e-4, rel=0.3)  # the border sees fewer inputs
    assert after["he"].item() == pytest.approx(1.0, rel=0.3)  # 2 / 2304 is the variance that undoes the halving
    assert Subnet(256, 9, 4, init="he").final.weight.std().item() == pytest.approx(0.01, rel=0.05)  # the prior holds


def test_initial_weights_of_head_and_pyramid() -> None:
    subnet = Subnet(64, 9, 4)
    for layer in subnet.modules():
        if isinstance(layer, nn.Conv2d):
            assert layer.weight.std().item() == pytest.approx(0.01, rel=0.05)
            assert not layer.bias.any()
    for layer in FPN([64, 64, 64], 32).modules():
        if isinstance(layer, nn.Conv2d):
            bound = math.sqrt(3 / (64 if layer.in_channels == 64 else 32) / layer.kernel_size[0] ** 2)
            # uniform on +- sqrt(3 / fan-in) keeps the variance
            assert 0.97 * bound < layer.weight.abs().max().item() <= bound
            assert not layer.bias.any()


def test_anchors_are_not_in_the_state_dict(model: RetinaNet) -> None:
    parts = {key.partition(".")[0] for key in model.state_dict()}
    assert parts == {"mean", "std", "backbone", "fpn", "cls_subnet", "box_subnet"}


# --- norms and freezing


@pytest.mark.parametrize(
    ("norm", "kind"),
    [
        ("frozen", FrozenBatchNorm2d),
        ("batch", nn.BatchNorm2d),
        ("sync", nn.SyncBatchNorm),
        ("group", nn.GroupNorm),
    ],
)
def test_norms(norm: str, kind: type[nn.Module]) -> None:
    backbone = ResNetBackbone("resnet18", norm=norm)
    norms = [m for m in backbone.modules() if "Norm" in type(m).__name__]
    assert len(norms) == 20  # 1 in the stem, 2 in each of 8 blocks, 3 where a stage changes the width
    assert all(type(m) is kind for m in norms)
    assert bool(list(norms[0].parameters())) == (norm != "frozen")
    c5 = backbone.eval()(torch.randn(1, 3, 64, 64))[-1]
    assert c5.shape == (1, 512, 2, 2) and c5.isfinite().all()


def frozen_norm() -> FrozenBatchNorm2d:
    norm = FrozenBatchNorm2d(6)
    for name, buffer in norm.named_buffers():
        nn.init.uniform_(buffer, 0.5, 2) if name == "running_var" else nn.init.normal_(buffer)
    return norm


def test_frozen_norm_equals_batch_norm_with_given_statistics() -> None:
    norm, x = frozen_norm(), torch.randn(2, 6, 3, 4, requires_grad=True)
    norm.running_var[0] = 0  # a dead channel: eps decides
    expected = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=False, eps=1e-5)
    out = norm.train()(x)  # the mode changes nothing
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)
    slope = torch.autograd.grad(out.sum(), x)[0]
    torch.testing.assert_close(slope, torch.autograd.grad(expected.sum(), x)[0], rtol=1e-5, atol=1e-4)
    assert list(norm.parameters()) == []
    assert set(norm.state_dict()) == set(torchvision.ops.FrozenBatchNorm2d(6).state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frozen_norm_stays_in_the_format_of_its_input(dtype: torch.dtype) -> None:
    norm, x = frozen_norm(), torch.randn(2, 6, 3, 4).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = norm(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), norm(x.float()), rtol=2**-6, atol=2**-6)  # a few roundings to 8 bits


STAGES = ["stem", "layer1", "layer2", "layer3", "layer4"]


def stage_of(key: str) -> str:
    first = key.partition(".")[0]
    return "stem" if first in ("conv1", "bn1") else first


@pytest.mark.parametrize("freeze_stages", range(6))
def test_frozen_stages_do_not_learn(freeze_stages: int) -> None:
    with torch.device("meta"):
        backbone = ResNetBackbone("resnet18", norm="batch", freeze_stages=freeze_stages)
    learning = {stage_of(name) for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    held = {stage_of(name) for name, parameter in backbone.named_parameters() if not parameter.requires_grad}
    assert learning == set(STAGES[freeze_stages:])
    assert held == set(STAGES[:freeze_stages])


@pytest.mark.parametrize("call_train", [False, True])
@pytest.mark.parametrize("norm", ["batch", "sync"])
def test_statistics_of_frozen_stages_stand_still(norm: str, call_train: bool) -> None:
    detector = RetinaNet(**TINY, norm=norm, freeze_stages=2)
    assert detector.training
    if call_train:
        detector.eval().train()
    before = {key: value.clone() for key, value in detector.backbone.state_dict().items()}
    with torch.no_grad():
        detector(images(2, 3, 64, 64))
    moved = {stage_of(key) for key, value in detector.backbone.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {"layer2", "layer3", "layer4"}


def test_gradient_reaches_everything_that_learns() -> None:
    detector = RetinaNet(**TINY, norm="batch", freeze_stages=1).train()
    out = detector(images(2, 3, 64, 64))
    (out.cls_logits.square().sum() + out.box_deltas.square().sum()).backward()
    for name, parameter in detector.named_parameters():
        assert parameter.requires_grad == (stage_of(name.removeprefix("backbone.")) != "stem"), name
        assert not parameter.requires_grad or parameter.grad.abs().sum() > 0, name


# --- feature pyramid


def nearest(x: Tensor, height: int, width: int) -> Tensor:
    """Row i of the result is row floor(i * rows / height) of `x`, columns likewise."""
    rows = torch.tensor([i * x.shape[2] // height for i in range(height)])
    columns = torch.tensor([i * x.shape[3] // width for i in range(width)])
    return x[:, :, rows][:, :, :, columns]


def reference_fpn(w: dict[str, Tensor], c3: Tensor, c4: Tensor, c5: Tensor, p6_from: str) -> list[Tensor]:
    def conv(name: str, x: Tensor, **form: int) -> Tensor:
        return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], **form)

    m5 = conv("lateral.2", c5)
    m4 = conv("lateral.1", c4) + nearest(m5, *c4.shape[2:])
    m3 = conv("lateral.0", c3) + nearest(m4, *c3.shape[2:])
    p3, p4, p5 = (conv(f"output.{i}", m, padding=1) for i, m in enumerate([m3, m4, m5]))
    p6 = conv("p6", c5 if p6_from == "c5" else p5, stride=2, padding=1)
    return [p3, p4, p5, p6, conv("p7", p6.clamp(min=0), stride=2, padding=1)]


def backbone_features(height: int, width: int) -> list[Tensor]:
    return [torch.randn(2, c, math.ceil(height / s), math.ceil(width / s)) for c, s in ((4, 1), (6, 2), (10, 4))]


@pytest.mark.parametrize("p6_from", ["c5", "p5"])
@pytest.mark.parametrize("size", [(8, 12), (7, 9), (1, 1)])
def test_pyramid_equals_a_plain_reference(p6_from: str, size: tuple[int, int]) -> None:
    fpn = FPN([4, 6, 10], 8, p6_from=p6_from)
    for parameter in fpn.parameters():
        nn.init.normal_(parameter)  # biases too
    features = backbone_features(*size)
    with torch.no_grad():
        out, expected = fpn(features), reference_fpn(fpn.state_dict(), *features, p6_from)
    assert len(out) == 5
    for ours, theirs in zip(out, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def levels_changed_by(fpn: FPN, change: Callable[[list[Tensor]], object]) -> list[str]:
    features = backbone_features(8, 8)
    with torch.no_grad():
        before = fpn(features)
        change(features)
        after = fpn(features)
    return [name for name, a, b in zip(("P3", "P4", "P5", "P6", "P7"), before, after) if not torch.equal(a, b)]


@pytest.mark.parametrize(
    ("changed", "levels"), [(0, ["P3"]), (1, ["P3", "P4"]), (2, ["P3", "P4", "P5", "P6", "P7"])], ids=["C3", "C4", "C5"]
)
@pytest.mark.parametrize("p6_from", ["c5", "p5"])
def test_information_flows_down_the_pyramid(p6_from: str, changed: int, levels: list[str]) -> None:
    fpn = FPN([4, 6, 10], 8, p6_from=p6_from)
    assert levels_changed_by(fpn, lambda features: features[changed].add_(1)) == levels


@pytest.mark.parametrize(("p6_from", "levels"), [("c5", ["P5"]), ("p5", ["P5", "P6", "P7"])])
def test_where_p6_comes_from(p6_from: str, levels: list[str]) -> None:
    fpn = FPN([4, 6, 10], 8, p6_from=p6_from)
    assert levels_changed_by(fpn, lambda _: nn.init.normal_(fpn.output[2].weight)) == levels  # the convolution that makes P5


# --- pretrained backbones


@pytest.fixture(scope="module")
def classifier() -> nn.Module:
    """torchvision's ResNet-18, with statistics that are not the initial ones."""
    torch.manual_seed(1)
    net = torchvision.models.resnet18(weights=None).eval()
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean, -0.2, 0.2)
            nn.init.uniform_(layer.running_var, 0.8, 1.2)
            nn.init.uniform_(layer.weight, 0.5, 1)
            nn.init.uniform_(layer.bias, -0.2, 0.2)
    return net


@pytest.fixture(scope="module")
def classifier_file(classifier: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(classifier.state_dict(), path)
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torch.hub keeps its downloads, for this test an empty folder."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture(scope="module")
def backbone() -> ResNetBackbone:
    return ResNetBackbone("resnet18", norm="batch")


def error_of(backbone: ResNetBackbone, source: object, name: str = "resnet18") -> str:
    with pytest.raises(UserError) as caught:
        load_backbone_weights(backbone, name, str(source))
    assert "\n" not in str(caught.value)  # one line for the command line
    assert "model.backbone_weights" in str(caught.value)  # and the key to mend
    return str(caught.value)


@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_weights_of_torchvision_give_torchvisions_features(norm: str, classifier: Any, classifier_file: Path) -> None:
    ours = ResNetBackbone("resnet18", norm=norm).eval()
    load_backbone_weights(ours, "resnet18", str(classifier_file))
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        c2 = classifier.layer1(classifier.maxpool(classifier.relu(classifier.bn1(classifier.conv1(x)))))
        c3 = classifier.layer2(c2)
        c4 = classifier.layer3(c3)
        expected = [c3, c4, classifier.layer4(c4)]
        for a, b in zip(ours(x), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_build_model_fills_the_backbone_unless_a_checkpoint_follows(classifier: nn.Module, classifier_file: Path) -> None:
    config = ModelConfig(**TINY, backbone_weights=str(classifier_file))
    trained = classifier.state_dict()["layer4.1.conv2.weight"]
    assert torch.equal(build_model(config, InputConfig()).backbone.state_dict()["layer4.1.conv2.weight"], trained)
    random = build_model(config, InputConfig(), trained_backbone=False)
    assert not torch.equal(random.backbone.state_dict()["layer4.1.conv2.weight"], trained)


def test_weights_of_another_shape(tmp_path: Path, classifier: nn.Module, backbone: ResNetBackbone) -> None:
    state = classifier.state_dict() | {"layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)}
    torch.save(state, tmp_path / "other.pth")
    before = backbone.conv1.weight.clone()
    message = error_of(backbone, tmp_path / "other.pth")
    assert "does not fit resnet18: 1 of 120 tensors" in message  # 20 convolutions and 20 norms of 5 tensors
    assert "layer1.0.conv1.weight" in message
    assert torch.equal(backbone.conv1.weight, before)  # all or nothing


def test_weights_of_another_network(classifier_file: Path) -> None:
    deeper = ResNetBackbone("resnet34")
    assert "does not fit resnet34" in error_of(deeper, classifier_file, "resnet34")


def test_batch_norm_weights_do_not_fit_group_norm(classifier_file: Path) -> None:
    message = error_of(ResNetBackbone("resnet18", norm="group"), classifier_file)
    assert "BatchNorm" in message and "model.norm group" in message


def test_group_norm_weights_fit_group_norm(tmp_path: Path) -> None:
    source, target = ResNetBackbone("resnet18", norm="group"), ResNetBackbone("resnet18", norm="group")
    torch.save(source.state_dict(), tmp_path / "group.pth")
    load_backbone_weights(target, "resnet18", str(tmp_path / "group.pth"))
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True))


def torn_file() -> bytes:
    file = io.BytesIO()
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, file)
    return file.getvalue()[:-500]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello world\n",  # to the unpickler: look something up
        b"train:\n  epochs: 3\n",
        b"<!DOCTYPE html><html>not found</html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 46830571\n",
        b"PK\x03\x04nothing",
        torn_file(),
    ],
    ids=["empty", "text", "yaml", "html", "git-lfs", "zip", "torn"],
)
def test_files_that_are_no_state_dict(tmp_path: Path, backbone: ResNetBackbone, content: bytes) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    assert f"{path} is not a torch state dict" in error_of(backbone, path)


@pytest.mark.parametrize("content", [{"epoch": 3}, {0: torch.zeros(1)}, [torch.zeros(1)], {"model": {"conv1.weight": 1}}])
def test_torch_files_without_a_state_dict(tmp_path: Path, backbone: ResNetBackbone, content: object) -> None:
    torch.save(content, tmp_path / "weights.pth")
    assert "is not a plain state dict" in error_of(backbone, tmp_path / "weights.pth")


def test_weights_that_are_not_there(tmp_path: Path, backbone: ResNetBackbone) -> None:
    assert "missing.pth does not exist" in error_of(backbone, tmp_path / "missing.pth")
    assert "is not a torch state dict (IsADirectoryError)" in error_of(backbone, tmp_path)


class Malicious:
    """Unpickled by the ordinary pickle, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("cached", [False, True], ids=["named", "in the download cache"])
def test_code_in_weights_is_not_executed(tmp_path: Path, cache: Path, backbone: ResNetBackbone, cached: bool) -> None:
    victim, path = tmp_path / "executed", cache / RESNET18_FILE
    cache.mkdir(parents=True)
    torch.save({"conv1.weight": Malicious(victim)}, path)
    error_of(backbone, "imagenet" if cached else path)
    assert not victim.exists()
    torch.load(path, weights_only=False)
    assert victim.exists()  # so it would have shown


def test_imagenet_weights_come_from_the_cache(cache: Path, classifier_file: Path, classifier: nn.Module) -> None:
    cache.mkdir(parents=True)
    (cache / RESNET18_FILE).symlink_to(classifier_file)
    ours = ResNetBackbone("resnet18")
    load_backbone_weights(ours, "resnet18", "imagenet")
    assert torch.equal(ours.layer4[1].conv2.weight, classifier.state_dict()["layer4.1.conv2.weight"])


class Response(io.BytesIO):
    """What opening an address returns, of a server that sends these bytes and does not say how many."""

    length = None


def unreachable(*_: object) -> Response:
    raise urllib.error.URLError("Name or service not known")


def not_found(*_: object) -> Response:
    raise urllib.error.HTTPError("https://example", 404, "Not Found", None, None)


def broken_off(*_: object) -> Response:
    raise IncompleteRead(b"half", 100)


def another_file(*_: object) -> Response:
    return Response(b"a login page")


@pytest.mark.parametrize(
    ("server", "reason"),
    [
        (unreachable, "Name or service not known"),
        (not_found, "404"),
        (broken_off, "IncompleteRead"),
        (another_file, "the sha256 of what came does not begin with f37072fd"),
    ],
)
def test_download_fails_in_one_line(
    server: Callable[..., Response], reason: str, cache: Path, backbone: ResNetBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retinanet.download.open_url", server)
    message = error_of(backbone, "imagenet")
    assert reason in message
    assert str(cache / RESNET18_FILE) in message  # where to put the file by hand
    assert list(cache.iterdir()) == []  # nothing half-finished that the next run would take


def test_download_is_checked_and_kept(
    cache: Path, classifier_file: Path, classifier: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = classifier_file.read_bytes()
    monkeypatch.setattr("retinanet.download.open_url", lambda *_: Response(content))
    monkeypatch.setattr("retinanet.download.file_digest", lambda *_: "f37072fd" + "0" * 56)  # as if it were the real file
    ours = ResNetBackbone("resnet18")
    load_backbone_weights(ours, "resnet18", "imagenet")
    assert torch.equal(ours.conv1.weight, classifier.state_dict()["conv1.weight"])
    assert (cache / RESNET18_FILE).read_bytes() == content


def test_versions_that_torchvision_does_not_have(backbone: ResNetBackbone) -> None:
    assert "torchvision has no IMAGENET1K_V2 for resnet18" in error_of(backbone, "imagenet_v2")


# --- build_model


def test_build_model_follows_the_config() -> None:
    config = ModelConfig(
        **TINY | {"fpn_channels": 64},
        backbone_weights="none",
        norm="group",
        freeze_stages=0,
        p6_from="p5",
        head_norm="group",
        prior=0.1,
        anchors={"sizes": [10, 20, 40, 80, 160], "scales": [1], "ratios": [1, 2], "offset": 0},
    )
    detector = build_model(config, InputConfig(mean=(1, 2, 3), std=(4, 5, 6)))
    assert detector.mean.flatten().tolist() == [1, 2, 3]
    assert detector.std.flatten().tolist() == [4, 5, 6]
    assert detector.cls_subnet.final.bias[0].item() == pytest.approx(-math.log(9))  # 0.1 / 0.9
    assert detector.cls_subnet.final.out_channels == 6  # 2 anchors, 3 classes
    assert isinstance(detector.cls_subnet.convs[1], nn.GroupNorm)
    assert isinstance(detector.backbone.bn1, nn.GroupNorm)
    assert detector.fpn.p6_from == "p5"
    with torch.no_grad():
        anchors = detector.eval()(images(1, 3, 32, 32)).anchors
    assert anchors[0].tolist() == [-5, -5, 5, 5]
    assert all(parameter.requires_grad for parameter in detector.parameters())


def test_build_model_needs_the_number_of_classes() -> None:
    with pytest.raises(ValueError, match="num_classes is unknown"):
        build_model(ModelConfig(backbone_weights="none"), InputConfig())


def test_other_anchors_change_the_outputs() -> None:
    detector = RetinaNet(**TINY, anchors=AnchorGenerator(scales=[1], ratios=[1, 2])).eval()
    with torch.no_grad():
        out = detector(images(1, 3, 32, 32))
    assert out.level_sizes == [32, 8, 2, 2, 2]  # 2 in each of 4 * 4, 2 * 2, 1, 1, 1 cells
    assert out.cls_logits.shape == (1, 46, 3)


# --- ways to run it


def test_channels_last_changes_nothing(model: RetinaNet) -> None:
    x = images(2, 3, 64, 96)
    nhwc = RetinaNet(**TINY).eval().to(memory_format=torch.channels_last)
    nhwc.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert_same(nhwc(x.to(memory_format=torch.channels_last)), model(x), rtol=1e-4, atol=1e-5)


def test_autocast_keeps_the_outputs_near(model: RetinaNet) -> None:
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = model(x)
    assert rough.cls_logits.dtype == torch.bfloat16
    assert rough.anchors.dtype == torch.float32
    assert torch.equal(rough.anchors, exact.anchors)
    for ours, reference in ((rough.cls_logits, exact.cls_logits), (rough.box_deltas, exact.box_deltas)):
        # 8 bits through 23 layers: a few hundredths of the outputs' spread
        assert (ours.float() - reference).abs().max() < 0.1 * reference.std() + 0.02 * reference.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_breaks(model: RetinaNet, backend: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    sizes = torch.tensor([[64, 50], [40, 64]])
    for shape in ((2, 3, 64, 64), (2, 3, 64, 96)):
        x = images(*shape)
        with torch.no_grad():
            assert_same(compiled(x, sizes), model(x, sizes), rtol=1e-4, atol=1e-5)
