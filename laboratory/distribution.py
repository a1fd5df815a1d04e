"""How the loss of a trained detector is spread over its samples, for any gamma (paper figure 4).

A positive is the logit of a foreground anchor's own class, a negative each of a background anchor's K logits. Alpha, one factor
for all positives and another for all negatives, goes when each of the two sums is normalised to 1. docs/focal_loss.md has why.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retinanet.errors import UserError
from retinanet.losses import sigmoid_focal_loss

GAMMAS = (0.0, 0.5, 1.0, 2.0)  # the paper's
FRACTIONS = (0.01, 0.1, 0.2)  # of the samples, the hardest ones
RANGE, WIDTH = 40.0, 1 / 256  # of a histogram and its bins, in logits


class LogitHistogram:
    """Any number of samples in 160 KB: the loss of any gamma rises with the logit of what is wrong, so that sorting by one is
    sorting by the other, and one histogram of logits does for all gammas. A bin is 1/256 wide, which puts the shares off by
    less than 0.0001; logits beyond +-40 count as 40."""

    def __init__(self) -> None:
        self.counts = np.zeros(int(2 * RANGE / WIDTH), np.int64)

    def add(self, wrong: Tensor) -> None:
        """Logits of what is wrong: a negative's as it is, a positive's with the other sign. Raises `UserError` for NaN."""
        if not torch.isfinite(wrong).all():
            raise UserError("the detector's logits are not all finite: it has diverged, or its weights are damaged")
        bins = ((wrong.flatten().double() + RANGE) / WIDTH).floor().long().clamp(0, len(self.counts) - 1)
        self.counts += torch.bincount(bins, minlength=len(self.counts)).cpu().numpy()

    def cumulative(self, gamma: float) -> tuple[np.ndarray, np.ndarray]:
        """Points (share of the samples, share of the loss), easiest samples first, from (0, 0) to (1, 1)."""
        centres = (torch.arange(len(self.counts), dtype=torch.float64) + 0.5) * WIDTH - RANGE
        loss = self.counts * sigmoid_focal_loss(centres, torch.zeros_like(centres), None, gamma).numpy()
        samples, losses = (np.concatenate([[0], np.cumsum(part)]) for part in (self.counts, loss))
        return samples / max(samples[-1], 1), losses / max(losses[-1], np.finfo(float).tiny)

    def hardest(self, gamma: float, fraction: float) -> float | None:
        """The share of the loss that the hardest `fraction` of the samples carries; None without samples."""
        if not self.counts.any():
            return None
        return float(1 - np.interp(1 - fraction, *self.cumulative(gamma)))

    def figures(self, gammas: Sequence[float]) -> dict[str, Any]:
        """JSON: the number of samples, the hardest ones' share of the loss by gamma and fraction, and 101 points each."""
        share = {f"{gamma:g}": {f"{f:g}": self.hardest(gamma, f) for f in FRACTIONS} for gamma in gammas}
        samples = np.linspace(0, 1, 101)
        points = {f"{gamma:g}": np.interp(samples, *self.cumulative(gamma)).tolist() for gamma in gammas}
        return {"samples": int(self.counts.sum()), "hardest_share": share, "cumulative": points}


def distribution_table(positives: LogitHistogram, negatives: LogitHistogram, gammas: Sequence[float] = GAMMAS) -> str:
    lines = []
    for name, histogram in (("negatives", negatives), ("positives", positives)):
        heads = "".join(f"{f'{fraction:.0%}':>8}" for fraction in FRACTIONS)
        lines.append(f"{histogram.counts.sum()} {name}: share of the loss that the hardest carry\n{'':>12}{heads}")
        for gamma in gammas:
            shares = [histogram.hardest(gamma, fraction) for fraction in FRACTIONS]
            cells = "".join(f"{'-' if share is None else f'{share:.1%}':>8}" for share in shares)
            lines.append(f"{f'gamma {gamma:g}':>12}{cells}")
    return "\n".join(lines)


def distribution_chart(path: Path, positives: LogitHistogram, negatives: LogitHistogram, gammas: Sequence[float]) -> None:
    """Figure 4 of the paper."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    for axes, name, histogram in zip(figure.subplots(1, 2), ("foreground", "background"), (positives, negatives), strict=True):
        for gamma in gammas:
            axes.plot(*histogram.cumulative(gamma), label=f"$\\gamma$ = {gamma:g}")
        axes.set(xlabel=f"fraction of {name} examples", ylabel="cumulative normalised loss", xlim=(0, 1), ylim=(0, 1))
        axes.legend()
    figure.savefig(path, dpi=120)
