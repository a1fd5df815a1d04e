"""torchvision's RetinaNet on the same data, batches, steps, optimizer and schedule as a config of ours.

    python benchmarks/torchvision_baseline.py configs/demo.yaml [key.sub=value ...]

Model, anchors, matching, losses and post-processing are torchvision's, with the config's backbone and anchor sizes; the
batches come from this project's loader, so both see the same pixels. Prints COCO metrics on the validation data, or on
data.test with evaluation.split=test.
"""

import argparse
import sys
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from tqdm import tqdm

from retinanet.config import Config, load_config
from retinanet.data.annotations import Annotations
from retinanet.data.formats import load_dataset
from retinanet.data.loader import DetectionDataset, TrainSampler, choose_workers, evaluation_loader, train_loader
from retinanet.data.transforms import Resize, build_augment
from retinanet.evaluation.coco import evaluate_rows, metrics_table
from retinanet.optimizer import EMA, build_optimizer, build_schedule
from retinanet.precision import autocast, choose_precision
from retinanet.results import to_rows
from retinanet.run_setup import load_data, run_length
from retinanet.structures import Batch, Detections

CPU = torch.device("cpu")


def build_peer(config: Config) -> RetinaNet:
    """torchvision's detector as its own builder makes it, with the config's backbone, weights and anchor sizes."""
    anchors = config.model.anchors
    norm: Any = FrozenBatchNorm2d if config.model.norm == "frozen" else torch.nn.BatchNorm2d
    backbone = resnet_fpn_backbone(
        backbone_name=config.model.backbone,
        weights=None,
        norm_layer=norm,
        trainable_layers=5 - config.model.freeze_stages,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    if config.model.backbone_weights != "none":
        state = torch.load(config.model.backbone_weights, weights_only=True)
        backbone.body.load_state_dict({k: v for k, v in state.items() if k in backbone.body.state_dict()})
    return RetinaNet(
        backbone,
        num_classes=config.model.num_classes,
        min_size=config.input.short_edge,
        max_size=config.input.long_edge,
        anchor_generator=AnchorGenerator(
            tuple(tuple(int(size * scale) for scale in anchors.scales) for size in anchors.sizes),
            (tuple(anchors.ratios),) * len(anchors.sizes),
        ),
        detections_per_img=config.postprocess.max_detections,
        _skip_resize=True,  # in training: the loader has resized
    ).to(memory_format=torch.channels_last)


def peer_images(batch: Batch) -> list[Tensor]:
    """Unpadded float images in 0..1, as torchvision's model takes them."""
    return [image[:, :h, :w].float() / 255 for image, (h, w) in zip(batch.images, batch.image_sizes.tolist())]


def train_peer(
    peer: RetinaNet, config: Config, annotations: Annotations, steps: int, precision: str, average: EMA | None = None
) -> None:
    """With `average` the weights are averaged too, as `train.ema_decay` does for ours."""
    sampler = TrainSampler(
        len(annotations),
        config.train.batch_size,
        seed=config.seed,
        start_step=0,
        total_steps=steps,
        portrait=annotations.sizes[:, 0] > annotations.sizes[:, 1] if config.data.group_by_aspect else None,
    )
    dataset = DetectionDataset(annotations, build_augment(config.augment, config.input), seed=config.seed)
    optimizer = build_optimizer(peer, config.train)
    schedule = build_schedule(optimizer, config.train, steps)
    peer.train()
    loader = train_loader(dataset, sampler, choose_workers(config.data.workers, 1), pin=False)
    for batch in tqdm(loader, mininterval=20, desc="torchvision"):
        images = peer_images(batch)
        targets = [{"boxes": t.boxes, "labels": t.labels} for t in batch.targets]
        with autocast(precision, CPU):
            losses = peer(images, targets)
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), config.train.clip_grad_norm or float("inf"))
        optimizer.step()
        schedule.step()
        if average is not None:
            average.update(peer, schedule.last_epoch)


@torch.inference_mode()
def evaluate_peer(peer: RetinaNet, config: Config, annotations: Annotations, precision: str) -> dict[str, Any]:
    peer.eval()
    rows = [np.empty((0, 7))]
    resize = Resize(config.input.short_edge, config.input.long_edge)
    for batch in evaluation_loader(annotations, resize, config.evaluation.batch_size, 1):
        with autocast(precision, CPU):
            results = peer(peer_images(batch))
        for result, target, size, original in zip(results, batch.targets, batch.image_sizes, batch.original_sizes):
            scale = (original / size).flip(0).repeat(2)
            found = Detections(result["boxes"].float() * scale, result["scores"].float(), result["labels"])
            rows.append(to_rows(target.image_id, found, [c.id for c in annotations.categories]))
    return evaluate_rows(np.concatenate(rows), annotations)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    args = parser.parse_args()
    config = load_config(args.config, args.overrides)
    annotations, validation = load_data(config)
    steps, _ = run_length(config, len(annotations))
    precision = choose_precision(config.train.precision, CPU)
    torch.manual_seed(config.seed)
    peer = build_peer(config)
    start = time.perf_counter()
    train_peer(peer, config, annotations, steps, precision)
    print(f"torchvision: {steps} steps in {(time.perf_counter() - start) / 60:.1f} minutes, {precision}")
    truth = load_dataset(config.data.test) if config.evaluation.split == "test" and config.data.test else validation
    print(metrics_table(evaluate_peer(peer, config, truth, precision)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
