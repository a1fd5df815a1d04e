"""Matching, focal loss and box loss with their gradients, from fixed head outputs: torchvision's `compute_loss`, and ours."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet

from benchmarks.peer import image_size
from benchmarks.timing import Case, Options
from benchmarks.training import draw_target
from retinanet.anchors import STRIDES, AnchorGenerator
from retinanet.criterion import RetinaNetLoss
from retinanet.structures import Predictions

ROUNDS = 9
BATCH, CLASSES = 2, 80


class Losses(NamedTuple):
    loss_cls: float
    loss_box: float
    gradients: tuple[Tensor, ...]  # by logits and by deltas


def cases(options: Options) -> list[Case]:
    return [_case(size, options.device) for size in options.sizes or (800,)]


def bare_peer() -> RetinaNet:
    """torchvision's detector for its losses and post-processing: with hardly a network."""
    nothing = nn.Identity()
    nothing.out_channels = 8  # type: ignore[assignment]
    return RetinaNet(nothing, CLASSES)


def level_anchors(size: tuple[int, int], device: str) -> list[Tensor]:
    """Of each level, [r, 4], for an image padded to multiples of 32."""
    height, width = (-(-side // 32) * 32 for side in size)
    grids = [(-(-height // stride), -(-width // stride)) for stride in STRIDES]
    generator = AnchorGenerator()
    return list(generator(grids).to(device).split([h * w * generator.num_anchors for h, w in grids]))


def _case(size: int, device: str) -> Case:
    levels = level_anchors(image_size(size), device)
    anchors = torch.cat(levels)
    target = draw_target(image_size(size), CLASSES).to(torch.device(device))
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(BATCH, len(anchors), CLASSES, generator=random).sub_(4.6).to(device).requires_grad_()
    deltas = torch.randn(BATCH, len(anchors), 4, generator=random).mul_(0.2).to(device).requires_grad_()

    def evaluated(loss: Callable[[], dict[str, Tensor]]) -> Callable[[], Losses]:
        def call() -> Losses:
            loss_cls, loss_box = loss().values()
            gradients = torch.autograd.grad(loss_cls + loss_box, (logits, deltas))
            return Losses(loss_cls.item(), loss_box.item(), gradients)

        return call

    def peer() -> Callable[[], Losses]:
        model, targets = bare_peer(), [{"boxes": target.boxes, "labels": target.labels}] * BATCH
        outputs = {"cls_logits": logits, "bbox_regression": deltas}
        return evaluated(lambda: model.compute_loss(targets, outputs, [anchors] * BATCH))

    def ours() -> Callable[[], Losses]:
        criterion = RetinaNetLoss()
        predictions = Predictions(logits, deltas, anchors, [len(level) for level in levels])
        return evaluated(lambda: criterion(predictions, [target] * BATCH))

    least = 2 * (logits.nbytes + deltas.nbytes)  # read, and as gradient written
    name = f"{size} px, batch {BATCH}, {CLASSES} classes"
    return Case(name, {"torchvision": peer, "ours": ours}, _compare, bytes=least)


def _compare(peer: Losses, ours: Losses) -> dict[str, float]:
    """Relative differences of the losses; of the gradients the largest one, as it is and beside the largest gradient."""
    return {
        "loss_cls": abs(ours.loss_cls - peer.loss_cls) / peer.loss_cls,
        "loss_box": abs(ours.loss_box - peer.loss_box) / peer.loss_box,
        "gradients": max(float((a - b).abs().max()) for a, b in zip(peer.gradients, ours.gradients)),
        "of at most": max(float(gradient.abs().max()) for gradient in peer.gradients),
    }
