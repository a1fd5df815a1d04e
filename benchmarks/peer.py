"""torchvision's RetinaNet as the peer: with random weights that detect something, and the same weights as ours."""

import functools
import math
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from retinanet.boxes import pairwise_iou
from retinanet.checkpoint import Checkpoint
from retinanet.structures import Detections
from retinanet.weights.layout import COCO_CATEGORIES, UNUSED_COCO_IDS
from retinanet.weights.torchvision import import_torchvision_state

SLOTS = 91  # COCO's category ids and background
PASSING = 1e-4  # share of all scores above the threshold of 0.05: some hundred detections at 800 pixels
SAME = 0.01  # pixels between the corners of boxes that are the same whatever their size
CALIBRATION = 256  # pixels of the short side: statistics need no more


def image_size(short: int) -> tuple[int, int]:
    """(height, width) of a landscape picture, 4:3."""
    return short, short * 4 // 3


def draw_picture(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """RGB uint8 [height, width, 3] that is as hard to compress as a photograph: clouds of all sizes, and some noise."""
    rng = np.random.default_rng(seed)
    picture = np.zeros((*size, 3), np.float32)
    for cells in (4, 16, 64):
        clouds = rng.normal(0, 60 / math.log2(cells), (cells, cells, 3)).astype(np.float32)
        picture += cv2.resize(clouds, size[::-1], interpolation=cv2.INTER_CUBIC)
    return (picture + 120 + rng.normal(0, 3, picture.shape)).clip(0, 255).astype(np.uint8)


def build_peer(backbone: str, num_classes: int, norm: type[nn.Module], *, trainable: int = 3, **options: Any) -> RetinaNet:
    """As torchvision's own builder, which knows ResNet-50 only, makes it for trained weights."""
    levels = {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256)}
    body = resnet_fpn_backbone(backbone_name=backbone, weights=None, norm_layer=norm, trainable_layers=trainable, **levels)
    return RetinaNet(body, num_classes, **options)


@functools.cache
def lively_state(backbone: str, size: int) -> dict[str, Tensor]:
    """Random weights with statistics that fit, under which activations keep their size and a few scores pass."""
    torch.manual_seed(0)
    small = min(size, CALIBRATION)
    model = build_peer(backbone, SLOTS, nn.BatchNorm2d, min_size=small, max_size=2 * small)
    picture = torch.from_numpy(draw_picture(image_size(small))).permute(2, 0, 1) / 255
    batch, _ = model.transform([picture])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the statistics become those of one forward
    heads = model.head.classification_head, model.head.regression_head
    with torch.no_grad():
        model.backbone(batch.tensors)
        levels = list(model.eval().backbone(batch.tensors).values())
        for head, final, spread in ((heads[0], heads[0].cls_logits, 1.0), (heads[1], heads[1].bbox_reg, 0.2)):
            for layer in head.conv.modules():
                if isinstance(layer, nn.Conv2d):
                    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            final.bias.zero_()
            out = torch.cat([final(head.conv(level)).flatten() for level in levels])
            final.weight.mul_(spread / out.std())
            if head is heads[0]:
                best = out.mul_(spread / out.std()).topk(math.ceil(len(out) * PASSING) + 1).values
                limit = best[-2:].mean()  # between two scores, so that rounding decides about none
                final.bias.fill_(-math.log(19) - float(limit))  # the logit of 0.05
                final.bias.view(-1, SLOTS)[:, list(UNUSED_COCO_IDS)] = -20.0  # slots that ours does not have
    return {name: value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")}


def peer_detector(backbone: str, size: int, device: str, *, fast: bool = False) -> RetinaNet:
    """torchvision's, for pictures whose short side is `size`; as it comes, or `fast`: with bf16, NHWC and torch.compile."""
    model = build_peer(backbone, SLOTS, FrozenBatchNorm2d, min_size=size, max_size=2 * size)
    model.load_state_dict(lively_state(backbone, size))
    if fast:
        model.to(memory_format=torch.channels_last)
        for part in (model.backbone, model.head):
            _hurry(part, torch.device(device).type)
    return model.to(device)


def _hurry(part: nn.Module, device: str) -> None:
    """The network alone: anchors, losses and boxes would be off by pixels in bf16, and fall into many compiled pieces."""
    forward = part.forward

    def hurried(features: Any) -> dict[str, Tensor]:
        with torch.autocast(device, torch.bfloat16):
            outputs = forward(features)
        return {name: value.float() for name, value in outputs.items()}

    part.forward = hurried
    part.compile()


def peers_of(device: str) -> dict[str, bool]:
    """The peers by name, and whether they are `fast`. On a CPU, which gains nothing by torch.compile, it is as it comes."""
    names = {"torchvision fp32": False}
    return names | {"torchvision bf16 NHWC compiled": True} if torch.device(device).type == "cuda" else names


def our_checkpoint(backbone: str, size: int) -> Checkpoint:
    """Ours, with the same weights, geometry and thresholds."""
    checkpoint = import_torchvision_state(lively_state(backbone, size)).checkpoint()
    checkpoint.config.input.short_edge, checkpoint.config.input.long_edge = size, 2 * size
    return checkpoint


def peer_detections(result: dict[str, Tensor]) -> Detections:
    """torchvision's, with labels in our numbering."""
    label_of = {category.id: label for label, category in enumerate(COCO_CATEGORIES)}
    labels = torch.tensor([label_of[number] for number in result["labels"].tolist()], dtype=torch.int64)
    return Detections(result["boxes"].cpu(), result["scores"].cpu(), labels)


def matched(peer: Detections, ours: Detections, iou: float = 0.9, score: float = 0.05) -> dict[str, float]:
    """How many of the peer's detections are among ours: same label, nearly the same box and score, each counted once."""
    free = torch.ones(len(ours), dtype=torch.bool)
    differences = []
    for box, value, label in zip(peer.boxes, peer.scores, peer.labels):
        overlap = pairwise_iou(box[None], ours.boxes)[0]
        gap = (ours.scores - value).abs()
        alike = (overlap >= iou) | ((ours.boxes - box).abs().amax(1) <= SAME)  # a box without area has no overlap
        good = free & (ours.labels == label) & alike & (gap <= score)
        if good.any():
            best = int(torch.where(good, gap, torch.inf).argmin())
            free[best] = False
            differences.append(float(gap[best]))
    found = {"matched": len(differences), "of": max(len(peer), len(ours))}
    return found | {"score differs by": max(differences, default=0.0)}
