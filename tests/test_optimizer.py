"""Parameter groups, learning rate over a run, averaged weights."""

import math

import pytest
import torch
from torch import nn

from retinanet.config import TrainConfig
from retinanet.model import RetinaNet
from retinanet.optimizer import EMA, build_optimizer, build_schedule, rate_factor, warmup_length


def _model() -> RetinaNet:
    return RetinaNet(2, "resnet18", norm="batch", freeze_stages=1, fpn_channels=32, head_convs=1, head_norm="group")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("decay_all", [True, False])
def test_every_trainable_parameter_is_in_exactly_one_group(optimizer: str, decay_all: bool) -> None:
    model = _model()
    built = build_optimizer(model, TrainConfig(optimizer=optimizer, decay_norm_and_bias=decay_all, weight_decay=0.1))
    grouped = [id(p) for group in built.param_groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters() if p.requires_grad}
    assert id(model.backbone.conv1.weight) not in grouped  # the stem is frozen


def test_norms_and_biases_go_undecayed_when_asked() -> None:
    model = _model()
    built = build_optimizer(model, TrainConfig(decay_norm_and_bias=False, weight_decay=0.1))
    decay_of = {id(p): group["weight_decay"] for group in built.param_groups for p in group["params"]}
    assert decay_of[id(model.fpn.p6.weight)] == 0.1
    assert decay_of[id(model.fpn.p6.bias)] == 0.0
    assert decay_of[id(model.backbone.layer2[0].bn1.weight)] == 0.0
    assert decay_of[id(model.cls_subnet.convs[1].weight)] == 0.0  # a GroupNorm


def test_multistep_with_warmup_by_hand() -> None:
    factor = rate_factor(TrainConfig(warmup_steps=10, warmup_factor=0.1, milestones=[0.5, 0.9]), 100)
    assert factor(0) == pytest.approx(0.1)  # the warm-up factor
    assert factor(5) == pytest.approx(0.55)  # half way: 0.1 + 0.9 / 2
    assert factor(10) == factor(49) == 1.0
    assert factor(50) == pytest.approx(0.1)  # after 0.5 x 100 steps
    assert factor(90) == pytest.approx(0.01)


def test_cosine_by_hand() -> None:
    factor = rate_factor(TrainConfig(schedule="cosine", warmup_steps=0), 100)
    assert factor(0) == 1.0
    assert factor(50) == pytest.approx(0.5)  # (1 + cos 90 deg) / 2
    assert factor(75) == pytest.approx(0.5 * (1 - math.sqrt(0.5)))  # cos 135 deg = -sqrt(1/2)
    assert factor(100) == pytest.approx(0.0)


def test_warmup_is_a_tenth_of_a_short_run_unless_given() -> None:
    assert warmup_length(TrainConfig(), 90_000) == 1000
    assert warmup_length(TrainConfig(), 600) == 60
    assert warmup_length(TrainConfig(warmup_steps=500), 600) == 500


def test_schedule_sets_the_rate_of_the_optimizer() -> None:
    model = nn.Linear(1, 1)
    config = TrainConfig(learning_rate=0.2, warmup_steps=2, warmup_factor=0.0)
    optimizer = build_optimizer(model, config)
    schedule = build_schedule(optimizer, config, 10)
    rates = []
    for _ in range(3):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.0, 0.1, 0.2])


def test_ema_by_hand() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    ema = EMA(model, decay=0.5)
    nn.init.constant_(model.weight, 3.0)
    ema.update(model, step=1)  # decay min(0.5, 2 / 11) = 2/11: 3 + (1 - 3) * 2/11
    assert ema.model.weight.item() == pytest.approx(3 - 4 / 11)
    ema.update(model, step=100)  # decay 0.5: half way to 3
    assert ema.model.weight.item() == pytest.approx(3 - 2 / 11)


def test_ema_follows_statistics_and_copies_counters() -> None:
    model = nn.BatchNorm1d(1)
    ema = EMA(model, decay=0.5)
    model.train()(torch.full((4, 1), 2.0))  # running_mean: 0.9 * 0 + 0.1 * 2 = 0.2; counter 1
    ema.update(model, step=100)
    assert ema.model.running_mean.item() == pytest.approx(0.1)
    assert ema.model.num_batches_tracked.item() == 1
    assert not ema.model.training
