"""Other projects' files to state dicts: torch's archives, its older pickles, and detectron2's pickles of numpy arrays.

Nothing in a file is executed: unpicklers build tensors, arrays and plain data, and refuse whatever else is asked for.
"""

import io
import pickle
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from retinanet.errors import UserError

ZIP = b"PK\x03\x04"  # torch.save since 1.6
LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before that: a pickled number comes first
PICKLE = b"\x80"
REFUSED = "is no pickle of plain arrays (it asks for {}); nothing in it was executed"
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
        return _tensors(content)
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


class _ArraysOnly(pickle.Unpickler):
    """Builds dicts, lists, strings, numbers and numpy arrays, and calls nothing else."""

    ALLOWED = {("collections", "OrderedDict"), ("numpy", "ndarray"), ("numpy", "dtype")} | {
        (f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return _latin1  # of all codecs, the one that older pickles keep bytes in
        if name == "_frombuffer" and module in ("numpy.core.numeric", "numpy._core.numeric"):
            return _from_buffer
        if (module, name) not in self.ALLOWED:
            raise UserError(REFUSED.format(f"{module}.{name}"))
        return super().find_class(module, name)


def _from_buffer(content: bytes, dtype: np.dtype, shape: tuple[int, ...], order: Literal["C", "F"]) -> np.ndarray:
    """numpy's own, which is private: how newer pickles keep arrays."""
    return np.frombuffer(content, dtype).reshape(shape, order=order)


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise UserError(REFUSED.format(f"the codec {encoding}"))
    return text.encode("latin1")


def _load_pickle(path: Path) -> Any:
    try:
        return _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except UserError:
        raise
    except Exception as error:  # of any kind: bytes that mean something else fail anywhere
        raise UserError(f"is a damaged pickle, or not complete ({type(error).__name__})") from None


def _tensors(content: Any) -> dict[str, Tensor]:
    if not isinstance(content, dict) or not content:
        raise UserError("is not a state dict")
    tensors = {}
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor | np.ndarray | np.generic):
            raise UserError(f"is not a state dict: {str(key)[:40]!r} is no tensor but {type(value).__name__}")
        tensors[key] = value if isinstance(value, Tensor) else _from_array(key, value)
    return tensors


def _from_array(key: str, array: np.ndarray | np.generic) -> Tensor:
    try:
        return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))
    except (TypeError, ValueError):
        raise UserError(f"is not a state dict: {key} is an array of {array.dtype}") from None
