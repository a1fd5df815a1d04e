"""Memory of a training's processes by the size of the data set: reading only, no model; `WORKERS` workers, `EPOCHS` epochs.

The peer is torchvision's `CocoDetection`, a data set of pycocotools' dicts; ours the packed arrays. Counted is what the main
process and its workers hold together (PSS: shared pages once), because it grows while workers write to what they shared.
"""

import json
import multiprocessing
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from benchmarks.evaluation import PER_IMAGE, PIXELS, draw_truth
from benchmarks.timing import Options, Row
from retinanet.data.coco import load_coco
from retinanet.data.loader import DetectionDataset, train_loader
from retinanet.data.sampling import TrainSampler
from retinanet.data.transforms import Augment

ANNOTATIONS = (36_000, 860_000)  # COCO's val2017 and train2017
WORKERS, EPOCHS, BATCH = 4, 3, 16
READINGS = 20  # of memory, in an epoch
SHRUNK = 10  # sides of images and boxes are divided by it, for quick decoding


def measure(options: Options) -> list[Row]:
    return [_row(count) for count in options.sizes or ANNOTATIONS]


def _row(count: int) -> Row:
    print(f"memory: {count} annotations", flush=True)
    images = max(1, round(count / PER_IMAGE))
    with tempfile.TemporaryDirectory() as folder:
        draw_coco(Path(folder), images, count)
        found = {}
        for name, build in {"pycocotools": peer_batches, "ours": our_batches}.items():
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                found[name] = pool.submit(peaks_of_epochs, build, Path(folder), images).result()
    row = Row("memory", f"{count} annotations, {WORKERS} workers, {EPOCHS} epochs", "pycocotools", "ours")
    row.peer_mib, row.mib = (max(found[name]) for name in ("pycocotools", "ours"))
    row.differences = {f"{name}, grown after epoch 1": found[name][-1] - found[name][0] for name in found}
    return row


def draw_coco(folder: Path, images: int, count: int) -> None:
    """annotations.json in `folder`, whose images are all the same small JPEG."""
    truth = draw_truth(images, count)
    truth.sizes //= SHRUNK
    truth.coco_boxes = (truth.coco_boxes / SHRUNK).round(2)
    (folder / "annotations.json").write_text(json.dumps(truth.to_coco()), encoding="utf-8")
    Image.new("RGB", (PIXELS[1] // SHRUNK, PIXELS[0] // SHRUNK), "grey").save(folder / "image.jpg")


def peer_batches(folder: Path, images: int) -> Iterable[Any]:
    from torchvision.datasets import CocoDetection

    dataset = CocoDetection(str(folder), str(folder / "annotations.json"), transforms=_to_tensors)
    loader: DataLoader[Any] = DataLoader(dataset, BATCH, shuffle=True, num_workers=WORKERS, collate_fn=list)
    return (batch for _ in range(EPOCHS) for batch in loader)


def _to_tensors(image: Image.Image, annotations: list[dict[str, Any]]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What the reference's ConvertCocoPolysToMask makes of an image and its boxes."""
    from torchvision.transforms.functional import pil_to_tensor

    boxes = torch.tensor([annotation["bbox"] for annotation in annotations]).reshape(-1, 4)
    return pil_to_tensor(image), {"boxes": boxes, "labels": torch.tensor([a["category_id"] for a in annotations])}


def our_batches(folder: Path, images: int) -> Iterable[Any]:
    annotations = load_coco(folder / "annotations.json", folder)
    sampler = TrainSampler(images, BATCH, seed=0, start_step=0, total_steps=EPOCHS * -(-images // BATCH))
    dataset = DetectionDataset(annotations, Augment([], [PIXELS[0] // SHRUNK], PIXELS[1] // SHRUNK))
    return train_loader(dataset, sampler, WORKERS, pin=False)


def peaks_of_epochs(build: Callable[[Path, int], Iterable[Any]], folder: Path, images: int) -> list[float]:
    """The largest MiB of each epoch, held by this process and its workers together."""
    multiprocessing.set_start_method(None, force=True)  # the workers begin as in any training, not as this process did
    batches = -(-images // BATCH)
    every = max(1, batches // READINGS)
    peaks = [0.0] * EPOCHS
    for number, _ in enumerate(tqdm(build(folder, images), build.__name__, EPOCHS * batches, leave=False, disable=None)):
        epoch, position = divmod(number, batches)
        if position % every == 0:
            pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children() if child.pid is not None)]
            peaks[epoch] = max(peaks[epoch], sum(map(_proportional_mib, pids)))
    return peaks


def _proportional_mib(pid: int) -> float:
    """Linux's PSS: a page that several processes share counts in parts; 0 for a process that has just ended."""
    try:
        found = re.findall(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii"), re.MULTILINE)
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return int(found[0]) / 1024 if found else 0.0
