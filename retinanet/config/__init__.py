"""What a run depends on: the schema, and how a file and the command line become one.

A YAML file lists only what differs from the defaults. Keys are checked: an unknown one is an error that names near ones.
"""

from retinanet.config.load import config_for_inference as config_for_inference
from retinanet.config.load import differences as differences
from retinanet.config.load import load_config as load_config
from retinanet.config.load import parse_config as parse_config
from retinanet.config.load import save_config as save_config
from retinanet.config.load import scale_to_batch as scale_to_batch
from retinanet.config.load import set_key as set_key
from retinanet.config.load import split_settings as split_settings
from retinanet.config.schema import AnchorConfig as AnchorConfig
from retinanet.config.schema import AugmentConfig as AugmentConfig
from retinanet.config.schema import Backbone as Backbone
from retinanet.config.schema import Config as Config
from retinanet.config.schema import DataConfig as DataConfig
from retinanet.config.schema import DatasetConfig as DatasetConfig
from retinanet.config.schema import EvaluationConfig as EvaluationConfig
from retinanet.config.schema import InputConfig as InputConfig
from retinanet.config.schema import LossConfig as LossConfig
from retinanet.config.schema import ModelConfig as ModelConfig
from retinanet.config.schema import PostprocessConfig as PostprocessConfig
from retinanet.config.schema import TrainConfig as TrainConfig
