"""A trained detector on a data set: where its loss comes from, what its anchors are, and which negatives are the hardest."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from laboratory.anchors import KINDS, HardestNegatives, Imbalance, draw_negative, imbalance_chart
from laboratory.distribution import GAMMAS, LogitHistogram, distribution_chart, distribution_table
from retinanet.checkpoint import Checkpoint
from retinanet.criterion import build_criterion
from retinanet.data.annotations import Annotations
from retinanet.data.loader import evaluation_loader
from retinanet.data.transforms import Resize
from retinanet.data.workers import choose_workers
from retinanet.distributed import say
from retinanet.errors import UserError
from retinanet.evaluation.run import map_categories
from retinanet.inference import prepare
from retinanet.matcher import BACKGROUND, ATSSMatcher, Matcher
from retinanet.results import write_json
from retinanet.run_setup import load_splits
from retinanet.structures import Batch, Category
from retinanet.visualize import contact_sheet


@dataclass
class Findings:
    """What `examine` saw."""

    hardest: HardestNegatives
    negatives: LogitHistogram = field(default_factory=LogitHistogram)
    positives: LogitHistogram = field(default_factory=LogitHistogram)
    imbalance: Imbalance = field(default_factory=Imbalance)


def examine_weights(
    checkpoint: Checkpoint, device: torch.device, *, images: int, seed: int, hardest: int
) -> tuple[Findings, Annotations]:
    """`images` drawn from the data that `checkpoint.config` names (data.val, or as evaluation.split says), as validation sees
    them, in float32; with the annotations that the findings speak of."""
    config, split = checkpoint.config, checkpoint.config.evaluation.split
    (whole,) = load_splits(config, split)
    if whole is None:
        raise UserError(f"data.{split} is not set: name a CONFIG, or data.{split}.path=...")
    drawn = np.random.default_rng(seed).permutation(len(whole))[:images]
    annotations = as_the_model_counts(whole, checkpoint.categories).select(np.sort(drawn))
    say(f"{annotations.source}: {len(annotations)} of {len(whole)} images, {device}")
    model = checkpoint.build()
    resize = Resize(config.input.short_edge, config.input.long_edge, config.input.size_rounding)
    workers = choose_workers(config.data.workers, 1)
    batches = evaluation_loader(annotations, resize, config.evaluation.batch_size, workers, pin=device.type == "cuda")
    matcher = build_criterion(config.loss, model.anchor_generator.num_anchors).matcher
    return examine(prepare(model.to(device)), batches, matcher, device=device, hardest=hardest), annotations


def as_the_model_counts(annotations: Annotations, categories: tuple[Category, ...]) -> Annotations:
    """The same with the model's labels, matched by name; boxes of classes that it does not know are ignored, as crowds."""
    ids = map_categories(categories, annotations)
    label_of = np.array([ids.index(category.id) if category.id in ids else -1 for category in annotations.categories])
    labels = label_of[annotations.labels]
    return replace(annotations, labels=labels.clip(0), crowd=annotations.crowd | (labels < 0), categories=categories)


def examine(
    model: nn.Module, batches: Iterable[Batch], matcher: Matcher | ATSSMatcher, *, device: torch.device, hardest: int = 24
) -> Findings:
    """All anchors of all batches; of each batch only counts and a few anchors are kept."""
    findings = Findings(HardestNegatives(hardest))
    for loaded in tqdm(batches, "examine", leave=False, unit="batch"):
        batch = loaded.to(device)
        with torch.inference_mode():
            predictions = model(batch.images, batch.image_sizes)
            zooms = (batch.original_sizes.to(device) / batch.image_sizes).flip(1)  # [B, 2], (x, y)
            for n, (logits, target) in enumerate(zip(predictions.cls_logits, batch.targets, strict=True)):
                if not batch.readable[n]:
                    continue
                sizes = predictions.level_sizes
                matches = matcher(predictions.anchors, target.boxes, target.ignore_boxes, sizes)  # [R]
                own = (matches >= 0).nonzero().flatten()  # foreground
                findings.positives.add(-logits[own, target.labels[matches[own]]])
                findings.negatives.add(logits[matches == BACKGROUND])
                findings.imbalance.add(matches, sizes)
                findings.hardest.add(target.image_id, logits, predictions.anchors, matches, target.boxes, zooms[n])
        for fault in batch.faults:
            say(f"warning: left out: {fault}")
    return findings


def write_findings(folder: Path, findings: Findings, annotations: Annotations, *, about: str) -> None:
    """Prints the tables and writes what they say, with pictures, into `folder`."""
    positives, negatives, hardest = findings.positives, findings.negatives, findings.hardest.found
    print(f"\n{distribution_table(positives, negatives)}\n\nanchors in a mean image\n{findings.imbalance.table()}")
    names = [category.name for category in annotations.categories]
    content = {
        "about": about,
        "images": findings.imbalance.images,
        "negatives": negatives.figures(GAMMAS),
        "positives": positives.figures(GAMMAS),
        "anchors_per_image": {level: dict(zip(KINDS, row.tolist())) for level, row in findings.imbalance.rows().items()},
        "hardest_negatives": [one._asdict() | {"taken_for": names[one.label]} for one in hardest],
    }
    write_json(folder / "distribution.json", content)
    distribution_chart(folder / "distribution.png", positives, negatives, GAMMAS)
    imbalance_chart(folder / "anchors.png", findings.imbalance)
    written = ["distribution.json", "distribution.png", "anchors.png"]
    if hardest:
        written.append("hardest_negatives.jpg")
        pictures = [draw_negative(one, annotations) for one in hardest]
        Image.fromarray(contact_sheet(pictures)).save(folder / "hardest_negatives.jpg", quality=90)
    print(f"written in {folder}: {', '.join(written)}")
