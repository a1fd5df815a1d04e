"""Fine-tunes this project's detector and torchvision's RetinaNet alike, with several seeds, and compares their test AP.

    python benchmarks/finetune_vs_torchvision.py configs/bccd.yaml --seeds 3 model.backbone_weights=resnet18.pth

Both have the config's backbone and its weights, the same batches in the same order, the same number of steps, optimizer,
schedule and averaging, and are measured on data.test as they are after the last step. Ours is what `tools/train.py` makes of
the config, torchvision's is `torchvision_baseline.py`. Nothing is written to a run's own place: --out is for that.
"""

import argparse
import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision_baseline import CPU, build_peer, evaluate_peer, train_peer

from retinanet.checkpoint import load_checkpoint
from retinanet.config import Config, load_config
from retinanet.data.annotations import Annotations
from retinanet.errors import UserError, command_line
from retinanet.evaluation.run import evaluate_model
from retinanet.optimizer import EMA
from retinanet.postprocess import build_postprocessor
from retinanet.precision import choose_precision
from retinanet.run_setup import load_data, load_splits, run_length
from retinanet.training import train

SHOWN = ("AP", "AP50", "AP75")


def ours(config: Config, truth: Annotations, precision: str) -> dict[str, Any]:
    train(config, device="cpu")
    checkpoint = load_checkpoint(Path(str(config.output_dir)) / "last.pt")
    return evaluate_model(
        checkpoint.build(),
        truth,
        build_postprocessor(checkpoint.config.postprocess, checkpoint.categories),
        checkpoint.config.input,
        device=CPU,
        precision=precision,
        batch_size=config.evaluation.batch_size,
        workers=1,
    ).metrics


def torchvisions(config: Config, truth: Annotations, precision: str) -> dict[str, Any]:
    annotations, _ = load_data(config)
    steps, _ = run_length(config, len(annotations))
    torch.manual_seed(config.seed)
    peer = build_peer(config)
    average = EMA(peer, config.train.ema_decay) if config.train.ema_decay else None
    train_peer(peer, config, annotations, steps, precision, average)
    return evaluate_peer(average.model if average is not None else peer, config, truth, precision)  # type: ignore[arg-type]


@command_line
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/finetune_vs_torchvision"))
    args = parser.parse_intermixed_args()
    found: dict[str, list[list[float]]] = {"ours": [], "torchvision": []}
    for seed in range(args.seeds):
        config = load_config(args.config, [*args.overrides, f"seed={seed}", f"output_dir={args.out / str(seed)}"])
        if config.train.init_from or config.train.fit_anchors or config.train.patience or config.data.repeat_threshold:
            raise UserError("leave out train.init_from, fit_anchors and patience and data.repeat_threshold: only ours has them")
        (truth,) = load_splits(config, "test")
        if truth is None:
            raise UserError("data.test is not set")
        precision = choose_precision(config.train.precision, CPU)
        for name, measure in (("ours", ours), ("torchvision", torchvisions)):
            metrics = measure(copy.deepcopy(config), truth, precision)  # a run settles some of its settings
            found[name].append([100 * (metrics[key] or 0.0) for key in SHOWN])
            print(f"seed {seed}, {name}: " + "  ".join(f"{k} {v:.1f}" for k, v in zip(SHOWN, found[name][-1])), flush=True)
    for name, rows in found.items():
        values = np.array(rows)  # [seeds, 3]
        spread = values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(len(SHOWN))
        text = "  ".join(f"{k} {mean:.1f} +- {s:.1f}" for k, mean, s in zip(SHOWN, values.mean(axis=0), spread))
        print(f"{name}, mean and deviation of {len(rows)} seed(s): {text}")
    return 0


if __name__ == "__main__":
    main()
