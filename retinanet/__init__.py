"""RetinaNet: train, evaluate and run the one-stage detector of Lin et al. 2017.

The public names are resolved when they are first used (PEP 562), so that importing the package does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retinanet.config import load_config as load_config
    from retinanet.model import RetinaNet as RetinaNet
    from retinanet.predictor import Predictor as Predictor
    from retinanet.structures import Detections as Detections

__version__ = "0.1.0"

_HOMES = {
    "RetinaNet": "retinanet.model",
    "Predictor": "retinanet.predictor",
    "Detections": "retinanet.structures",
    "load_config": "retinanet.config",
}
__all__ = ["Detections", "Predictor", "RetinaNet", "load_config"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'retinanet' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
