"""The training loop. What happens every so many steps is one `if` in `Trainer._loop`."""

import math
import signal
import time
from contextlib import closing
from functools import cached_property
from typing import Any

import numpy as np
import torch

from retinanet.bad_steps import BadSteps
from retinanet.checkpoint import Checkpoint
from retinanet.config import Config, differences, save_config
from retinanet.data.cache import PictureCache
from retinanet.data.loader import COMPILED_MULTIPLE, PAD_MULTIPLE, DetectionDataset, train_loader
from retinanet.data.sampling import TrainSampler, epoch_length, repeat_factors
from retinanet.data.transforms import build_augment
from retinanet.data.unbroken import unbroken
from retinanet.data.workers import choose_workers
from retinanet.distributed import copy_from_main, gather_to_main, is_main, process_group, rank, say, share_from_main, world_size
from retinanet.errors import RunError, UserError
from retinanet.evaluation.coco import best_thresholds, metrics_table
from retinanet.failures import LostRanksError, explained
from retinanet.interrupts import Interrupts
from retinanet.learner import Learner
from retinanet.optimizer import warmup_length
from retinanet.run_setup import initial_model, load_data, run_length
from retinanet.run_state import RunFiles, find_checkpoint, output_dir, random_state, set_random_state
from retinanet.structures import Batch, shortened
from retinanet.telemetry import Telemetry
from retinanet.validation import Validation

CORRUPT_GRACE = 3  # unreadable images that never stop a run, however small the data set


def train(config: Config, *, resume: bool = False, device: str | None = None, interrupts: Interrupts | None = None) -> bool:
    """Trains as `config` says, into `config.output_dir`. True when the run is finished, False when interrupted (its
    state is saved, `resume=True` goes on; `interrupts` knows by what). Raises `UserError` for what the user can mend."""
    with interrupts or Interrupts() as asked:
        try:
            with explained(config), process_group(device) as chosen:
                return Trainer(config, find_checkpoint(output_dir(config), resume), chosen, asked).run()
        except KeyboardInterrupt:
            if asked.asked is None:
                raise
        except LostRanksError:
            if asked.asked is None:
                raise  # else the others were interrupted too
        say("stopped; --resume goes on from the last checkpoint")
        return False


