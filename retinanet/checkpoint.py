"""Checkpoints: tensors and plain data only, loadable with `weights_only=True`, written so that a crash cannot tear one, and
sealed so that a flipped bit anywhere in the file is found."""

import hashlib
import mmap
import os
import pickle
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from io import BufferedRandom, BufferedReader
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from retinanet.bounded import check_unfolding
from retinanet.config import Config, parse_config
from retinanet.errors import UserError
from retinanet.model import RetinaNet, build_model
from retinanet.structures import Category, check_names

FORMAT = 1
DRAWING = ("normal_", "uniform_", "kaiming_normal_", "kaiming_uniform_")
ARCHIVE_HEAD, ARCHIVE_END = b"PK\x03\x04", b"PK\x05\x06"  # torch.save writes a zip archive; its end record has 22 bytes
SEAL = 64  # characters of a SHA-256, the archive's comment: a zip's own checksums leave out its headers


class _Undrawn(TorchFunctionMode):
    """Leaves weights unset that would be drawn at random, which takes longer than reading the trained ones."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in DRAWING:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@dataclass
class Checkpoint:
    """A detector on disk. `training` (optimizer, position, RNG) is only in those that a run can be resumed from."""

    config: Config
    categories: tuple[Category, ...]
    model: dict[str, Tensor]
    ema: dict[str, Tensor] | None = None
    thresholds: dict[str, float] = field(default_factory=dict)  # best-F1 score by class name
    training: dict[str, Any] | None = None

    def build(self) -> RetinaNet:
        """The detector for inference: with the averaged weights where there are any, in eval mode.

        Raises `UserError` when the weights do not fit `config.model`.
        """
        with torch.device("cpu"), _Undrawn():
            model = build_model(self.config.model, self.config.input, trained_backbone=False)
        try:
            model.load_state_dict(self.ema or self.model)
        except RuntimeError as error:  # its lines list the differences, below a heading
            first = (str(error).splitlines()[1:] or [str(error)])[0].strip()
            raise UserError(f"the checkpoint's weights do not fit the model of its config: {shorten(first, 200)}") from None
        return model.eval()


def save_checkpoint(path: Path, checkpoint: Checkpoint, make_way: Callable[[], None] | None = None) -> None:
    """Writes to a temporary file, flushes it to the disk, then renames it to `path`; between the two `make_way` may move
    what is there. Raises `OSError` with the old file in place."""
    content = {
        "format": FORMAT,
        "config": checkpoint.config.model_dump(mode="json"),
        "categories": [{"id": c.id, "name": c.name} for c in checkpoint.categories],
        "model": checkpoint.model,
        "ema": checkpoint.ema,
        "thresholds": checkpoint.thresholds,
        "training": checkpoint.training,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")  # one name: what a killed process left is written over
    try:
        with temporary.open("w+b") as file:
            _write(content, file)
            file.flush()
            os.fsync(file.fileno())
        if make_way is not None:
            make_way()
        temporary.replace(path)
        with suppress(OSError):  # the new name too, where the file system does that for a folder
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def _write(content: Any, file: BufferedRandom) -> None:
    """The archive, and its seal as the archive's comment."""
    try:
        torch.save(content, file)
    except RuntimeError as error:  # torch's, of its writer's state, hides that of the disk
        raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
    file.seek(-2, os.SEEK_END)
    file.write(SEAL.to_bytes(2, "little"))  # the length of the comment that follows
    file.seek(0)
    file.write(hashlib.file_digest(file, "sha256").hexdigest().encode())


def _is_sealed(file: BufferedReader) -> bool:
    """False for an archive without a seal, of another program. Raises `BadZipFile` when the seal is broken."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        end = content[-SEAL - 22 : -SEAL]
        if end[:4] != ARCHIVE_END or end[-2:] != SEAL.to_bytes(2, "little"):
            return False
        with memoryview(content) as view, view[:-SEAL] as body:
            if hashlib.sha256(body).hexdigest().encode() != content[-SEAL:]:
                raise zipfile.BadZipFile("the SHA-256 is another")
    return True


def save_thresholds(path: Path, thresholds: dict[str, float]) -> list[str]:
    """Keeps these scores of its classes in the checkpoint `path`, in which nothing else changes; returns whose they are."""
    checkpoint = load_checkpoint(path)
    own = {category.name: thresholds[category.name] for category in checkpoint.categories if category.name in thresholds}
    save_checkpoint(path, replace(checkpoint, thresholds={**checkpoint.thresholds, **own}))
    return list(own)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a checkpoint onto the CPU; executes nothing. Raises `UserError` in one line when it is none or is damaged."""
    path = Path(path)
    content = _read(path)
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise UserError(
            f"weights {path} are not a checkpoint of this project; tools/convert_weights.py makes one of another project's"
        )
    if content["format"] > FORMAT:
        raise UserError(f"weights {path} were written by a newer version of this project (format {content['format']})")
    if not {"config", "categories", "model", "ema", "thresholds", "training"} <= set(content):
        raise UserError(f"weights {path} are not a checkpoint of this project")
    categories = tuple(Category(c["id"], c["name"]) for c in content["categories"])
    check_names(categories, f"weights {path}")
    return Checkpoint(
        config=parse_config(content["config"], where=f"config in {path}"),
        categories=categories,
        model=content["model"],
        ema=content["ema"],
        thresholds=content["thresholds"],
        training=content["training"],
    )


def _read(path: Path) -> Any:
    """The content of an archive of torch's. What is no archive never gets to the unpickler."""
    try:
        with path.open("rb") as file:
            head = file.read(len(ARCHIVE_HEAD))
    except FileNotFoundError:
        raise UserError(f"weights {path} do not exist") from None
    except IsADirectoryError:
        raise UserError(f"weights {path} are a folder; name a file in it, such as {path / 'best.pt'}") from None
    except OSError as error:
        raise UserError(f"weights {path} cannot be read: {error.strerror}") from None
    if head != ARCHIVE_HEAD:
        raise UserError(f"weights {path} are not a checkpoint: {'the file is empty' if not head else 'another kind of file'}")
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            check_unfolding(archive, path)
            faulty = None if _is_sealed(file) else archive.testzip()  # torch compares no checksums
        if faulty is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {faulty}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's own message advises to execute it
        raise UserError(f"weights {path} hold more than tensors and plain data: no checkpoint of this project") from None
    except Exception as error:  # of any kind: bytes that mean something else fail anywhere
        raise UserError(f"weights {path} are damaged, or another kind of archive ({type(error).__name__})") from error
