"""torchvision's RetinaNet trained and evaluated on the same data, batches, steps, optimizer and schedule as a config of ours.

Model, anchors, matching, losses and post-processing are torchvision's, with the config's backbone and anchor sizes; the
batches come from this project's loader, so both see the same pixels.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FrozenBatchNorm2d
from tqdm import tqdm

from benchmarks.peer import build_peer
from retinanet.backbone import ResNetBackbone, load_backbone_weights
from retinanet.config import Config, load_config
from retinanet.data.annotations import Annotations
from retinanet.data.loader import DetectionDataset, evaluation_loader, train_loader
from retinanet.data.sampling import TrainSampler
from retinanet.data.transforms import Resize, build_augment
from retinanet.data.workers import choose_workers
from retinanet.errors import UserError
from retinanet.evaluation.coco import evaluate_rows
from retinanet.optimizer import build_optimizer, build_schedule
from retinanet.precision import autocast
from retinanet.results import to_rows
from retinanet.run_setup import load_data, run_length
from retinanet.structures import Batch, Detections


def load(file: str | None, overrides: Sequence[str]) -> tuple[Config, Annotations, Annotations, int, int]:
    """The config, its training and validation data, optimizer steps, and steps between validations."""
    config = load_config(str(file), list(overrides))
    annotations, validation = load_data(config)
    if validation is None:
        raise UserError(f"{file}: data.val is not set")
    return config, annotations, validation, *run_length(config, len(annotations))


def initial_peer(config: Config, device: str) -> RetinaNet:
    """torchvision's detector with the config's backbone, weights and anchors. Raises `UserError` for what it does not have."""
    if config.train.init_from or config.train.fit_anchors or config.train.patience or config.data.repeat_threshold:
        raise UserError("leave out train.init_from, fit_anchors and patience and data.repeat_threshold: only ours has them")
    settings, anchors = config.model, config.model.anchors
    torch.manual_seed(config.seed)
    peer = build_peer(
        settings.backbone,
        settings.num_classes or 1,
        FrozenBatchNorm2d if settings.norm == "frozen" else torch.nn.BatchNorm2d,
        trainable=5 - settings.freeze_stages,
        min_size=config.input.short_edge,
        max_size=config.input.long_edge,
        anchor_generator=AnchorGenerator(
            tuple(tuple(int(size * scale) for scale in anchors.scales) for size in anchors.sizes),
            (tuple(anchors.ratios),) * len(anchors.sizes),
        ),
        detections_per_img=config.postprocess.max_detections,
        _skip_resize=True,  # the loader has resized
    )
    if settings.backbone_weights != "none":
        ours = ResNetBackbone(settings.backbone, norm=settings.norm)
        load_backbone_weights(ours, settings.backbone, settings.backbone_weights)
        peer.backbone.body.load_state_dict(ours.state_dict())  # both have torchvision's names
    return peer.to(device).to(memory_format=torch.channels_last)


def peer_images(batch: Batch) -> list[Tensor]:
    """Unpadded float images in 0..1, as torchvision's model takes them."""
    return [image[:, :h, :w].float() / 255 for image, (h, w) in zip(batch.images, batch.image_sizes.tolist())]


def train_peer(peer: RetinaNet, config: Config, annotations: Annotations, steps: int, precision: str) -> Iterator[int]:
    """Trains, and yields after each step how many there were; the model may be evaluated in between."""
    device = next(peer.parameters()).device
    portrait = annotations.sizes[:, 0] > annotations.sizes[:, 1] if config.data.group_by_aspect else None
    batch_size, seed = config.train.batch_size, config.seed
    sampler = TrainSampler(len(annotations), batch_size, seed=seed, start_step=0, total_steps=steps, portrait=portrait)
    dataset = DetectionDataset(annotations, build_augment(config.augment, config.input), seed=seed)
    optimizer = build_optimizer(peer, config.train)
    schedule = build_schedule(optimizer, config.train, steps)
    loader = train_loader(dataset, sampler, choose_workers(config.data.workers, 1), pin=False)
    for step, loaded in enumerate(tqdm(loader, mininterval=20, desc="torchvision"), start=1):
        batch = loaded.to(device)
        peer.train()
        with autocast(precision, device):
            losses = peer(peer_images(batch), [{"boxes": t.boxes, "labels": t.labels} for t in batch.targets])
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), config.train.clip_grad_norm or float("inf"))
        optimizer.step()
        schedule.step()
        yield step


@torch.inference_mode()
def evaluate_peer(peer: torch.nn.Module, config: Config, annotations: Annotations, precision: str) -> dict[str, Any]:
    """COCO metrics, as `evaluate_rows` gives them."""
    peer.eval()
    device = next(peer.parameters()).device
    rows = [np.empty((0, 7))]
    resize = Resize(config.input.short_edge, config.input.long_edge)
    for loaded in evaluation_loader(annotations, resize, config.evaluation.batch_size, 1):
        batch = loaded.to(device)
        with autocast(precision, device):
            results = peer(peer_images(batch))
        for result, target, size, original in zip(results, batch.targets, batch.image_sizes, batch.original_sizes):
            scale = (original / size.cpu()).flip(0).repeat(2)
            found = Detections(result["boxes"].float().cpu() * scale, result["scores"].float(), result["labels"])
            rows.append(to_rows(target.image_id, found.cpu(), [c.id for c in annotations.categories]))
    return evaluate_rows(np.concatenate(rows), annotations)
