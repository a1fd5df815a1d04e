"""torchvision's import, in a tenth of its time, and in one clear line where it was built for another torch."""

import sys
from importlib import import_module, metadata
from types import ModuleType
from typing import Any

from retinanet.errors import UserError

COMPILER = "torch._dynamo.utils"


class _Later(ModuleType):
    """In place of torch's compiler, of which torchvision takes one function, for roi_align: imports it when it is asked."""

    def is_compile_supported(self, device_type: str) -> bool:
        return import_compiler().is_compile_supported(device_type)  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # of the import system
            raise AttributeError(name)
        return getattr(import_compiler(), name)


def import_compiler() -> Any:
    """The real one."""
    if isinstance(sys.modules.get(COMPILER), _Later):
        del sys.modules[COMPILER]
    return import_module(COMPILER)


def import_torchvision() -> Any:
    """torchvision. Raises `UserError` with the versions and the cure when it was built for another torch.

    Its import brings torch's compiler along, which takes 1.4 of its 1.5 seconds: here that waits until it is used.
    """
    if "torchvision" not in sys.modules:
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
        if isinstance(sys.modules.get(COMPILER), _Later):
            del sys.modules[COMPILER]
