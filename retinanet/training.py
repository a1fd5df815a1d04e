"""The training loop. What happens every so many steps is one `if` in `Trainer.run`."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from retinanet.checkpoint import Checkpoint, save_checkpoint
from retinanet.config import Config, differences, save_config
from retinanet.criterion import build_criterion
from retinanet.data.loader import DetectionDataset, TrainSampler, choose_workers, epoch_length, repeat_factors, train_loader
from retinanet.data.transforms import build_augment
from retinanet.distributed import gather_to_main, is_main, process_group, rank, say, share_from_main, sum_over_ranks, world_size
from retinanet.errors import UserError
from retinanet.evaluation.coco import best_thresholds, metrics_table
from retinanet.optimizer import EMA, build_optimizer, build_schedule, warmup_length
from retinanet.precision import autocast, choose_precision
from retinanet.run_setup import initial_model, load_data, run_length, wrap_model
from retinanet.run_state import find_checkpoint, output_dir, random_state, set_random_state
from retinanet.structures import Batch, shortened
from retinanet.telemetry import Telemetry
from retinanet.validation import Validation

FP16_SCALE = 1024.0  # losses are sums over the batch here, so the usual 65536 would overflow at first
CORRUPT_GRACE = 3  # unreadable images that never stop a run, however small the data set


def train(config: Config, *, resume: bool = False, device: str | None = None) -> bool:
    """Trains as `config` says, into `config.output_dir`. True when the run is finished, False when interrupted (its
    state is saved, `resume=True` goes on). Raises `UserError` for what the user can mend."""
    with process_group(device) as chosen:
        checkpoint = find_checkpoint(output_dir(config), resume)
        return Trainer(config, checkpoint, chosen).run()


class Trainer:
    """Everything that lives as long as a run."""

    def __init__(self, config: Config, checkpoint: Checkpoint | None, device: torch.device) -> None:
        self.config, self.device, self.folder = config, device, output_dir(config)
        self.annotations, validation = load_data(config)
        self.categories = self.annotations.categories
        self.validation = Validation(config, validation, self.categories, self.folder) if validation is not None else None
        threshold = config.data.repeat_threshold
        self.repeats = repeat_factors(self.annotations, threshold) if threshold is not None else None
        self.epoch_images = epoch_length(len(self.annotations), self.repeats)
        self.total_steps, self.validate_every = run_length(config, self.epoch_images)
        self.precision = choose_precision(config.train.precision, device)
        torch.manual_seed(config.seed)

        self.model = initial_model(config, checkpoint, self.categories, self.annotations)
        layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
        self.model.to(device, memory_format=layout)  # type: ignore[call-overload]
        self.statistics = [b for name, b in self.model.named_buffers() if "running_" in name]
        self.ema = EMA(self.model, config.train.ema_decay) if config.train.ema_decay else None
        self.forward = wrap_model(self.model, config, device)
        self.criterion = build_criterion(config.loss)
        self.optimizer = build_optimizer(self.model, config.train)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.schedule = build_schedule(self.optimizer, config.train, self.total_steps)
        self.scaler = torch.amp.GradScaler(device.type, init_scale=FP16_SCALE, enabled=self.precision == "fp16")

        self.step = 0  # optimizer steps done, skipped ones included
        self.best_ap = -1.0
        self.stale = 0  # validations in a row without a better one
        self.metrics: dict[str, Any] | None = None  # of the last validation, on the main rank
        self.thresholds: dict[str, float] = {}
        self.bad_steps = 0  # in a row
        self.minutes_before = 0.0  # in the sessions before this one
        self.corrupt: set[str] = set()
        self.started = time.perf_counter()
        if checkpoint is not None:
            self._restore(checkpoint)

    def run(self) -> bool:
        """The loop, from `self.step` to the end."""
        if self.step >= self.total_steps or (self.step and self._ends_early()):
            say(f"{self.folder}: this run is finished ({self.step} steps); nothing to do")
            return True
        config = self.config
        if is_main():
            save_config(config, self.folder / "config.yaml")
        self._describe()
        self.telemetry = Telemetry(
            self.folder,
            enabled=is_main(),
            start_step=self.step,
            total_steps=self.total_steps,
            batch_size=config.train.batch_size,
        )
        batches = iter(self._loader())
        interrupted = finished = False
        self.forward.train()
        with _interrupts() as asked:
            while not (finished or interrupted):
                waited = time.perf_counter()
                batch = next(batches)
                waited = time.perf_counter() - waited
                self._note_corrupt(batch)
                values, interrupted, out_of_time = self._train_step(batch.to(self.device), bool(asked))
                finished = self.step == self.total_steps or out_of_time
                self.telemetry.step(values["train/loss"], waited)
                if self.step % config.train.log_every_steps == 0:
                    self.telemetry.scalars(self.step, values | self.telemetry.speed)
                if finished or (self.step % self.validate_every == 0 and not interrupted):
                    self._validate()
                    finished = finished or self._out_of_patience()
                    self._save()
                elif interrupted or self.step % (config.train.save_every_steps or math.inf) == 0:
                    self._save()
        self.telemetry.close()
        return self._farewell()

    def _train_step(self, batch: Batch, interrupted: bool) -> tuple[dict[str, float], bool, bool]:
        """One optimizer step on this rank's share of a global batch. Returns what to log, whether any rank was
        interrupted, and whether any rank's time is up.

        The losses' sums are back-propagated and the gradients divided once by the foreground of the whole global batch,
        so that neither accumulation nor the number of ranks changes them.
        """
        before = [statistic.clone() for statistic in self.statistics]
        sums = self._backward(batch)
        flags = sums.new_tensor([interrupted, self._time_is_up()])
        stats = sum_over_ranks(torch.cat([sums, flags]))  # [5]
        normalizer = stats[2].clamp(min=1)
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        torch._foreach_mul_(gradients, world_size() / normalizer)  # DDP has averaged over the ranks
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.train.clip_grad_norm or math.inf)
        loss_cls, loss_box, foreground, interrupts, late, norm_value = torch.cat([stats, norm.view(1)]).tolist()  # the one sync
        finite = math.isfinite(loss_cls + loss_box) and math.isfinite(norm_value)
        rate = self.schedule.get_last_lr()[0]
        if finite:
            self.bad_steps = 0
            self.scaler.step(self.optimizer)
        else:
            self._skip(batch, before, loss_cls, loss_box, norm_value)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        self.step += 1
        if self.ema is not None and finite:
            self.ema.update(self.model, self.step)
        loss_cls, loss_box = loss_cls / max(foreground, 1), loss_box / max(foreground, 1)
        values = {
            "train/loss": loss_cls + loss_box,
            "train/loss_cls": loss_cls,
            "train/loss_box": loss_box,
            "train/learning_rate": rate,
            "train/gradient_norm": norm_value,
            "train/foreground_per_image": foreground / self.config.train.batch_size,
        }
        return values, interrupts > 0, late > 0

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

    def _skip(self, batch: Batch, before: list[Tensor], loss_cls: float, loss_box: float, norm: float) -> None:
        """A step that is not finite leaves no trace in the weights; a row of them ends the run."""
        for statistic, value in zip(self.statistics, before, strict=True):
            statistic.copy_(value)
        if self.precision == "fp16" and math.isfinite(loss_cls + loss_box):
            return  # the scaler finds its scale: expected at the start
        self.bad_steps += 1
        names = [name for part in gather_to_main(batch.file_names) or [batch.file_names] for name in part]  # of all ranks
        story = f"loss_cls {loss_cls:g}, loss_box {loss_box:g}, gradient norm {norm:g}; images {', '.join(names)}"
        self.telemetry.say(f"warning: step {self.step} is not finite and is skipped: {story}")
        if self.bad_steps > self.config.train.max_bad_steps:
            raise UserError(
                f"{self.bad_steps} steps in a row were not finite, the last with {story}. Lower train.learning_rate, "
                "lengthen train.warmup_steps, set train.clip_grad_norm, or try train.precision=fp32"
            )

    @torch.no_grad()
    def _validate(self) -> None:
        """Measures the detector on the validation data; best.pt is written when AP has risen."""
        if self.validation is None:
            return
        model = self.ema.model if self.ema is not None else self.model
        result = self.validation.measure(model, self.criterion, self.device, self.precision)
        if is_main():
            self.validation.report(result, self.step, self.telemetry)
            self.metrics, self.thresholds = result.metrics, best_thresholds(result.metrics)
            ap = result.metrics["AP"] or 0.0
            self.stale = 0 if ap > self.best_ap else self.stale + 1
            if ap > self.best_ap:
                self.best_ap = ap
                save_checkpoint(self.folder / "best.pt", self._checkpoint(None))
        self.best_ap, self.stale = share_from_main((self.best_ap, self.stale))
        self.telemetry.resume_clock()

    def _checkpoint(self, training: dict[str, Any] | None) -> Checkpoint:
        return Checkpoint(
            config=self.config,
            categories=self.categories,
            model=self.model.state_dict(),
            ema=self.ema.model.state_dict() if self.ema is not None else None,
            thresholds=self.thresholds,
            training=training,
        )

    def _save(self) -> None:
        """last.pt, from which a run goes on; the one before stays as previous.pt."""
        if not is_main():
            return
        last = self.folder / "last.pt"
        training = {
            "step": self.step,
            "best_ap": self.best_ap,
            "stale": self.stale,
            "bad_steps": self.bad_steps,
            "minutes": self._minutes(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": random_state(),
            "corrupt": sorted(self.corrupt),
        }
        if last.exists():
            last.replace(self.folder / "previous.pt")
        save_checkpoint(last, self._checkpoint(training))
        if self.validation is None:
            save_checkpoint(self.folder / "best.pt", self._checkpoint(None))

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.training
        assert state is not None
        if self.ema is not None and checkpoint.ema is not None:
            self.ema.model.load_state_dict(checkpoint.ema)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.best_ap, self.bad_steps = state["step"], state["best_ap"], state["bad_steps"]
        self.minutes_before, self.corrupt = state["minutes"], set(state["corrupt"])
        self.stale = state.get("stale", 0)  # older files have none
        self.thresholds = dict(checkpoint.thresholds)
        set_random_state(state["random"])
        for key, (old, new) in differences(checkpoint.config, self.config).items():
            say(f"note: {key} was {old} when this run was saved, now {new}")

    def _loader(self) -> Any:
        config, annotations = self.config, self.annotations
        sizes = annotations.sizes
        sampler = TrainSampler(
            len(annotations),
            config.train.batch_size,
            seed=config.seed,
            start_step=self.step,
            total_steps=self.total_steps,
            rank=rank(),
            world_size=world_size(),
            portrait=sizes[:, 0] > sizes[:, 1] if config.data.group_by_aspect else None,
            factors=self.repeats,
        )
        dataset = DetectionDataset(annotations, build_augment(config.augment, config.input), seed=config.seed)
        workers = choose_workers(config.data.workers, world_size())
        return train_loader(dataset, sampler, workers, pin=self.device.type == "cuda")

    def _note_corrupt(self, batch: Batch) -> None:
        """Names each unreadable image once; too many of them end the run."""
        new = [fault for fault in dict.fromkeys(batch.faults) if fault not in self.corrupt]
        for fault in new:
            self.corrupt.add(fault)
            print(f"warning: another image stands in for {fault}", flush=True)
        seen = min((self.step + 1) * self.config.train.batch_size, len(self.annotations))
        allowed = max(CORRUPT_GRACE, self.config.data.max_corrupt_share * seen)
        if len(self.corrupt) > allowed:
            raise UserError(
                f"{len(self.corrupt)} of about {seen} images are unreadable, more than data.max_corrupt_share "
                f"{self.config.data.max_corrupt_share:g} allows; the last: {batch.faults[-1]}"
            )

    def _minutes(self) -> float:
        return self.minutes_before + (time.perf_counter() - self.started) / 60

    def _time_is_up(self) -> bool:
        limit = self.config.train.max_minutes
        return limit is not None and self._minutes() >= limit

    def _out_of_patience(self) -> bool:
        patience = self.config.train.patience
        return patience is not None and self.stale >= patience

    def _ends_early(self) -> bool:
        return self._time_is_up() or self._out_of_patience()

    def _describe(self) -> None:
        """What this run will do, above all what was decided by itself."""
        config, data = self.config, self.annotations
        trainable = sum(p.numel() for p in self.parameters)
        crowds, empty = int(data.crowd.sum()), int((~data.has_boxes()).sum())
        steps_per_epoch = math.ceil(self.epoch_images / config.train.batch_size)
        workers = choose_workers(config.data.workers, world_size())
        for line in (
            f"data: {len(data)} images ({empty} without boxes), {len(data.labels) - crowds} boxes, {crowds} crowds, "
            f"{len(self.categories)} classes: {shortened([c.name for c in self.categories])}",
            f"model: {config.model.backbone}, {trainable / 1e6:.1f} M trainable parameters, {self.device}, "
            f"{self.precision}, {world_size()} process(es) with {workers} loading process(es) each",
            f"run: {self.total_steps} steps of {config.train.batch_size} images ({self.total_steps / steps_per_epoch:.1f} "
            f"epochs), {config.train.optimizer} at {config.train.learning_rate:g} after "
            f"{warmup_length(config.train, self.total_steps)} steps of warm-up, validation every {self.validate_every}; "
            f"files in {self.folder}",
        ):
            say(line)
        if self.repeats is not None:
            many = f"{np.sum(self.repeats > 1)} with rare classes up to {self.repeats.max():.1f} times"
            say(f"repeats: an epoch shows {self.epoch_images} images, {many} (data.repeat_threshold)")
        if self.step:
            say(f"going on from step {self.step}")

    def _farewell(self) -> bool:
        finished = self.step >= self.total_steps or self._ends_early()
        if finished:
            if self.metrics is not None:
                say(metrics_table(self.metrics))
            if self._out_of_patience():
                say(f"no better AP in {self.stale} validations in a row (train.patience): stopped at step {self.step}")
            best = "" if self.best_ap < 0 else f", best validation AP {100 * self.best_ap:.1f}"
            say(f"finished: {self.step} steps in {self._minutes():.1f} minutes{best}; weights in {self.folder / 'best.pt'}")
        else:
            say(f"stopped at step {self.step} of {self.total_steps}, saved in {self.folder}; --resume goes on")
        return finished


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """While inside, the first Ctrl-C or SIGTERM only goes into the list, for the loop to stop after its step; a second one
    is obeyed."""
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        say("\nstopping after this step (once more to stop at once) ...")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
