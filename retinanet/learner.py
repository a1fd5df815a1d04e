"""An optimizer step, and everything that it changes."""

import math
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from retinanet.checkpoint import Checkpoint
from retinanet.config import Config
from retinanet.criterion import build_criterion
from retinanet.distributed import sum_over_ranks, world_size
from retinanet.model import RetinaNet
from retinanet.optimizer import EMA, build_optimizer, build_schedule
from retinanet.precision import autocast, choose_precision
from retinanet.run_setup import wrap_model
from retinanet.structures import Batch

FP16_SCALE = 1024.0  # losses are sums over the batch here, so the usual 65536 would overflow at first


class StepResult(NamedTuple):
    """What a step found, over all ranks. The losses are divided by the foreground."""

    loss_cls: float
    loss_box: float
    foreground: float
    gradient_norm: float
    learning_rate: float
    flags: list[bool]  # of those given to the step, which ones any rank raised

    @property
    def loss_is_finite(self) -> bool:
        return math.isfinite(self.loss_cls + self.loss_box)

    @property
    def is_finite(self) -> bool:
        return self.loss_is_finite and math.isfinite(self.gradient_norm)


class Learner:
    """Model, averaged weights, optimizer, learning rate and loss scale."""

    def __init__(self, model: RetinaNet, config: Config, device: torch.device, total_steps: int) -> None:
        layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
        self.model = model.to(device, memory_format=layout)  # type: ignore[call-overload]
        self.config, self.device = config, device
        self.precision = choose_precision(config.train.precision, device)
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]  # not frozen ones
        self.statistics: list[Tensor] = [s for norm in norms for s in (norm.running_mean, norm.running_var) if s is not None]
        self.ema = EMA(model, config.train.ema_decay) if config.train.ema_decay else None
        self.forward = wrap_model(model, config, device)
        self.criterion = build_criterion(config.loss, model.anchor_generator.num_anchors)
        self.optimizer = build_optimizer(model, config.train)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.schedule = build_schedule(self.optimizer, config.train, total_steps)
        self.scaler = torch.amp.GradScaler(device.type, init_scale=FP16_SCALE, enabled=self.precision == "fp16")

    @property
    def best_model(self) -> nn.Module:
        """What is validated: the averaged weights, if there are any."""
        return self.ema.model if self.ema is not None else self.model

    def step(self, batch: Batch, number: int, flags: Sequence[bool] = ()) -> StepResult:
        """Optimizer step `number`, counted from 1, on this rank's share of a global batch.

        The losses' sums are back-propagated and the gradients divided once by the foreground of the whole global batch,
        so that neither accumulation nor the number of ranks, nor how evenly they share, changes them. A step that is not
        finite leaves no trace in weights and statistics.
        """
        before = [statistic.clone() for statistic in self.statistics]
        sums = self._backward(batch)
        raised_here = torch.tensor(flags, dtype=torch.float32).to(self.device, non_blocking=True)
        stats = sum_over_ranks(torch.cat([sums, raised_here]))  # [3 + F]
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        torch._foreach_mul_(gradients, world_size() / stats[2].clamp(min=1))  # DDP has averaged over the ranks
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.train.clip_grad_norm or math.inf)
        norm_value, loss_cls, loss_box, foreground, *raised = torch.cat([norm.view(1), stats]).tolist()  # the one sync
        counted = max(foreground, 1)
        rate = float(self.schedule.get_last_lr()[0])
        result = StepResult(loss_cls / counted, loss_box / counted, foreground, norm_value, rate, [n > 0 for n in raised])
        if result.is_finite:
            self.scaler.step(self.optimizer)
        else:
            for statistic, value in zip(self.statistics, before, strict=True):
                statistic.copy_(value)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        with warnings.catch_warnings(action="ignore") if not result.is_finite else nullcontext():
            self.schedule.step()  # warns if the first step of all was skipped
        if self.ema is not None and result.is_finite:
            self.ema.update(self.model, number)
        return result

    def _backward(self, batch: Batch) -> Tensor:
        """Forward and backward over the parts of this rank's share: the losses' sums and the foreground, [3]."""
        sums = torch.zeros(3, device=self.device)
        parts = batch.split(self.config.train.accumulate_steps)
        for n, part in enumerate(parts):
            is_last = n == len(parts) - 1
            wait_to_sync = nullcontext() if is_last or world_size() == 1 else self.forward.no_sync()
            with wait_to_sync:
                with autocast(self.precision, self.device):
                    predictions = self.forward(part.images, part.image_sizes)
                losses = self.criterion.sums(predictions, part.targets)
                self.scaler.scale(losses.loss_cls + losses.loss_box).backward()
            sums += torch.stack(list(losses)).detach()
        return sums

    def state(self) -> dict[str, Any]:
        """All but the weights, which are the checkpoint's own."""
        return {name: getattr(self, name).state_dict() for name in ("optimizer", "schedule", "scaler")}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Takes up `state` and the averaged weights; the model has its weights already."""
        assert checkpoint.training is not None
        if self.ema is not None and checkpoint.ema is not None:
            self.ema.model.load_state_dict(checkpoint.ema)
        for name in ("optimizer", "schedule", "scaler"):
            getattr(self, name).load_state_dict(checkpoint.training[name])
