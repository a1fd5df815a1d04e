"""What is learned in the same number of steps: by our trainer, and by torchvision's model in its reference loop, which gets the
same batches, optimizer, schedule, precision and averaging. Both are evaluated on data.val as they are after the last step.
A row for each seed.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.reference import evaluate_peer, initial_peer, load, train_peer
from benchmarks.timing import Options, Row
from retinanet.config import load_config
from retinanet.optimizer import EMA
from retinanet.precision import choose_precision
from retinanet.training import train

SHOWN = ("AP", "AP50", "AP75")


def measure(options: Options) -> list[Row]:
    rows = [_row(options, seed) for seed in range(options.rounds or 1)]
    for name in rows[0].differences:
        values = [row.differences[name] for row in rows]
        print(f"{name}: {np.mean(values):.1f}, deviation {np.std(values, ddof=1) if len(rows) > 1 else 0:.1f}")
    return rows


def _row(options: Options, seed: int) -> Row:
    row = Row("accuracy", f"{Path(str(options.config)).stem}, seed {seed}", "torchvision", "ours")
    overrides = (*options.overrides, f"seed={seed}")
    with tempfile.TemporaryDirectory() as folder:
        train(load_config(str(options.config), [*overrides, f"output_dir={folder}"]), device=options.device)
        ours = json.loads(Path(folder, "metrics.json").read_text(encoding="utf-8"))  # of the last step
    config, annotations, validation, steps, _ = load(options.config, overrides)
    precision = choose_precision(config.train.precision, torch.device(options.device))
    peer = initial_peer(config, options.device)
    average = EMA(peer, config.train.ema_decay) if config.train.ema_decay else None
    for step in train_peer(peer, config, annotations, steps, precision):
        if average is not None:
            average.update(peer, step)
    theirs = evaluate_peer(peer if average is None else average.model, config, validation, precision)
    for whose, metrics in (("our", ours), ("the peer's", theirs)):
        row.differences |= {f"{whose} {name}": 100 * (metrics[name] or 0.0) for name in SHOWN}
    return row
