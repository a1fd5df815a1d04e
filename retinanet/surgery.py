"""Trained weights into another model: classes matched by name, or the backbone alone."""

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from retinanet.checkpoint import Checkpoint
from retinanet.config import Config, ModelConfig, differences, set_key
from retinanet.distributed import say
from retinanet.errors import UserError
from retinanet.model import RetinaNet
from retinanet.structures import Category, shortened

CLASS_ROWS = "cls_subnet.final."  # row a * K + c is class c at anchor a
NORMALISATION = ("mean", "std")
COUNTER = "num_batches_tracked"  # a BatchNorm's, which a frozen one has not: no weight
FREE = {f"model.{key}" for key in ("num_classes", "backbone_weights", "freeze_stages", "head_init", "prior")}  # no matter
OF_BACKBONE = {f"model.{key}" for key in ("backbone", "norm", "norm_eps", "stride_in_1x1")}


def transplant(model: RetinaNet, config: Config, categories: Sequence[Category], donor: Checkpoint, source: str) -> None:
    """Fills `model`, made as `config` says for `categories`, with the donor's weights: the averaged ones if it has them.

    A class known to both by name keeps its rows of the class output, a new one those that `model` starts with. With
    `train.init_part` backbone only the backbone is filled. Says what was done and which settings differ. Raises
    `UserError` when the weights do not fit.
    """
    part = config.train.init_part
    own = model.state_dict()
    state = _part(donor.ema or donor.model, part)
    state = {key: value for key, value in state.items() if key in own or not key.endswith(COUNTER)}
    here, there = ([category.name for category in known] for known in (categories, donor.categories))
    settings = _differing(donor.config, config, part)
    fault = _misfit(_part(own, part), state, len(here), len(there))
    if fault is not None:
        ways = [f"take over {_as_overrides(settings)} (train.adopt_model=true does it)"] if settings else []
        ways += ["set train.init_part=backbone"] if part == "all" else []
        raise UserError(f"train.init_from {source} does not fit: {fault}; {' or '.join(ways) or 'it is another architecture'}")
    kind = "averaged weights" if donor.ema else "weights"
    if part == "backbone":
        say(f"{source}: {kind} of the backbone; pyramid and heads start at random")
    else:
        for key in (f"{CLASS_ROWS}weight", f"{CLASS_ROWS}bias"):
            state[key] = _move_rows(own[key], state[key], here, there)
        say(f"{source}: {kind}, classes matched by name\n{_table(here, there)}")
    for key, (trained, asked) in settings.items():
        say(f"note: {key} is {asked} here, {trained} where the weights were trained")
    if settings:
        say(f"note: in training they adapt to that; to keep what they are used to: {_as_overrides(settings)}")
    model.load_state_dict({**own, **state})


def adopt_settings(config: Config, trained: Config) -> dict[str, tuple[Any, Any]]:
    """Sets in `config.model` whatever would make weights of a detector trained as `trained` another one.

    Returns the settings (there, here) that were changed.
    """
    settings = _differing(trained, config, config.train.init_part)
    raw = config.model.model_dump()
    for key, (there, _) in settings.items():
        set_key(raw, key.removeprefix("model."), there)
    config.model = ModelConfig.model_validate(raw)
    return settings


def follow_normalisation(config: Config, model: RetinaNet) -> None:
    """Mean and standard deviation belong to the weights: sets `config.input` to the model's, and says so if it differs."""
    for key in NORMALISATION:
        trained, asked = getattr(model, key).flatten(), getattr(config.input, key)
        if not torch.equal(trained, trained.new_tensor(asked)):
            values = tuple(float(f"{value:.7g}") for value in trained.tolist())  # what float32 holds of a decimal number
            say(f"note: input.{key} is {values} as the weights say, not {asked} as the config does")
            setattr(config.input, key, values)


def _part(state: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if part == "all" or key.startswith("backbone.") or key in NORMALISATION}


def _misfit(wanted: dict[str, Tensor], state: dict[str, Tensor], here: int, there: int) -> str | None:
    """The first difference between a model's tensors and weights for it, `here` and `there` being their class counts."""
    for key, value in wanted.items():
        shape = list(value.shape)
        if key.startswith(CLASS_ROWS):
            shape[0] = shape[0] // here * there
        if key not in state and not key.endswith(COUNTER):
            return f"{key} is missing there"
        if key in state and list(state[key].shape) != shape:
            return f"{key} is {list(state[key].shape)} there, {shape} here"
    foreign = next((key for key in state if key not in wanted), None)
    return f"{foreign} is missing here" if foreign is not None else None


def _differing(donor: Config, config: Config, part: str) -> dict[str, tuple[Any, Any]]:
    """The settings (there, here) that make the same weights another detector."""
    found = {key: pair for key, pair in differences(donor, config).items() if key.startswith("model.") and key not in FREE}
    if "group" not in found.get("model.norm", ()):
        found.pop("model.norm", None)  # frozen, batch and sync: the same tensors with the same meaning
    return {key: pair for key, pair in found.items() if part == "all" or key in OF_BACKBONE}


def _as_overrides(settings: dict[str, tuple[Any, Any]]) -> str:
    """The donor's settings as one would write them on the command line."""

    def text(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))

    return " ".join(f"{key}={text(there)}" for key, (there, _) in settings.items())


def _move_rows(fresh: Tensor, trained: Tensor, ours: list[str], theirs: list[str]) -> Tensor:
    """`fresh` [A * K, ...] with the rows of the classes that both have taken from `trained` [A * K', ...]."""
    rows, others = fresh.clone().unflatten(0, (-1, len(ours))), trained.unflatten(0, (-1, len(theirs)))
    for label, name in enumerate(ours):
        if name in theirs:
            rows[:, label] = others[:, theirs.index(name)]
    return rows.flatten(0, 1)


def _table(ours: list[str], theirs: list[str]) -> str:
    rows = (
        ("kept", [name for name in ours if name in theirs]),
        ("new, at the prior", [name for name in ours if name not in theirs]),
        ("dropped", [name for name in theirs if name not in ours]),
    )
    return "\n".join(f"  {what:<17} {len(names):>4}  {shortened(names)}".rstrip() for what, names in rows)
