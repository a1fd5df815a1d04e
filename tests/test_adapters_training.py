"""Training and judging the detector as torchvision's references do: against our criterion, one process, and torchmetrics."""

import copy
import lzma
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY
from torch import Tensor, nn
from torchvision_style import (
    GAPPED,
    INPUT,
    CocoImages,
    as_image,
    cost,
    evaluated,
    loader,
    picture,
    references_rows,
    tiny_model,
    train_steps,
    truth,
)

from retinanet.adapters import TorchvisionDetector
from retinanet.anchors import AnchorGenerator
from retinanet.config import InputConfig, LossConfig, parse_config
from retinanet.criterion import RetinaNetLoss
from retinanet.data.coco import load_coco
from retinanet.evaluation.coco import evaluate_rows
from retinanet.model import build_model
from retinanet.structures import Predictions, Target

MakeCoco = Callable[..., dict[str, str]]


@pytest.fixture
def detector() -> TorchvisionDetector:
    return TorchvisionDetector(tiny_model(), GAPPED, input=INPUT)


def test_losses_are_those_of_the_criterion_on_the_same_batch(detector: TorchvisionDetector) -> None:
    """By hand: 32 x 48 is doubled to 64 x 96; 128 x 64, limited by its longer side, becomes 96 x 48; padded to 96 x 96."""
    images = [as_image(picture(32, 48)), as_image(picture(128, 64, 1)), as_image(picture(64, 96, 2))]
    targets = [
        truth((4.0, 2, 20, 30), (10, 10, 40, 30), labels=(90, 3)),
        truth((8.0, 16, 40, 64), (0, 64, 64, 128), (1, 2, 3, 4), labels=(7, 7, 12), iscrowd=torch.tensor([0, 1, 1])),
        truth(),
    ]
    detector.train()
    torch.manual_seed(0)
    losses = detector(images, targets)
    batch = torch.zeros(3, 3, 96, 96)
    batch[0, :, :64, :96] = F.interpolate(images[0][None], (64, 96), mode="bilinear")[0] * 255
    batch[1, :, :96, :48] = F.interpolate(images[1][None], (96, 48), mode="bilinear")[0] * 255
    batch[2, :, :64, :96] = images[2] * 255
    known = [
        Target(torch.tensor([[8.0, 4, 40, 60], [20, 20, 80, 60]]), torch.tensor([2, 0]), torch.zeros(0, 4)),
        Target(
            torch.tensor([[6.0, 12, 30, 48]]),
            torch.tensor([1]),
            torch.tensor([[0.0, 48, 48, 96], [0.75, 1.5, 2.25, 3]]),
        ),
        Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4)),
    ]
    sizes = torch.tensor([[64, 96], [96, 48], [64, 96]])
    expected = RetinaNetLoss()(detector.model(batch, sizes), known)
    assert list(losses) == ["classification", "bbox_regression"]
    torch.testing.assert_close(losses["classification"], expected["loss_cls"], rtol=1e-6, atol=0)
    torch.testing.assert_close(losses["bbox_regression"], expected["loss_box"], rtol=1e-6, atol=0)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters() if p.requires_grad)
    # Without its crowds the second image would cost more: anchors in them would be background.
    targets[1].pop("iscrowd")
    targets[1] = {key: value[:1] for key, value in targets[1].items()}
    assert detector(images, targets)["classification"] != losses["classification"]


def test_the_loss_section_is_obeyed() -> None:
    images, targets = [as_image(picture(64, 96))], [truth((8.0, 16, 40, 60), labels=(7,))]
    plain, other = (
        TorchvisionDetector(tiny_model(), GAPPED, input=INPUT, loss=loss).train()
        for loss in (None, LossConfig(box_loss="giou", box_loss_weight=3.0, alpha=0.5))
    )
    one, two = plain(images, targets), other(images, targets)
    assert one["bbox_regression"] != two["bbox_regression"] and one["classification"] != two["classification"]


def test_no_box_in_the_whole_batch(detector: TorchvisionDetector) -> None:
    losses = detector.train()([as_image(picture(64, 96))] * 2, [truth(), truth()])
    assert losses["bbox_regression"] == 0 and losses["classification"] > 0
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in detector.parameters())


def test_targets_are_left_as_they_were_and_may_have_more_in_them(detector: TorchvisionDetector) -> None:
    target = truth((8.0, 16, 40, 60), labels=(7,), image_id=torch.tensor([5]), area=torch.tensor([1.0]), masks=torch.zeros(1))
    before = copy.deepcopy(target)
    image = as_image(picture(32, 48))
    kept = image.clone()
    detector.train()([image], [target])
    assert torch.equal(image, kept) and all(torch.equal(target[key], before[key]) for key in before)
    assert len(detector.eval()([image], [target])) == 1  # in eval mode they do not matter


