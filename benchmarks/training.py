"""A training step: torchvision's model in its reference loop, and ours as it comes. Same weights; all images have the same
boxes, since torchvision divides the losses by each image's foreground and ours by the batch's.
"""

import itertools
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.peer import draw_picture, image_size, our_checkpoint, peer_detector, peers_of
from benchmarks.timing import Case, Options
from retinanet.config import Config, TrainConfig
from retinanet.data.loader import Sample, collate
from retinanet.learner import Learner
from retinanet.precision import choose_precision
from retinanet.structures import Target
from retinanet.weights.layout import COCO_CATEGORIES

ROUNDS = 5
BATCH = {"cpu": 2, "cuda": 16}
BOXES = 7  # as many as COCO's images have on average
RATE = 1e-4  # of SGD; the weights shall stay where they are
DEFAULTS = {"cpu": (("resnet50", 512), ("resnet50", 800), ("resnet18", 512)), "cuda": (("resnet50", 800),)}
Step = Callable[[], float]  # returns the loss


def cases(options: Options) -> list[Case]:
    chosen = DEFAULTS[torch.device(options.device).type]
    if options.backbone or options.sizes:
        chosen = tuple((options.backbone or "resnet50", size) for size in options.sizes or (800,))
    return [_case(backbone, size, options.device) for backbone, size in chosen]


def draw_target(size: tuple[int, int], classes: int) -> Target:
    """`BOXES` boxes of all sizes inside the image."""
    rng = np.random.default_rng(0)
    sides = rng.uniform(0.1, 0.6, (BOXES, 2)) * size[::-1]
    corners = rng.uniform(0, 1, (BOXES, 2)) * (size[::-1] - sides)
    boxes = torch.tensor(np.concatenate([corners, corners + sides], axis=1), dtype=torch.float32)
    return Target(boxes, torch.from_numpy(rng.integers(0, classes, BOXES)), torch.zeros(0, 4))


def _case(backbone: str, size: int, device: str) -> Case:
    height, width = image_size(size)
    count, precision = BATCH[torch.device(device).type], choose_precision("auto", torch.device(device))
    target = draw_target((height, width), len(COCO_CATEGORIES))
    pictures = [draw_picture((height, width), seed) for seed in range(count)]
    batch = collate([Sample(picture, target, (height, width), "", []) for picture in pictures])

    def peer(fast: bool) -> Step:
        model = peer_detector(backbone, size, device, fast=fast).train()
        ids = torch.tensor([category.id for category in COCO_CATEGORIES])
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], RATE, momentum=0.9, weight_decay=1e-4)

        def step() -> float:  # references/detection/engine.py, train_one_epoch
            images = [image[:, :height, :width].to(device).float() / 255 for image in batch.images]
            targets = [{"boxes": t.boxes.to(device), "labels": ids[t.labels].to(device)} for t in batch.targets]
            losses = sum(model(images, targets).values())
            value = losses.item()
            optimizer.zero_grad()
            losses.backward()
            optimizer.step()
            return value

        return step

    def ours() -> Step:
        checkpoint = our_checkpoint(backbone, size)
        config = Config(model=checkpoint.config.model, train=TrainConfig(learning_rate=RATE, warmup_steps=0))
        learner = Learner(checkpoint.build(), config, torch.device(device), total_steps=10**6)
        learner.forward.train()
        numbers = itertools.count(1)

        def step() -> float:
            result = learner.step(batch.to(learner.device), next(numbers))
            return result.loss_cls + result.loss_box

        return step

    name = f"ours {precision}"
    peers = {peer_name: lambda fast=fast: peer(fast) for peer_name, fast in peers_of(device).items()}
    return Case(
        f"{backbone} {size} px, batch {count}",
        {**peers, name: ours},
        lambda theirs, own: {"loss": own, "its relative difference": abs(own - theirs) / theirs},
        peers=len(peers),
        images=count,
        dtypes={name: precision},
        flop_of=name,
        bytes=batch.images.nbytes,
    )
