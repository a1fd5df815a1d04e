"""Other projects' files to state dicts: torch's archives, its older pickles, and detectron2's pickles of numpy arrays.

Nothing in a file is executed: unpicklers build tensors, arrays and plain data, and refuse whatever else is asked for.
"""

import io
import pickle
import re
import zipfile
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from retinanet.bounded import check_unfolding
from retinanet.errors import UserError

ZIP = b"PK\x03\x04"  # torch.save since 1.6
LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before that: a pickled number comes first
PICKLE = b"\x80"
REFUSED = "is no pickle of plain arrays (it asks for {}); nothing in it was executed"
REPEATED = 4  # times that a file's bytes may stand in its tensors: some share them
NESTED = ("model", "state_dict")  # where a training checkpoint keeps its state dict: torchvision and detectron2; mmdet


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors in a file, by name, on the CPU. Raises `UserError` in one line that names the file."""
    path = Path(path)
    try:
        head = _head(path)
        content = _load_torch(path) if head.startswith((ZIP, LEGACY)) else _load_pickle(path)
        for key in NESTED:
            if isinstance(content, dict) and isinstance(content.get(key), dict):
                content = content[key]
        return _tensors(content, path.stat().st_size)
    except UserError as error:
        raise UserError(f"{path} {error}") from None


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            head = file.read(len(LEGACY))
    except FileNotFoundError:
        raise UserError("does not exist") from None
    except IsADirectoryError:
        raise UserError("is a folder, not a file of weights") from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}") from None
    if not head:
        raise UserError("is empty")
    if not head.startswith((ZIP, PICKLE)):
        raise UserError(f"is no file of weights: it begins with {head[:8]!r}")
    return head


def _load_torch(path: Path) -> Any:
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                check_unfolding(archive, path)
                if faulty := archive.testzip():  # torch compares no checksums
                    raise UserError(f"is damaged: wrong checksum of {faulty}")
        with torch.serialization.safe_globals([Namespace]):  # plain data: torchvision's script keeps its arguments
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError:  # torch's own message advises to execute it
        raise UserError(
            "holds more than tensors and plain data, and was not executed; where it comes from, save the state dict alone"
        ) from None
    except Exception as error:  # of any kind: bytes that mean something else fail anywhere
        raise UserError(f"is damaged, or another kind of archive ({type(error).__name__})") from None


class _Dtype:
    """numpy's dtype as pickles describe it: a name, and then a state with the order of the bytes."""

    def __init__(self, name: str, *_: Any) -> None:
        self.name, self.order = name, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]

    def read(self, content: Any, shape: tuple[int, ...], order: Literal["C", "F"] = "C") -> np.ndarray:
        """The array in these bytes. No pointer (dtype O), and no size that the bytes do not fill, gets past here."""
        if not re.fullmatch("[biufc][0-9]+", self.name):
            raise UserError(f"is not a state dict: it holds an array of {self.name[:20]}, not of numbers")
        if isinstance(content, str):
            content = content.encode("latin1")  # from Python 2
        return np.frombuffer(content, self.order + self.name).reshape(shape, order=order)


class _Array:
    """numpy's ndarray as pickles describe it: an empty one, and then a state with all that is in it."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        *_, shape, dtype, fortran, content = state
        self.values = dtype.read(content, shape, "F" if fortran else "C")


class _ArraysOnly(pickle._Unpickler):  # type: ignore[name-defined]  # the one in C takes gigabytes where a file says so
    """Builds dicts, lists, strings, numbers and arrays of numbers. Of numpy it calls nothing: what numpy builds from a
    pickle may point anywhere in memory.
    """

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy._core.multiarray", "numpy._core.numeric"):  # since numpy 2
            module = module.replace("_core", "core")
        if (module, name) not in ALLOWED:
            raise UserError(REFUSED.format(f"{module}.{name}"))
        return ALLOWED[module, name]

    def load_bytearray8(self) -> None:
        """Python's own would make room for what the file claims, before it reads."""
        size = int.from_bytes(self.read(8), "little")  # type: ignore[attr-defined]
        self.append(bytearray(self.read(size)))  # type: ignore[attr-defined]

    dispatch: ClassVar = {**pickle._Unpickler.dispatch, pickle.BYTEARRAY8[0]: load_bytearray8}  # type: ignore[attr-defined,dict-item]


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise UserError(REFUSED.format(f"the codec {encoding}"))
    return text.encode("latin1")


ALLOWED = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _latin1,  # of all codecs, the one that older pickles keep bytes in
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
    ("numpy.core.multiarray", "scalar"): lambda dtype, content: dtype.read(content, ()),
    ("numpy.core.numeric", "_frombuffer"): lambda content, dtype, shape, order: dtype.read(content, shape, order),
}


def _load_pickle(path: Path) -> Any:
    try:
        return _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except UserError:
        raise
    except Exception as error:  # of any kind: bytes that mean something else fail anywhere
        raise UserError(f"is a damaged pickle, or not complete ({type(error).__name__})") from None


def _tensors(content: Any, size: float) -> dict[str, Tensor]:
    """The tensors of a state dict from a file of `size` bytes; of one that shows few bytes often, no more than a few times."""
    if not isinstance(content, dict) or not content:
        raise UserError("is not a state dict")
    tensors = {}
    for key, found in content.items():
        value = found.values if isinstance(found, _Array) else found
        if not isinstance(key, str) or not isinstance(value, Tensor | np.ndarray):
            raise UserError(f"is not a state dict: {str(key)[:40]!r} is no tensor but {type(value).__name__}")
        size -= value.nbytes / REPEATED
        if size < 0:
            raise UserError(f"is not a state dict: {key[:40]!r} and those before it claim more numbers than the file holds")
        tensors[key] = value if isinstance(value, Tensor) else torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))
    return tensors
