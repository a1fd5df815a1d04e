"""YAML and `key.sub=value` to a checked `Config`, and what two of them differ in."""

import math
import os
import reprlib
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from retinanet.bounded import read_bounded
from retinanet.config.schema import Config, TrainConfig
from retinanet.errors import UserError, did_you_mean

LARGEST_CONFIG = 1 << 20  # bytes, and values
SHOWN = reprlib.Repr()  # of a value in a message
SHOWN.maxstring = SHOWN.maxother = 200
SHOWN.maxlevel = 2


def load_config(path: str | Path | None, overrides: list[str] | None = None) -> Config:
    """Reads a YAML file, applies `key.sub=value` overrides, checks all of it and scales the recipe to the batch.

    Paths inside the file are relative to the working directory, as on the command line.
    Raises `UserError` naming the key, the value and what was expected.
    """
    raw = _read_yaml(Path(path)) if path is not None else {}
    given = dict(map(_split_override, overrides or []))
    if None not in (given.get("train.epochs"), given.get("train.max_steps")):
        raise UserError("the command line: set at most one of train.epochs and train.max_steps")
    _set_all(raw, given)
    config = parse_config(raw, where=" and ".join([str(path)] * (path is not None) + ["the command line"] * bool(given)))
    if config.output_dir is None and path is not None:
        config.output_dir = f"runs/{Path(path).stem}"
    scale_to_batch(config.train, keep=set(given))
    return config