def test_torchvisions_own_tensor_types(detector: TorchvisionDetector) -> None:
    from torchvision import tv_tensors

    image, target = as_image(picture(32, 48)), truth((4.0, 2, 20, 30), labels=(7,))
    expected = detector.train()([image], [target])
    boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=(32, 48))  # type: ignore[call-arg]
    losses = detector([tv_tensors.Image(image)], [{**target, "boxes": boxes}])
    assert type(losses["classification"]) is Tensor
    assert losses["classification"] == expected["classification"]
    found = detector.eval()([tv_tensors.Image(image)])[0]
    assert type(found["boxes"]) is Tensor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(detector: TorchvisionDetector, dtype: torch.dtype) -> None:
    images, targets = [as_image(picture(64, 96))], [truth((8.0, 16, 40, 60), labels=(7,))]
    plain = detector.train()(images, targets)
    with torch.autocast("cpu", dtype=dtype):
        losses = detector(images, targets)
        found = detector.eval()(images)[0]
    sum(losses.values()).backward()
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, plain[name], rtol=0.1, atol=0)
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32


def test_other_number_formats_of_images(detector: TorchvisionDetector) -> None:
    image = as_image(picture(64, 96))
    expected = detector([image])[0]
    for dtype in (torch.float64, torch.float32):
        assert torch.equal(detector([image.to(dtype)])[0]["boxes"], expected["boxes"])
    assert len(detector([image.half()])[0]["boxes"]) > 5


def assert_torchmetrics_agrees(pairs: list[tuple[dict[str, Tensor], dict[str, Tensor]]], metrics: dict[str, Any]) -> None:
    from torchmetrics.detection import MeanAveragePrecision

    # COCO's thresholds: torchmetrics' own are float32, of which 0.1 is more than a recall of 1 in 10.
    thresholds = {"iou_thresholds": np.linspace(0.5, 0.95, 10).tolist(), "rec_thresholds": np.linspace(0, 1, 101).tolist()}
    judge = MeanAveragePrecision(box_format="xyxy", backend="pycocotools", **thresholds)
    judge.warn_on_many_detections = False  # they are limited to 100, as ours
    judge.update([output for _, output in pairs], [{k: v for k, v in target.items() if k != "image_id"} for target, _ in pairs])
    theirs = judge.compute()
    names = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
    names += ("mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large")
    ours = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
    for name, own in zip(names, ours, strict=True):
        expected = float(theirs[name])
        assert (-1 if metrics[own] is None else metrics[own]) == pytest.approx(expected, abs=1e-6), own


class Oracle(nn.Module):
    """In the place of the detector: finds most of the truth, a few pixels off, and some that is not there."""

    def __init__(self, targets: list[dict[str, Tensor]], ids: list[int]) -> None:
        super().__init__()
        self.num_classes, self.anchor_generator = len(ids), AnchorGenerator()
        self.register_buffer("mean", torch.zeros(3, 1, 1))
        self.targets, self.ids, self.calls = targets, ids, 0

    def forward(self, batch: Tensor, sizes: Tensor) -> Predictions:
        generator = torch.Generator().manual_seed(self.calls)
        target = self.targets[self.calls]
        self.calls += 1
        count = len(target["boxes"]) + 3
        boxes = torch.cat([target["boxes"], torch.tensor([[1.0, 1, 20, 20]]).expand(3, 4)])
        boxes = boxes + torch.randn(count, 4, generator=generator) * 1.5
        logits = torch.randn(count, self.num_classes, generator=generator) - 3
        labels = [self.ids.index(label) for label in target["labels"].tolist()]
        logits[range(len(labels)), labels] += 4
        return Predictions(logits[None], torch.zeros(1, count, 4), boxes, [count])


def test_torchmetrics_agrees_on_drawn_data(make_coco: MakeCoco) -> None:
    made = make_coco(n=10, size=(64, 96))
    data = CocoImages(Path(made["path"]), Path(made["annotations"]))
    oracle = Oracle([data[n][1] for n in range(len(data))], [3, 7])
    adapter = TorchvisionDetector(oracle, GAPPED[:2], input=INPUT)  # type: ignore[arg-type]
    pairs = evaluated(adapter, loader(data, batch_size=1, shuffle=False))
    annotations = load_coco(Path(made["annotations"]), Path(made["path"]))
    metrics = evaluate_rows(references_rows(pairs), annotations)
    assert 0.3 < metrics["AP"] < 0.95 and 0.5 < metrics["AP50"] < 1  # neither all nor nothing
    assert_torchmetrics_agrees(pairs, metrics)


