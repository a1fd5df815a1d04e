"""The door: any supported format in, `Annotations` out."""

from pathlib import Path

from retinanet.config import DatasetConfig
from retinanet.data.annotations import Annotations
from retinanet.data.coco import load_coco, report_odd_boxes
from retinanet.data.voc import load_voc
from retinanet.errors import UserError


def load_dataset(config: DatasetConfig) -> Annotations:
    """Reads the data set that a config's `data.train`, `data.val` or `data.test` names. Raises `UserError`."""
    if not Path(config.path).is_dir():
        raise UserError(f"data path {config.path} is not a folder")
    if config.format == "voc":
        annotations = load_voc(config.path, config.annotations)
    else:
        annotations = load_coco(config.annotations or "", config.path)
    report_odd_boxes(annotations)
    return annotations
