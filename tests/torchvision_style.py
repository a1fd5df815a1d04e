"""What a program has that was written for torchvision's detectors (its references/detection), and a small detector for it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from retinanet.anchors import AnchorGenerator
from retinanet.config import InputConfig
from retinanet.model import RetinaNet
from retinanet.structures import Category

GAPPED = (Category(3, "red"), Category(7, "green"), Category(90, "toothbrush"))  # ids with gaps, as COCO's are
INPUT = InputConfig(short_edge=64, long_edge=96)


def tiny_model() -> RetinaNet:
    """Random weights; the classifier's are large, so that some of its scores pass any threshold."""
    torch.manual_seed(1)
    anchors = AnchorGenerator([16, 32, 64, 128, 256], [1.0])
    model = RetinaNet(3, "resnet18", norm="batch", fpn_channels=32, head_convs=1, anchors=anchors)
    nn.init.normal_(model.cls_subnet.final.weight, std=0.5)
    nn.init.normal_(model.box_subnet.final.weight, std=0.05)
    return model.eval()


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Noise in blocks of 8 pixels: something for a network to answer to."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    return blocks.repeat(8, axis=0).repeat(8, axis=1)


def as_image(array: np.ndarray) -> Tensor:
    """[H, W, 3] uint8 to [3, H, W] float in 0..1, as torchvision's to_tensor does."""
    return torch.from_numpy(array).permute(2, 0, 1).contiguous() / 255


def truth(*boxes: tuple[float, ...], labels: tuple[int, ...] = (), **more: Any) -> dict[str, Tensor]:
    return {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.tensor(labels, dtype=torch.int64), **more}


class CocoImages:
    """What references/detection/coco_utils.py makes of a data set: images in 0..1, xyxy boxes clipped to them, COCO's ids.

    Crowds are kept, as `iscrowd`.
    """

    def __init__(self, folder: Path, annotations: Path) -> None:
        content = json.loads(annotations.read_text())
        self.folder, self.images = folder, content["images"]
        self.rows: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in self.images}
        for row in content["annotations"]:
            self.rows[row["image_id"]].append(row)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        from torchvision.transforms.functional import to_tensor

        entry = self.images[index]
        with Image.open(self.folder / entry["file_name"]) as file:
            image = to_tensor(file.convert("RGB"))
        rows = self.rows[entry["id"]]
        boxes = torch.tensor([row["bbox"] for row in rows], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes[:, 0::2].clamp_(min=0, max=entry["width"])
        boxes[:, 1::2].clamp_(min=0, max=entry["height"])
        target = {"boxes": boxes, "image_id": torch.tensor(entry["id"])}
        columns = {"labels": "category_id", "iscrowd": "iscrowd", "area": "area"}
        for key, name in columns.items():
            dtype = torch.float32 if key == "area" else torch.int64
            target[key] = torch.tensor([row[name] for row in rows], dtype=dtype)
        keep = (boxes[:, 3] > boxes[:, 1]) & (boxes[:, 2] > boxes[:, 0])
        return image, {key: value if key == "image_id" else value[keep] for key, value in target.items()}


def loader(data: CocoImages, *, batch_size: int, shuffle: bool) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    return DataLoader(data, batch_size, shuffle, generator=generator, collate_fn=lambda batch: tuple(zip(*batch, strict=True)))  # type: ignore[arg-type]


def train_steps(model: nn.Module, optimizer: torch.optim.Optimizer, data: DataLoader[Any], steps: int) -> list[float]:
    """references/detection/engine.py, train_one_epoch: as many steps of it, the warm-up included."""
    model.train()
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 1000, total_iters=min(5, len(data) - 1))
    values: list[float] = []
    while True:
        for images, targets in data:
            images = [image.to("cpu") for image in images]  # noqa: PLW2901
            targets = [{key: value.to("cpu") for key, value in target.items()} for target in targets]  # noqa: PLW2901
            losses = model(images, targets)
            total = sum(loss for loss in losses.values())
            assert isinstance(total, Tensor) and total.isfinite()
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            warmup.step()
            values.append(total.item())
            if len(values) == steps:
                return values


@torch.no_grad()
def cost(model: nn.Module, images: Any, targets: Any) -> float:
    return float(sum(model.train()(images, targets).values()))


@torch.inference_mode()
def evaluated(model: nn.Module, data: DataLoader[Any]) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """references/detection/engine.py, evaluate, up to the metrics: (target, output) of each image."""
    model.eval()
    pairs = []
    for images, targets in data:
        pairs += list(zip(targets, model(list(images)), strict=True))
    return pairs


def references_rows(pairs: list[tuple[dict[str, Tensor], dict[str, Tensor]]]) -> np.ndarray:
    """references/detection/coco_eval.py, prepare_for_coco_detection: labels are written as category ids."""
    rows = []
    for target, output in pairs:
        boxes = output["boxes"].clone()
        boxes[:, 2:] -= boxes[:, :2]
        for box, score, label in zip(boxes.tolist(), output["scores"].tolist(), output["labels"].tolist(), strict=True):
            rows.append([int(target["image_id"]), *box, score, label])
    return np.array(rows).reshape(-1, 7)
