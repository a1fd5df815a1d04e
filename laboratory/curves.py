"""Loss and gradient by p_t, the probability given to what is true (paper figure 1): by the losses that train, and autograd."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from retinanet.losses import sigmoid_cross_entropy_loss, sigmoid_focal_loss

SHOWN = (0.01, 0.05, 0.2, 0.5, 0.8, 0.95, 0.968, 0.99)  # p_t, from a bad mistake to an easy example
FINE = tuple(n / 1000 for n in range(1, 1000))
SIDES = {1: "foreground", 0: "background"}


class Point(NamedTuple):
    """One example: of the foreground (`target` 1) or the background (0)."""

    target: int
    gamma: float
    p_t: float
    cross_entropy: float  # without alpha
    loss: float
    gradient: float  # size of the derivative by the logit
    ratio: float  # cross entropy / loss: how many times smaller the focal loss is


def sides(alpha: float | None) -> tuple[int, ...]:
    """The targets to look at: without alpha foreground and background cost the same."""
    return (1,) if alpha is None else (1, 0)


def curve(p_t: Sequence[float], gamma: float, alpha: float | None, target: int = 1) -> list[Point]:
    """The focal loss of examples whose truth has the probabilities `p_t`, each in 0..1, its ends excluded."""
    probabilities = torch.tensor(p_t, dtype=torch.float64)
    logits = (probabilities.logit() if target else -probabilities.logit()).requires_grad_()
    targets = torch.full_like(probabilities, target)
    loss = sigmoid_focal_loss(logits, targets, alpha, gamma)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    plain = sigmoid_cross_entropy_loss(logits.detach(), targets)
    columns = (p_t, plain.tolist(), loss.tolist(), gradient.abs().tolist(), (plain / loss.detach()).tolist())
    return [Point(target, gamma, *values) for values in zip(*columns, strict=True)]


def curves_table(gammas: Sequence[float], alpha: float | None) -> str:
    """The losses at `SHOWN` as text; in brackets how many times smaller they are than cross entropy."""
    blocks = []
    for target in sides(alpha):
        weight = "" if alpha is None else f", weight {alpha if target else 1 - alpha:g}"
        heads = [f"{f'gamma {gamma:g}':>23}" for gamma in gammas]
        lines = [f"{SIDES[target]}{weight}", f"{'p_t':>6} {'CE':>10} {''.join(heads)}"]
        for points in zip(*(curve(SHOWN, gamma, alpha, target) for gamma in gammas), strict=True):
            cells = [f"{f'{point.loss:.4g} ({_times(point.ratio)})':>23}" for point in points]
            lines.append(f"{points[0].p_t:>6} {points[0].cross_entropy:>10.4g} {''.join(cells)}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _times(ratio: float) -> str:
    return f"{ratio:,.1f}x" if ratio < 1e6 else f"{ratio:.1e}x"


def write_curves(path: Path, gammas: Sequence[float], alpha: float | None) -> None:
    """CSV with a row for each target, gamma and p_t of `FINE`."""
    rows = [point for target in sides(alpha) for gamma in gammas for point in curve(FINE, gamma, alpha, target)]
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savetxt(path, rows, fmt="%.9g", delimiter=",", header=",".join(Point._fields), comments="")


def curves_chart(path: Path, gammas: Sequence[float], alpha: float | None) -> None:
    """Loss (figure 1 of the paper) and gradient by p_t; with alpha the background dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    loss_axes, gradient_axes = figure.subplots(1, 2)
    for n, gamma in enumerate(gammas):
        for target in sides(alpha):
            points = curve(FINE, gamma, alpha, target)
            label = f"$\\gamma$ = {gamma:g}" + ("" if alpha is None else f", {SIDES[target]}")
            look = {"color": f"C{n}", "linestyle": "-" if target else "--", "label": label}
            loss_axes.plot(FINE, [point.loss for point in points], **look)
            gradient_axes.plot(FINE, [point.gradient for point in points], **look)
    title = "without alpha" if alpha is None else f"$\\alpha$ = {alpha:g}"
    for axes, name in ((loss_axes, "loss"), (gradient_axes, "|gradient| by the logit")):
        axes.set(xlabel="probability of what is true, $p_t$", ylabel=name, xlim=(0, 1), ylim=(0, None), title=title)
        axes.axvspan(0.6, 1, color="0.95", zorder=0)  # the paper's "well-classified examples"
    loss_axes.set_ylim(0, 5)
    loss_axes.legend()
    figure.savefig(path, dpi=120)
