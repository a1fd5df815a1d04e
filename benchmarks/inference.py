"""Pictures to detections, end to end, from uint8 arrays: torchvision's detector, and ours with the same weights."""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from benchmarks.peer import draw_picture, image_size, matched, our_checkpoint, peer_detections, peer_detector, peers_of
from benchmarks.timing import Case, Options
from retinanet.checkpoint import save_checkpoint
from retinanet.errors import UserError
from retinanet.precision import choose_precision
from retinanet.predictor import Predictor
from retinanet.structures import Detections

ROUNDS = 9
SCORE = 0.05  # torchvision reports all above it
CALIBRATION = 24  # pictures that int8 is fitted to
BATCHES = {"cpu": (1,), "cuda": (1, 16)}
EXPORT = Path(__file__).parent.parent / "tools" / "export.py"
Detect = Callable[[], list[Detections]]


def cases(options: Options) -> list[Case]:
    batches = BATCHES[torch.device(options.device).type]
    backbone = options.backbone or "resnet50"
    return [_case(backbone, size, batch, options.device) for size in options.sizes or (800,) for batch in batches]


def _case(backbone: str, size: int, batch: int, device: str) -> Case:
    pictures = [draw_picture(image_size(size), seed) for seed in range(batch)]

    def peer(fast: bool) -> Detect:
        model = peer_detector(backbone, size, device, fast=fast).eval()

        @torch.inference_mode()
        def detect() -> list[Detections]:
            images = [torch.from_numpy(picture).to(device).permute(2, 0, 1).float() / 255 for picture in pictures]
            return [peer_detections(result) for result in model(images)]

        return detect

    def ours(precision: str) -> Detect:
        if precision == "int8":
            with tempfile.TemporaryDirectory() as folder:
                predictor = Predictor.load(quantised(backbone, size, Path(folder)), score_threshold=SCORE, device=device)
        else:
            checkpoint = our_checkpoint(backbone, size)
            predictor = Predictor.from_checkpoint(checkpoint, score_threshold=SCORE, device=device, precision=precision)
        return lambda: predictor(list(pictures), batch)

    precisions = dict.fromkeys(["fp32", choose_precision("auto", torch.device(device))])
    precisions |= {"int8": None} if device == "cpu" else {}
    peers = {name: lambda fast=fast: peer(fast) for name, fast in peers_of(device).items()}
    return Case(
        f"{backbone} {size} px, batch {batch}",
        {**peers, **{f"ours {name}": lambda name=name: ours(name) for name in precisions}},
        lambda theirs, own: matched(theirs[0], own[0]),
        peers=len(peers),
        images=batch,
        dtypes={f"ours {name}": name for name in precisions},
        flop_of="ours fp32",
        bytes=sum(value.nbytes for value in our_checkpoint(backbone, size).model.values()) + sum(p.nbytes for p in pictures),
    )


def quantised(backbone: str, size: int, folder: Path) -> Path:
    """An int8 file in `folder`, made by the command line as a user does it. Raises `UserError` with its last words."""
    weights = folder / "lively.pt"
    save_checkpoint(weights, our_checkpoint(backbone, size))
    for seed in range(CALIBRATION):
        Image.fromarray(draw_picture(image_size(size), seed)).save(folder / f"{seed}.jpg", quality=95)
    arguments = ["--weights", weights, "--out", folder / "lively.onnx", "--dynamic", "--int8", "--calibrate", folder]
    done = subprocess.run([sys.executable, EXPORT, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError((done.stderr.strip().splitlines() or [f"{EXPORT.name} ended with {done.returncode}"])[-1])
    return next(folder.glob("*int8*.onnx"))
