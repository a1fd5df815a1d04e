"""Steps whose loss or gradient is not finite: named, kept for a look, and a row of them ends the run."""

from pathlib import Path
from typing import Any

import torch

from retinanet.config import Config
from retinanet.distributed import gather_to_main, say
from retinanet.errors import RunError
from retinanet.learner import StepResult
from retinanet.structures import Batch

MOST_FILES = 3  # in a run's folder


class BadSteps:
    """Counts them. All ranks must call `note` for the same steps."""

    def __init__(self, config: Config, folder: Path, in_a_row: int = 0) -> None:
        self.config, self.folder, self.in_a_row = config, folder, in_a_row
        self.gathered = 0

    def note(self, step: int, batch: Batch, result: StepResult) -> None:
        """Raises `RunError` after more than `train.max_bad_steps` in a row."""
        self.in_a_row += 1
        names = [name for part in gather_to_main(batch.file_names) or [batch.file_names] for name in part]  # of all ranks
        losses = {"loss_cls": result.loss_cls, "loss_box": result.loss_box, "gradient_norm": result.gradient_norm}
        story = ", ".join(f"{name.replace('_n', ' n')} {value:g}" for name, value in losses.items())
        story += f"{self._keep(step, batch, losses)}; images {', '.join(names)}"
        say(f"warning: step {step} is not finite and is skipped: {story}")
        if self.in_a_row > self.config.train.max_bad_steps:
            raise RunError(
                f"{self.in_a_row} steps in a row were not finite, the last with {story}. Lower train.learning_rate, "
                "lengthen train.warmup_steps, set train.clip_grad_norm, or try train.precision=fp32"
            )

    def _keep(self, step: int, batch: Batch, losses: dict[str, float]) -> str:
        """Writes bad_step_<step>.pt, loadable with `weights_only=True`, and returns how to say so."""
        if self.gathered == MOST_FILES:
            return ""
        self.gathered += 1
        shares = gather_to_main(_as_plain_data(batch))
        if not shares or len(list(self.folder.glob("bad_step_*.pt"))) >= MOST_FILES:
            return ""
        file = self.folder / f"bad_step_{step}.pt"
        try:
            torch.save({"step": step, **losses, "shares": shares, "config": self.config.model_dump(mode="json")}, file)
        except (OSError, RuntimeError) as error:
            file.unlink(missing_ok=True)
            return f"; {file} could not be written: {error}"
        return f"; kept in {file}"


def _as_plain_data(batch: Batch) -> dict[str, Any]:
    """A rank's share of the batch, on the CPU."""
    return {
        "images": batch.images.cpu(),  # [B, 3, H, W] uint8
        "image_sizes": batch.image_sizes.cpu(),
        "file_names": batch.file_names,
        "targets": [vars(target.to(torch.device("cpu"))) for target in batch.targets],
    }
