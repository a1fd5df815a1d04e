"""Parameter groups, the learning rate over a run, and the running average of the weights."""

import copy
import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from retinanet.config import TrainConfig

DEFAULT_WARMUP = 1000


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD or AdamW over all trainable parameters, each in exactly one group."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if config.decay_norm_and_bias:
        groups = [{"params": trainable, "weight_decay": config.weight_decay}]
    else:  # norms' weights and all biases are the parameters with one axis
        groups = [
            {"params": [p for p in trainable if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
        ]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, fused=True)  # one pass over memory


def warmup_length(config: TrainConfig, total_steps: int) -> int:
    return config.warmup_steps if config.warmup_steps is not None else min(DEFAULT_WARMUP, total_steps // 10)


def rate_factor(config: TrainConfig, total_steps: int) -> Callable[[int], float]:
    """The learning rate of a step (counted from 0) as a share of the base rate."""
    warmup = warmup_length(config, total_steps)
    drops = [round(share * total_steps) for share in config.milestones]

    def factor(step: int) -> float:
        if config.schedule == "multistep":
            decay = 0.1 ** sum(step >= drop for drop in drops)
        else:
            decay = 0.5 * (1 + math.cos(math.pi * min(1.0, step / total_steps)))
        if step >= warmup:
            return decay
        return decay * (config.warmup_factor + (1 - config.warmup_factor) * step / warmup)

    return factor


def build_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, total_steps: int) -> LambdaLR:
    """Linear warm-up, then drops to a tenth at the milestones or half a cosine."""
    return LambdaLR(optimizer, rate_factor(config, total_steps))


class EMA:
    """Exponential moving average of a model's weights and statistics.

    Early on the decay is (1 + step) / (10 + step), so that the random start is soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, values = [], []
        for average, value in zip(self.model.state_dict().values(), model.state_dict().values(), strict=True):
            if value.is_floating_point():
                averages.append(average)
                values.append(value)
            else:
                average.copy_(value)  # counters
        torch._foreach_lerp_(averages, values, 1 - decay)
