"""torchvision without torch's compiler, and in one clear line where it was built for another torch."""

import os
import sys
from importlib import import_module, metadata
from threading import Lock
from types import ModuleType
from typing import Any

from retinanet.errors import UserError

COMPILER = "torch._dynamo.utils"
LOCK = Lock()  # of its place in sys.modules


def is_compile_supported(device_type: str) -> bool:
    """The one function of the compiler that torchvision takes, for its roi_align."""
    return _compiler().is_compile_supported(device_type)  # type: ignore[no-any-return]


is_compile_supported._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler.assume_constant_result


class _Later(ModuleType):
    """In the compiler's place, which is imported when anything of it is asked for."""

    is_compile_supported = staticmethod(is_compile_supported)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # of the import system
            raise AttributeError(name)
        return getattr(_compiler(), name)


def _compiler() -> Any:
    _make_way()
    return import_module(COMPILER)


def _make_way() -> None:
    with LOCK:
        if isinstance(sys.modules.get(COMPILER), _Later):
            del sys.modules[COMPILER]


def import_torchvision() -> Any:
    """torchvision. Raises `UserError` with the versions and the cure when it was built for another torch.

    Its import brings torch's compiler along, which takes most of its 1.5 seconds: here that waits until it is used. Not so
    in one of several ranks: DDP takes it too, and then it must be there before the group (see `process_group`).
    """
    if "torchvision" not in sys.modules and os.environ.get("WORLD_SIZE", "1") == "1":
        sys.modules.setdefault(COMPILER, _Later(COMPILER))
    try:
        return import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):  # operator torchvision::nms does not exist
            raise
        versions = " and ".join(f"{name} {metadata.version(name)}" for name in ("torch", "torchvision"))
        raise UserError(
            f"{versions} are not built for each other ({error}); mend it with: pip install --upgrade torch torchvision"
        ) from None
    finally:
        _make_way()