def parse_config(raw: dict[str, Any], where: str = "config") -> Config:
    """Checks a plain dict against the schema. Raises `UserError` with one clause for each fault."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        faults = "; ".join(_explain(fault) for fault in error.errors())
        raise UserError(f"{where}: {faults}") from None


def scale_to_batch(train: TrainConfig, keep: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    """Linear scaling rule (Goyal et al. 2017): rate by batch / reference, steps by its inverse; says so.

    Keys in `keep` (given by hand on the command line) stay as they are.
    """
    reference, train.reference_batch_size = train.reference_batch_size, None
    if reference is None or reference == train.batch_size:
        return
    factor = train.batch_size / reference
    said = []
    for key, scale in (("learning_rate", factor), ("max_steps", 1 / factor), ("warmup_steps", 1 / factor)):
        old = getattr(train, key)
        if old is not None and f"train.{key}" not in keep:
            new = old * scale if key == "learning_rate" else max(1, round(old * scale))
            setattr(train, key, new)
            said.append(f"{key} {old:.9g} -> {new:.9g}")
    if said and os.environ.get("RANK", "0") == "0":  # torchrun's ranks all come by here, before they have met
        print(f"batch {train.batch_size} instead of {reference}: " + ", ".join(said), flush=True)


def save_config(config: Config, path: Path) -> None:
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")


def split_settings(settings: list[str]) -> tuple[str | None, list[str]]:
    """The one config file of a command line, if there is one, and its key.sub=value."""
    files = [text for text in settings if "=" not in text]
    if len(files) > 1:
        raise UserError(f"one config at most, got {', '.join(files)}")
    return files[0] if files else None, [text for text in settings if "=" in text]


def config_for_inference(trained: Config, config: Config | None, overrides: list[str]) -> tuple[Config, list[str]]:
    """What evaluate and predict go by: `model`, `input` and `postprocess` of the checkpoint, `data` and `evaluation` of
    the config if there is one, and over both what is given by hand. Also returns a note for each difference.
    """
    notes, merged = [], trained
    if config is not None:
        merged = trained.model_copy(update={"data": config.data, "evaluation": config.evaluation})
        for key, (asked, used) in differences(config, merged).items():
            if key.startswith(("model.", "input.", "postprocess.")) and asked is not None:
                notes.append(f"note: {key} is {used} as the weights say, not {asked} as the config does")
    raw = merged.model_dump(mode="json")
    _set_all(raw, dict(map(_split_override, overrides)))
    final = parse_config(raw, where="the command line")
    for key, (old, new) in differences(merged, final).items():
        notes.append(f"note: {key} is {new} instead of {old}")
    return final, notes


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ, flattened."""
    before, after = (_flatten(config.model_dump(mode="json")) for config in (old, new))
    pairs = {key: (before.get(key), after.get(key)) for key in after | before}
    return {key: (was, now) for key, (was, now) in pairs.items() if was != now}


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in one place, the first of which plain YAML silently forgets; and references that
    would unfold without end."""

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None and _unfolded(node, {}) > LARGEST_CONFIG:
            raise yaml.YAMLError(f"its references stand for more than {LARGEST_CONFIG} values")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for n, (key, _) in enumerate(node.value):
            if key.value in keys[:n]:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key.value}' stands here twice", key.start_mark)
        return super().construct_mapping(node, deep)


def _unfolded(node: yaml.Node, known: dict[int, float]) -> float:
    """How many values `node` holds with every reference written out; infinite if it refers to itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        pairs = node.value if isinstance(node, yaml.MappingNode) else ()
        inner = [part for pair in pairs for part in pair] or (node.value if isinstance(node, yaml.SequenceNode) else [])
        known[id(node)] = 1 + sum(_unfolded(part, known) for part in inner)
    return known[id(node)]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.load(read_bounded(path, LARGEST_CONFIG).decode(), Loader=_Loader)
    except FileNotFoundError:
        near = did_you_mean(path.name, (p.name for p in path.parent.glob("*.yaml"))) if path.parent.is_dir() else ""
        raise UserError(f"config {path} does not exist.{near}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config {path} cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # the latter two: a 31st of February, endless nesting
        raise UserError(f"config {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if raw is not None and not isinstance(raw, dict):
        raise UserError(f"config {path}: expected 'key: value' lines, got {type(raw).__name__}")
    return raw or {}


def _split_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"'{text}': expected key.sub=value, e.g. train.batch_size=8")
    try:
        return key, yaml.load(value, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise UserError(f"'{text}': the value is not valid YAML") from None


def _set_all(raw: dict[str, Any], given: dict[str, Any]) -> None:
    """Sets what is given by hand. With another path a data set loses what described the one before: annotations, format ..."""
    data = raw.get("data")
    for name, part in data.items() if isinstance(data, dict) else ():
        if isinstance(part, dict) and given.get(f"data.{name}.path", part.get("path")) != part.get("path"):
            part.clear()
    for key, value in given.items():
        set_key(raw, key, value)


def set_key(raw: dict[str, Any], key: str, value: Any) -> None:
    """Sets `key.sub` in nested dicts."""
    *parents, last = key.split(".")
    node = raw
    for parent in parents:
        if not isinstance(node.get(parent), dict):
            node[parent] = {}
        node = node[parent]
    node[last] = value
    rival = {"train.max_steps": "epochs", "train.epochs": "max_steps"}.get(key)
    if rival is not None and value is not None:  # at most one of the two: the one given by hand wins
        node[rival] = None


def _explain(fault: Any) -> str:
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"unknown key '{key}'.{_nearest(fault['loc'])}"
    if fault["type"] == "model_type":
        return f"{key}: expected 'key: value' pairs (got {SHOWN.repr(fault['input'])})"
    message = fault["msg"].removeprefix("Value error, ")
    value = "" if isinstance(fault["input"], dict) else f" (got {SHOWN.repr(fault['input'])})"
    return f"{key or 'config'}: {message}{value}"


def _nearest(loc: tuple[Any, ...]) -> str:
    """Near names of an unknown key: beside it, else the same name elsewhere."""
    *sections, name = map(str, loc)
    place = "".join(f"{section}." for section in sections)
    parts = {part: {"path": ""} for part in ("train", "val", "test")}  # that their keys are there
    keys = list(_flatten(Config.model_validate({"data": parts}).model_dump()))
    beside = {key.removeprefix(place).partition(".")[0] for key in keys if key.startswith(place)}
    elsewhere = [repr(key) for key in keys if key.endswith(f".{name}")]
    return did_you_mean(name, sorted(beside)) or (f" Did you mean {' or '.join(elsewhere)}?" if elsewhere else "")


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