class Trainer:
    """Everything that lives as long as a run."""

    def __init__(
        self, config: Config, checkpoint: Checkpoint | None, device: torch.device, interrupts: Interrupts | None = None
    ) -> None:
        self.config, self.device, self.folder = config, device, output_dir(config)
        self.interrupts = interrupts or Interrupts()
        self.annotations, validation = load_data(config)
        self.categories = self.annotations.categories
        self.validation = Validation(config, validation, self.categories, self.folder) if validation is not None else None
        threshold = config.data.repeat_threshold
        self.repeats = repeat_factors(self.annotations, threshold) if threshold is not None else None
        self.epoch_images = epoch_length(len(self.annotations), self.repeats)
        self.total_steps, self.validate_every = run_length(config, self.epoch_images)
        torch.manual_seed(config.seed)
        self.model = initial_model(config, checkpoint, self.categories, self.annotations)
        self.learner = Learner(self.model, config, device, self.total_steps)

        state = checkpoint.training or {} if checkpoint is not None else {}  # older files lack some of it
        self.step: int = state.get("step", 0)  # optimizer steps done, skipped ones included
        self.best_ap: float = state.get("best_ap", -1.0)
        self.stale: int = state.get("stale", 0)  # validations in a row without a better one
        self.validation_due: bool = state.get("validation_due", False)  # it was saved first
        self.logged: dict[str, float] = state.get("logged", {})  # of the last step
        self.minutes_before: float = state.get("minutes", 0.0)  # in the sessions before this one
        self.corrupt = set(state.get("corrupt", ()))
        self.thresholds = dict(checkpoint.thresholds) if checkpoint is not None else {}
        self.metrics: dict[str, Any] | None = None  # of the last validation, on the main rank
        self.started = time.perf_counter()
        self.late = config.train.max_minutes is not None and self.minutes_before >= config.train.max_minutes
        self.stopped = self.save_asked = False
        self.bad_steps = BadSteps(config, self.folder, state.get("bad_steps", 0))
        saved_step = self.step if state else None
        self.files = RunFiles(self.folder, config.train.keep_checkpoints, config.train.save_every_minutes, saved_step)
        if checkpoint is not None:
            self.learner.restore(checkpoint)
            for key, (old, new) in differences(checkpoint.config, config).items():
                say(f"note: {key} was {old} when this run was saved, now {new}")
        set_random_state(state.get("random_states", []), (config.seed, self.step))

    def run(self) -> bool:
        """From `self.step` to the end."""
        if self._is_over() and not self.validation_due:
            say(f"{self.folder}: this run is finished ({self.step} steps); nothing to do")
            return True
        if is_main():
            save_config(self.config, self.folder / "config.yaml")
        self._describe()
        _ = self._dataset  # its mistakes and the filling of its cache come before the progress bar
        self.telemetry = Telemetry(
            self.folder,
            enabled=is_main(),
            start_step=self.step,
            total_steps=self.total_steps,
            batch_size=self.config.train.batch_size,
            redo=self.validation_due,
        )
        with closing(self.telemetry):
            self._loop()
        return self._farewell()

    def _loop(self) -> None:
        config, start = self.config.train, self.step
        batches = unbroken(lambda done: self._loader(start + done))
        self.learner.forward.train()
        self.interrupts.patient = True
        if self.validation_due:
            self._gather_state()
            if self.step % config.log_every_steps == 0:
                self._log()
            self._validate()
        while not (self._is_over() or self.stopped):
            waited = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - waited
            self._note_corrupt(batch)
            self.logged = self._train_step(batch.to(self.device))
            self.telemetry.step(self.logged["train/loss"], waited)
            if self.step % config.log_every_steps == 0:
                self._log()
            at_validation = self._is_over() or self.step % self.validate_every == 0
            self.validation_due = at_validation and self.validation is not None
            at_save = self.save_asked or self.stopped or self.step % (config.save_every_steps or math.inf) == 0
            if at_validation or at_save:
                self._gather_state()
                self._save()
            if self.validation_due and not self.stopped:
                self._validate()

    def _train_step(self, batch: Batch) -> dict[str, float]:
        """One optimizer step on this rank's share of a global batch; agrees on what any rank asks for. Returns what to log."""
        asked = self.interrupts.asked
        limit = self.config.train.max_minutes
        late = limit is not None and self._minutes() >= limit
        flags = (asked == signal.SIGINT, asked == signal.SIGTERM, late, is_main() and self.files.is_due())
        result = self.learner.step(batch, self.step + 1, flags)
        if result.is_finite:
            self.bad_steps.in_a_row = 0
        elif self.learner.precision != "fp16" or not result.loss_is_finite:  # else the scaler finds its scale: expected
            self.bad_steps.note(self.step, batch, result)
        self.step += 1
        interrupted, preempted, self.late, self.save_asked = result.flags
        if interrupted or preempted:
            self.stopped, self.interrupts.asked = True, signal.SIGTERM if preempted else signal.SIGINT
        return {
            "train/loss": result.loss_cls + result.loss_box,
            "train/loss_cls": result.loss_cls,
            "train/loss_box": result.loss_box,
            "train/learning_rate": result.learning_rate,
            "train/gradient_norm": result.gradient_norm,
            "train/foreground_per_image": result.foreground / self.config.train.batch_size,
        }

    def _log(self) -> None:
        self.telemetry.scalars(self.step, self.logged | self.telemetry.speed)

    @torch.no_grad()
    def _validate(self) -> None:
        """Measures the detector on the validation data; best.pt is written when AP has risen. An interrupt ends it at once:
        the save before says that it is due."""
        assert self.validation is not None
        learner = self.learner
        copy_from_main(learner.best_model.buffers())  # BatchNorm's statistics are each rank's own; rank 0's are saved
        try:
            with self.interrupts.at_once():
                result = self.validation.measure(learner.best_model, learner.criterion, self.device, learner.precision)
        except KeyboardInterrupt:
            self.stopped = True
            return
        if is_main():
            self.validation.report(result, self.step, self.telemetry)
            self.metrics, self.thresholds = result.metrics, best_thresholds(result.metrics)
            ap = result.metrics["AP"] or 0.0
            self.stale = 0 if ap > self.best_ap else self.stale + 1
            if ap > self.best_ap and self.files.write(self.folder / "best.pt", self._checkpoint(None)):
                self.best_ap = ap
        self.best_ap, self.stale = share_from_main((self.best_ap, self.stale))
        self.validation_due = False
        self._save()
        self.telemetry.resume_clock()

    def _checkpoint(self, training: dict[str, Any] | None) -> Checkpoint:
        ema = self.learner.ema
        return Checkpoint(
            config=self.config,
            categories=self.categories,
            model=self.model.state_dict(),
            ema=ema.model.state_dict() if ema is not None else None,
            thresholds=self.thresholds,
            training=training,
        )

    def _gather_state(self) -> None:
        """What only the ranks themselves know, for rank 0 to save. All ranks must call this."""
        parts = gather_to_main((random_state(), self.corrupt))
        self.random_states = [state for state, _ in parts]
        self.all_corrupt = sorted(set().union(*(corrupt for _, corrupt in parts)))

    def _save(self) -> None:
        """last.pt, from which a run goes on; those before it stay as previous.pt, previous-2.pt ..."""
        if not is_main():
            return
        training = {
            "step": self.step,
            "best_ap": self.best_ap,
            "stale": self.stale,
            "validation_due": self.validation_due,
            "logged": self.logged,
            "bad_steps": self.bad_steps.in_a_row,
            "minutes": self._minutes(),
            "random_states": self.random_states,
            "corrupt": self.all_corrupt,
            **self.learner.state(),
        }
        if self.validation is None:
            self.files.write(self.folder / "best.pt", self._checkpoint(None))
        self.files.save(self._checkpoint(training))

    @cached_property
    def _dataset(self) -> DetectionDataset:
        config = self.config
        return DetectionDataset(
            self.annotations,
            build_augment(config.augment, config.input),
            seed=config.seed,
            reduced=config.input.reduced_decode,
            cache=PictureCache(self.annotations) if config.data.cache else None,
        )

    def _loader(self, start_step: int) -> Any:
        config, annotations = self.config, self.annotations
        sizes = annotations.sizes
        sampler = TrainSampler(
            len(annotations),
            config.train.batch_size,
            seed=config.seed,
            start_step=start_step,
            total_steps=self.total_steps,
            rank=rank(),
            world_size=world_size(),
            portrait=sizes[:, 0] > sizes[:, 1] if config.data.group_by_aspect else None,
            factors=self.repeats,
        )
        workers = choose_workers(config.data.workers, world_size())
        multiple = COMPILED_MULTIPLE if config.train.compile else PAD_MULTIPLE
        return train_loader(self._dataset, sampler, workers, pin=self.device.type == "cuda", multiple=multiple)

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

    def _out_of_patience(self) -> bool:
        patience = self.config.train.patience
        return patience is not None and self.stale >= patience

    def _is_over(self) -> bool:
        return self.step >= self.total_steps or self.late or self._out_of_patience()

    def _describe(self) -> None:
        """What this run will do, above all what was decided by itself."""
        config, data = self.config, self.annotations
        trainable = sum(p.numel() for p in self.learner.parameters)
        crowds, empty = int(data.crowd.sum()), int((~data.has_boxes()).sum())
        steps_per_epoch = math.ceil(self.epoch_images / config.train.batch_size)
        for line in (
            f"data: {len(data)} images ({empty} without boxes), {len(data.labels) - crowds} boxes, {crowds} crowds, "
            f"{len(self.categories)} classes: {shortened([c.name for c in self.categories])}",
            f"model: {config.model.backbone}, {trainable / 1e6:.1f} M trainable parameters, {self.device}, "
            f"{self.learner.precision}, {world_size()} process(es)",
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
        if self.files.failures:
            raise RunError(f"{'; '.join(self.files.failures.values())}; --resume goes on from what was saved last")
        if not self._is_over() or self.validation_due:
            say(f"stopped at step {self.step} of {self.total_steps}, saved in {self.folder}; --resume goes on")
            return False
        if self.metrics is not None:
            say(metrics_table(self.metrics))
        if self._out_of_patience():
            say(f"no better AP in {self.stale} validations in a row (train.patience): stopped at step {self.step}")
        best = "" if self.best_ap < 0 else f", best validation AP {100 * self.best_ap:.1f}"
        say(f"finished: {self.step} steps in {self._minutes():.1f} minutes{best}; weights in {self.folder / 'best.pt'}")
        return True
