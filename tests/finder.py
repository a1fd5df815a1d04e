"""A detector whose truth is known: it finds red and green rectangles, wherever and however large they are."""

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from retinanet.boxes import encode_boxes
from retinanet.structures import Category, Predictions

COLORS = ((230, 20, 20), (20, 230, 20))
CATEGORIES = (Category(3, "red"), Category(7, "green"))
ANCHOR = torch.tensor([0.0, 0.0, 32.0, 32.0])
SCORE = 0.9


class RectangleFinder(nn.Module):
    """Called as `RetinaNet` is. Each region of one colour is an object of score 0.9, its outline the box.

    With `jitter` it errs as detectors do, differently at every look: the sides of a box move by so large a share of it
    (standard deviation), and scores lie anywhere in 0.55..0.99.
    """

    def __init__(self, jitter: float = 0.0) -> None:
        super().__init__()
        self.num_classes = 2
        self.jitter, self.rng = jitter, np.random.default_rng(0)
        self.sizes: list[list[int]] = []  # of the pictures that it was given, after the resize
        self.batches: list[int] = []

    def forward(self, images: Tensor, image_sizes: Tensor) -> Predictions:
        self.sizes += image_sizes.tolist()
        self.batches.append(len(images))
        found = [
            rectangles(image[:, :h, :w].permute(1, 2, 0).numpy())
            for image, (h, w) in zip(images, image_sizes.tolist(), strict=True)
        ]
        most = max(1, *map(len, found))
        logits = torch.full((len(images), most, 2), -30.0)
        boxes = ANCHOR.repeat(len(images), most, 1)
        for n, objects in enumerate(found):
            for k, (label, *box) in enumerate(objects):
                sides = np.array([box[2] - box[0], box[3] - box[1]] * 2)
                score = self.rng.uniform(0.55, 0.99) if self.jitter else SCORE
                logits[n, k, label] = torch.logit(torch.tensor(score))
                boxes[n, k] = torch.tensor(box + self.rng.normal(0, self.jitter, 4) * sides)
        anchors = ANCHOR.repeat(most, 1)
        return Predictions(logits, encode_boxes(boxes, anchors), anchors, [most])


def rectangles(image: np.ndarray) -> list[tuple[int, int, int, int, int]]:
    """(label, x1, y1, x2, y2) of the coloured regions in RGB uint8 [H, W, 3]."""
    found = []
    for label in range(2):
        mask = (image[:, :, label] > 165) & (image[:, :, 1 - label] < 65)
        _, _, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
        found += [(label, x, y, x + w, y + h) for x, y, w, h, _ in stats[1:].tolist()]
    return found


def draw(image: np.ndarray, label: int, box: tuple[int, int, int, int]) -> None:
    x1, y1, x2, y2 = box
    image[y1:y2, x1:x2] = COLORS[label]


def grey(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 110, np.uint8)