def test_references_train_and_evaluate_on_drawn_data(make_coco: MakeCoco) -> None:
    made = make_coco(n=4)
    data = CocoImages(Path(made["path"]), Path(made["annotations"]))
    model = tiny_model()
    nn.init.normal_(model.cls_subnet.final.weight, std=0.01)
    nn.init.constant_(model.cls_subnet.final.bias, -4.6)  # type: ignore[arg-type]
    adapter = TorchvisionDetector(model, GAPPED, input=INPUT)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=3e-3)
    losses = train_steps(adapter, optimizer, loader(data, batch_size=2, shuffle=True), 12)
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    pairs = evaluated(adapter, loader(data, batch_size=3, shuffle=False))
    assert [int(target["image_id"]) for target, _ in pairs] == [10, 11, 12, 13]
    assert len(references_rows(pairs)) > 0


@pytest.mark.slow
def test_references_train_and_evaluate_on_real_images(real_data: Path, real_weights: Path, tmp_path: Path) -> None:
    coco = real_data / "coco_mini"
    backbone = tmp_path / "resnet18.pth"
    backbone.write_bytes(lzma.decompress((real_weights / "resnet18.pth.xz").read_bytes()))
    sets = {part: (coco / f"{part}2017", coco / f"annotations/instances_{part}2017.json") for part in ("train", "val")}
    train, val = (CocoImages(*sets[part]) for part in ("train", "val"))
    annotations = load_coco(sets["val"][1], sets["val"][0])
    raw = {"backbone": "resnet18", "backbone_weights": str(backbone), "fpn_channels": 128, "head_norm": "group"}
    config = parse_config({"model": {**raw, "num_classes": len(annotations.categories)}})
    torch.manual_seed(0)
    model = build_model(config.model, config.input)
    adapter = TorchvisionDetector(model, annotations.categories, input=InputConfig(short_edge=192, long_edge=320))
    optimizer = torch.optim.AdamW([p for p in adapter.parameters() if p.requires_grad], lr=5e-4)
    some = next(iter(loader(train, batch_size=8, shuffle=False)))
    before = cost(adapter, *some)
    train_steps(adapter, optimizer, loader(train, batch_size=4, shuffle=True), 20)
    assert cost(adapter, *some) < 0.85 * before
    pairs = evaluated(adapter, loader(val, batch_size=4, shuffle=False))
    assert any(len(target["boxes"]) == 0 for target, _ in pairs) or any(target["iscrowd"].any() for target, _ in pairs)
    rows = references_rows(pairs)
    assert len(rows) > 100
    assert_torchmetrics_agrees(pairs, evaluate_rows(rows, annotations))


RANKS = """
import sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from retinanet.adapters import TorchvisionDetector
from retinanet.config import InputConfig
from retinanet.model import RetinaNet
from retinanet.structures import Category

def targets_of(n):
    boxes = torch.tensor([[4.0, 4, 30, 40], [20, 10, 60, 50], [0, 0, 63, 63]])[:n]
    return {"boxes": boxes, "labels": torch.full((n,), 9)}

torch.manual_seed(0)
detector = TorchvisionDetector(RetinaNet(1, "resnet18", norm="frozen", fpn_channels=32, head_convs=1), [Category(9, "x")],
                               input=InputConfig(short_edge=64, long_edge=64)).train()
images = list(torch.rand(4, 3, 64, 64))
targets = [targets_of(n) for n in (3, 1, 0, 0)]
module, mine = detector, slice(None)
ranks = int(sys.argv[2])
if ranks > 1:
    dist.init_process_group("gloo")
    module = DistributedDataParallel(detector)
    mine = slice(dist.get_rank(), None, 2) if sys.argv[3] == "both" else slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
sum(module(images[mine], targets[mine]).values()).backward()
if ranks == 1 or dist.get_rank() == 0:
    torch.save({name: p.grad for name, p in detector.named_parameters()}, sys.argv[1])
if ranks > 1:
    dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("share", ["both", "one"])
def test_two_ranks_give_the_gradient_of_one(tmp_path: Path, share: str) -> None:
    """Objects on both ranks in unequal number, or on one only: the sum of the losses is divided by all of them."""
    (tmp_path / "ranks.py").write_text(RANKS)
    for ranks in (1, 2):
        launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
        arguments = [str(tmp_path / "ranks.py"), str(tmp_path / f"{ranks}.pt"), str(ranks), share]
        done = subprocess.run(
            [sys.executable, *launcher, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / f"{ranks}.pt") for ranks in (1, 2))
    assert sum(float(value.abs().sum()) for value in one.values()) > 1
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6, msg=name)
