"""Raw outputs of one image to detections: torchvision's `postprocess_detections`, and our `Postprocessor` set like it."""

from collections.abc import Callable

import torch

from benchmarks.loss import CLASSES, bare_peer, level_anchors
from benchmarks.peer import image_size, matched
from benchmarks.timing import Case, Options
from retinanet.postprocess import Postprocessor
from retinanet.structures import Detections, Predictions

ROUNDS = 15
CANDIDATES = (300, 1_000, 20_000)  # scores above the threshold
Detect = Callable[[], Detections]


def cases(options: Options) -> list[Case]:
    return [_case(size, count, options.device) for size in options.sizes or (800,) for count in CANDIDATES]


def _case(size: int, count: int, device: str) -> Case:
    levels = level_anchors(image_size(size), device)
    sizes = [len(level) for level in levels]
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(1, sum(sizes), CLASSES, generator=random).mul_(0.3).sub_(6)  # scores near 0.0025
    chosen = torch.randperm(logits.numel(), generator=random)[:count]
    logits.view(-1)[chosen] = torch.rand(len(chosen), generator=random) * 5 - 2.9  # the logit of 0.05 is -2.944
    logits = logits.to(device)
    deltas = torch.randn(1, sum(sizes), 4, generator=random).mul_(0.2).to(device)

    def peer() -> Detect:
        model = bare_peer().eval()
        outputs = {"cls_logits": list(logits.split(sizes, 1)), "bbox_regression": list(deltas.split(sizes, 1))}

        @torch.inference_mode()
        def detect() -> Detections:
            found = model.postprocess_detections(outputs, [levels], [image_size(size)])[0]
            return Detections(found["boxes"].cpu(), found["scores"].cpu(), found["labels"].cpu())

        return detect

    def ours() -> Detect:
        postprocess = Postprocessor(max_detections=300, drop_empty=False)
        predictions, shape = Predictions(logits, deltas, torch.cat(levels), sizes), torch.tensor([image_size(size)])

        @torch.inference_mode()
        def detect() -> Detections:
            return postprocess(predictions, shape)[0].cpu()

        return detect

    return Case(
        f"{size} px, {len(chosen)} candidates",
        {"torchvision": peer, "ours": ours},
        lambda theirs, own: matched(theirs, own, iou=0.9999, score=1e-6),
        bytes=logits.nbytes,
        warmup=2,
    )
