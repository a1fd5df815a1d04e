"""Pictures with boxes, names and scores that can be read."""

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from retinanet.structures import Category, Detections, Target

GOLDEN = 0.618033988749895  # steps of this on the hue circle keep any number of colours apart


def class_color(label: int) -> tuple[int, int, int]:
    """A colour for a class, far from those of its neighbours."""
    red, green, blue = colorsys.hsv_to_rgb((0.58 + label * GOLDEN) % 1, 0.85, 0.95)
    return int(red * 255), int(green * 255), int(blue * 255)


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: Sequence[int],
    captions: Sequence[str],
    *,
    min_side: int = 480,
    colors: Sequence[tuple[int, int, int]] | None = None,
) -> np.ndarray:
    """`image` uint8 [H, W, 3] with boxes [D, 4] and their captions; enlarged if small, so that text is legible.

    Each box has its entry of `colors`, or its class's colour. The longer side is never enlarged beyond four times
    `min_side`: a picture of a few rows would become gigabytes.
    """
    zoom = max(1.0, min(min_side / min(image.shape[:2]), 4 * min_side / max(image.shape[:2])))
    picture = Image.fromarray(image)
    if zoom > 1:
        picture = picture.resize((round(picture.width * zoom), round(picture.height * zoom)), Image.Resampling.BICUBIC)
    canvas = ImageDraw.Draw(picture)
    scale = min(picture.size)
    font = ImageFont.load_default(size=max(12, scale // 38))
    width = max(2, scale // 240)
    outlines = [tuple(box) for box in (np.asarray(boxes, dtype=np.float64).reshape(-1, 4) * zoom).tolist()]
    colors = colors or [class_color(label) for label in labels]
    for box, color in reversed(list(zip(outlines, colors, strict=True))):  # the best is drawn last, on top
        canvas.rectangle(_ordered(box), outline=color, width=width)
    for box, color, caption in reversed(list(zip(outlines, colors, captions, strict=True))):
        _draw_caption(canvas, caption, box, color, font, picture.size)
    return np.asarray(picture)


def draw_detections(image: np.ndarray, detections: Detections, *, min_side: int = 480) -> np.ndarray:
    boxes, scores, labels = detections.numpy()
    captions = [f"{name} {score:.2f}" for name, score in zip(detections.names, scores, strict=True)]
    return draw_boxes(image, boxes, labels.tolist(), captions, min_side=min_side)


def draw_target(image: np.ndarray, target: Target, categories: Sequence[Category]) -> np.ndarray:
    labels = target.labels.tolist()
    return draw_boxes(image, target.boxes.numpy(), labels, [categories[label].name for label in labels])


def side_by_side(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures of equal height in a row, with a gap between."""
    gap = np.full((pictures[0].shape[0], 8, 3), 255, np.uint8)
    return np.concatenate([part for picture in pictures for part in (picture, gap)][:-1], axis=1)


def contact_sheet(pictures: Sequence[np.ndarray], *, columns: int = 4, tile: int = 360) -> np.ndarray:
    """Pictures of any size in a grid of square tiles."""
    rows = -(-len(pictures) // columns)
    gap = 6
    sheet = Image.new("RGB", (columns * (tile + gap) + gap, rows * (tile + gap) + gap), "white")
    for n, picture in enumerate(pictures):
        small = Image.fromarray(picture)
        small.thumbnail((tile, tile), Image.Resampling.LANCZOS)
        left, top = n % columns * (tile + gap) + gap, n // columns * (tile + gap) + gap
        sheet.paste(small, (left + (tile - small.width) // 2, top + (tile - small.height) // 2))
    return np.asarray(sheet)


def _ordered(box: tuple[float, ...]) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = box
    return x1, y1, max(x1, x2), max(y1, y2)


def _draw_caption(
    canvas: ImageDraw.ImageDraw,
    text: str,
    box: tuple[float, ...],
    color: tuple[int, int, int],
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    size: tuple[int, int],
) -> None:
    """Above the box where there is room, inside it otherwise; never cut by the border, but shortened if too wide."""
    left, top, right, bottom = canvas.textbbox((0, 0), text, font=font)
    while right - left + 6 > size[0] and len(text) > 4:
        text = f"{text[:-4]}..."  # one character shorter, or three the first time
        left, top, right, bottom = canvas.textbbox((0, 0), text, font=font)
    wide, high = right - left + 6, bottom - top + 6
    x = min(max(0, box[0]), max(0, size[0] - wide))
    y = box[1] - high if box[1] >= high else max(0, box[1])
    y = min(y, max(0, size[1] - high))
    canvas.rectangle((x, y, x + wide - 1, y + high - 1), fill=color)
    luminance = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    canvas.text((x + 3 - left, y + 3 - top), text, fill="black" if luminance > 140 else "white", font=font)
