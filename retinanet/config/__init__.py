"""What a run depends on: the schema, and how a file and the command line become one.

A YAML file lists only what differs from the defaults. Keys are checked: an unknown one is an error that names near ones.
"""

from retinanet.config.load import (
    config_for_inference,
    differences,
    load_config,
    parse_config,
    save_config,
    scale_to_batch,
)
from retinanet.config.schema import (
    AnchorConfig,
    AugmentConfig,
    Backbone,
    Config,
    DataConfig,
    DatasetConfig,
    EvaluationConfig,
    InputConfig,
    LossConfig,
    ModelConfig,
    PostprocessConfig,
    TrainConfig,
)

__all__ = [
    "AnchorConfig",
    "AugmentConfig",
    "Backbone",
    "Config",
    "DataConfig",
    "DatasetConfig",
    "EvaluationConfig",
    "InputConfig",
    "LossConfig",
    "ModelConfig",
    "PostprocessConfig",
    "TrainConfig",
    "config_for_inference",
    "differences",
    "load_config",
    "parse_config",
    "save_config",
    "scale_to_batch",
]
