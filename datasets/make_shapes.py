"""Draw a small detection data set in COCO form: coloured shapes on textured, cluttered backgrounds.

It is a real detection problem in small. Objects overlap, are cut off by the border and come in many sizes;
curves, blobs, noise and lettering in the same colours are no objects; some images are empty and some hold a
crowd: many tiny instances under one `iscrowd` annotation. Every image has its own random generator, so the
same arguments give the same bytes, whatever the number of workers.
"""

import argparse
import colorsys
import contextlib
import functools
import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import cv2
import numpy as np
from tqdm import tqdm

VERSION = 1  # raise it whenever the same arguments would draw other bytes
SPLITS = ("train", "val")
STAMP = "dataset.json"  # in the folder of a finished set: the arguments it was drawn from
SMALL_AREA = 32 * 32  # px; COCO's bound between small and medium, here of the box
OVERLAP_IOU = 0.2
FINE = 4  # shapes are drawn this much larger and shrunk, for smooth edges


def _polygon(n: int) -> np.ndarray:
    """n points [n, 2] at equal steps on the unit circle, the first one on top (y points down)."""
    t = np.arange(n) * 2 * np.pi / n
    return np.stack([np.sin(t), -np.cos(t)], 1)


def _heart() -> np.ndarray:
    t = np.arange(64) * 2 * np.pi / 64
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y], 1)


def _cross(half: float = 0.34) -> np.ndarray:
    arm = np.array([(-half, -1), (half, -1), (half, -half)])
    turn = np.array([[0, 1], [-1, 0]])  # a quarter, onto the next arm
    return np.concatenate([arm @ np.linalg.matrix_power(turn, k) for k in range(4)])


class Category(NamedTuple):
    """One class of objects."""

    name: str
    id: int  # in the annotation files
    hue: float  # typical one in the demo preset, in turns
    contours: list[np.ndarray]  # [n, 2] each, at any scale; a second one is a hole


# Real COCO ids have gaps and do not start at 0; so do these, to catch code that takes an id for an index.
CATEGORIES = (
    Category("heart", 2, 0.98, [_heart()]),
    Category("star", 3, 0.135, [_polygon(10) * np.where(np.arange(10) % 2, 0.45, 1)[:, None]]),
    Category("triangle", 5, 0.33, [_polygon(3)]),
    Category("ring", 8, 0.48, [_polygon(64), 0.55 * _polygon(64)]),
    Category("disc", 13, 0.60, [_polygon(64)]),
    Category("cross", 21, 0.83, [_cross()]),
)


class Preset(NamedTuple):
    """What a preset draws: lengths in pixels, chances in [0, 1], ranges with both ends."""

    train: int  # images
    val: int
    size: int  # longer image side; the other one is as long or 0.8 times that
    min_size: int
    objects: tuple[int, int]
    extent: tuple[float, float]  # longer side of an object: least in pixels, most as a share of `size`
    skew: float  # 1 draws extents log-uniformly, less favours the large ones
    paired: float  # chance that an object is placed onto an earlier one
    visible: float  # share of its pixels that an object at least keeps after truncation and occlusion
    truncated: float  # chance that an object may cross the border
    clutter: tuple[int, int]
    tilt: float  # greatest rotation either way, radians
    typical_hue: bool  # a class has its own hue; otherwise every class takes every colour


PRESETS = {
    "demo": Preset(1600, 200, 160, 96, (2, 6), (18, 0.6), 0.6, 0.1, 0.6, 0.2, (3, 6), 0.5, True),
    "hard": Preset(2000, 300, 320, 320, (6, 16), (11, 0.45), 1, 0.4, 0.35, 0.3, (8, 16), np.pi, False),
    "ablation": Preset(1600, 300, 128, 96, (3, 8), (8, 0.3), 0.9, 0.3, 0.45, 0.15, (12, 20), 0.5, True),
}


class Thing(NamedTuple):
    """One object or crowd as a patch whose top left pixel lies at (x, y), maybe outside the image."""

    category: Category
    alpha: np.ndarray  # [h, w] float32 in [0, 1]; the mask is alpha >= 0.5
    colour: np.ndarray  # [h, w, 3] float32 RGB in [0, 255]
    x: int = 0
    y: int = 0
    crowd: bool = False

    def windows(self, height: int, width: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """What an image [height, width] and the patch share: the slices of the image, those of the patch."""
        top, bottom = np.clip([self.y, self.y + self.alpha.shape[0]], 0, height).tolist()
        left, right = np.clip([self.x, self.x + self.alpha.shape[1]], 0, width).tolist()
        patch = slice(top - self.y, bottom - self.y), slice(left - self.x, right - self.x)
        return (slice(top, bottom), slice(left, right)), patch


class Scene(NamedTuple):
    """All that decides one image and its annotations."""

    canvas: np.ndarray  # [H, W, 3] float32 RGB: background and clutter
    things: list[Thing]  # from the lowest to the topmost
    owner: np.ndarray  # [H, W] int: number of the thing visible at a pixel, -1 for none


def _rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value), np.float32) * 255


def _vivid(rng: np.random.Generator, hue: float) -> np.ndarray:
    """A strong colour [3], for objects and clutter alike."""
    return _rgb(hue, rng.uniform(0.65, 0.95), rng.uniform(0.7, 1))


def _noise(rng: np.random.Generator, height: int, width: int, cells: int) -> np.ndarray:
    """Smooth noise [height, width] in about [-1, 1] with some `cells` bumps along each side."""
    grid = rng.uniform(-1, 1, (cells + 1, cells + 1)).astype(np.float32)
    return cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)


def _pattern(rng: np.random.Generator, height: int, width: int, period: float, bend: np.ndarray | float) -> np.ndarray:
    """Stripes or a weave [height, width] in [-1, 1] of the period in pixels; `bend` shifts it, in radians."""
    y, x = np.mgrid[:height, :width].astype(np.float32) * (2 * np.pi / period)
    c, s = np.cos(angle := rng.uniform(0, np.pi)), np.sin(angle)
    stripes = np.sin(x * c + y * s + bend)
    return stripes if rng.random() < 0.5 else stripes * np.sin(y * c - x * s)


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A muted texture [height, width, 3] between two colours: clouds, at times with bent stripes or a weave."""
    hue = rng.random()
    dark = _rgb(hue, rng.uniform(0.15, 0.45), rng.uniform(0.25, 0.55))
    light = _rgb(hue + rng.uniform(-0.15, 0.15), rng.uniform(0.05, 0.35), rng.uniform(0.6, 0.9))
    mix = sum(0.4 * 0.6**k * _noise(rng, height, width, 3 * 2**k) for k in range(4))
    if rng.random() < 0.6:
        mix = 0.7 * mix + rng.uniform(0.08, 0.25) * _pattern(rng, height, width, rng.uniform(7, 24), 5 * mix)
    grain = rng.normal(0, 4, (height, width, 1)).astype(np.float32)
    return dark + (light - dark) * np.clip(0.5 + mix, 0, 1)[..., None] + grain


def _clutter(rng: np.random.Generator, canvas: np.ndarray) -> None:
    """Paint one thing that is no object onto the canvas: a bent line, a soft blob, a noise patch or lettering."""
    height, width = canvas.shape[:2]
    mask: np.ndarray = np.zeros((height, width), np.uint8)
    centre, reach = rng.uniform(0, (width, height)), rng.uniform(0.06, 0.2) * max(height, width)
    kind = rng.choice(["line", "blob", "noise", "text"])
    if kind == "line":
        bends = centre + np.cumsum(rng.normal(0, reach, (rng.integers(2, 4), 2)), 0)
        cv2.polylines(mask, [bends.astype(np.int32)], False, 255, int(rng.integers(1, 4)), cv2.LINE_AA)
    elif kind == "blob":
        edge = centre + _polygon(9) * reach * rng.uniform(0.35, 1, (9, 1))
        cv2.fillPoly(mask, [edge.astype(np.int32)], 255)
        for _ in range(2):
            mask = cv2.blur(mask, (int(reach / 2), int(reach / 2)))
    elif kind == "noise":
        box = centre.tolist(), (2 * reach, reach * rng.uniform(0.4, 1.5)), rng.uniform(0, 90)
        cv2.fillPoly(mask, [cv2.boxPoints(box).astype(np.int32)], 255)
    else:  # without the letters that could pass for a ring, a cross or a triangle
        text = "".join(rng.choice(list("BEFGHKLMNPRSUWZ23457"), rng.integers(2, 7)))
        start = (int(centre[0] - reach), int(centre[1]))
        cv2.putText(mask, text, start, int(rng.integers(8)), rng.uniform(0.35, 0.8), 255, 1, cv2.LINE_AA)
    x, y, w, h = cv2.boundingRect(mask)
    part, cover = canvas[y : y + h, x : x + w], mask[y : y + h, x : x + w, None] * rng.uniform(0.45, 0.85) / 255
    if kind == "noise":
        cover *= rng.random((h, w, 1))
    part += (_vivid(rng, rng.random()) - part) * cover.astype(np.float32)


def _surface(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Brightness [height, width, 1] around 1 of an object: light from one side, a gleam and maybe a pattern."""
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j].astype(np.float32)
    c, s = np.cos(angle := rng.uniform(0, 2 * np.pi)), np.sin(angle)
    gleam = np.exp(-((x - 0.4 * c) ** 2 + (y - 0.4 * s) ** 2) / 0.25)
    kind, period = rng.random(), max(4, max(height, width) * rng.uniform(0.15, 0.3))
    relief = np.zeros_like(x)
    if kind < 0.5:
        relief = _pattern(rng, height, width, period, 0)
    elif kind < 0.75:
        relief = _noise(rng, height, width, 8)
    return (0.86 + 0.14 * (x * c + y * s) + 0.3 * gleam + 0.16 * np.clip(3 * relief, -1, 1))[..., None]


def _object(rng: np.random.Generator, preset: Preset, category: Category, extent: float) -> Thing:
    """One object at (0, 0), turned and a little stretched, whose box is `extent` pixels on its longer side."""
    c, s = np.cos(angle := rng.uniform(-preset.tilt, preset.tilt)), np.sin(angle)
    stretch = np.exp(rng.uniform(-0.15, 0.15))
    contours = [points * (stretch, 1 / stretch) @ np.array([[c, s], [-s, c]]) for points in category.contours]
    low, high = contours[0].min(0), contours[0].max(0)
    scale = extent / (high - low).max()
    width, height = (np.ceil((high - low) * scale).astype(int) + 2).tolist()  # a clear pixel on every side
    fine = np.zeros((height * FINE, width * FINE), np.uint8)
    cv2.fillPoly(fine, [(((p - low) * scale + 1) * FINE).round().astype(np.int32) for p in contours], 255)
    rim = FINE * max(0.8, extent * rng.uniform(0.03, 0.06))
    inside = np.where(cv2.distanceTransform(fine, cv2.DIST_L2, 3) > rim, 255, 0).astype(np.uint8)
    alpha, inner = (
        cv2.resize(mask, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32) / 255 for mask in (fine, inside)
    )
    paint = _vivid(rng, category.hue + rng.normal(0, 0.018) if preset.typical_hue else rng.random())
    edge = 0.3 * paint if rng.random() < 0.7 else 190 + 0.25 * paint
    colour = edge + (paint * _surface(rng, height, width) - edge) * inner[..., None]
    return Thing(category, alpha, np.clip(colour, 0, 255).astype(np.float32))


def _crowd(rng: np.random.Generator, preset: Preset, category: Category, side: int) -> Thing:
    """A cluster of tiny objects of one class in a square of `side` pixels, as one thing at (0, 0)."""
    alpha, colour = np.zeros((side, side), np.float32), np.zeros((side, side, 3), np.float32)
    for _ in range(rng.integers(14, 26)):
        tiny = _object(rng, preset, category, rng.uniform(8, 12))
        x, y = (rng.normal(side / 2, side / 6, 2) - 6).clip(0, side - 15).astype(int).tolist()
        there, here = tiny._replace(x=x, y=y).windows(side, side)
        colour[there] = np.where(tiny.alpha[here][..., None] > 0, tiny.colour[here], colour[there])
        alpha[there] = np.maximum(alpha[there], tiny.alpha[here])
    return Thing(category, alpha, colour, crowd=True)


def _candidate(rng: np.random.Generator, preset: Preset, scene: Scene) -> Thing:
    """A random object at a random spot: at times upon an earlier one of like size, at times across the border."""
    height, width = scene.owner.shape
    least, most = preset.extent[0], preset.extent[1] * max(height, width)
    extent = least * (most / least) ** (rng.random() ** preset.skew)
    singles = [thing for thing in scene.things if not thing.crowd]
    partner = singles[rng.integers(len(singles))] if singles and rng.random() < preset.paired else None
    if partner:
        extent = np.clip(max(partner.alpha.shape) * rng.uniform(0.75, 1.3), least, most)
    thing = _object(rng, preset, CATEGORIES[rng.integers(len(CATEGORIES))], extent)
    room = np.array([width, height]) - thing.alpha.shape[::-1]
    if partner:
        angle, shift = rng.uniform(0, 2 * np.pi), rng.uniform(0.2, 0.5) * extent
        centre = np.array([partner.x, partner.y]) + np.array(partner.alpha.shape[::-1]) / 2
        corner = centre - np.array(thing.alpha.shape[::-1]) / 2 + shift * np.array([np.cos(angle), np.sin(angle)])
    elif rng.random() < preset.truncated:
        beyond = np.array(thing.alpha.shape[::-1]) / 2
        corner = rng.uniform(-beyond, room + beyond)
    else:
        corner = rng.uniform(-1, room + 1)  # the patch's clear margin may stick out
    x, y = corner.round().astype(int).tolist()
    return thing._replace(x=x, y=y)


def _add(scene: Scene, thing: Thing, visible: float) -> bool:
    """Put the thing on top, unless it or one below it would keep less than this share of its pixels."""
    there, here = thing.windows(*scene.owner.shape)
    owner = scene.owner.copy()
    owner[there][thing.alpha[here] >= 0.5] = len(scene.things)
    full = np.array([np.count_nonzero(other.alpha >= 0.5) for other in (*scene.things, thing)])
    if np.any(np.bincount(owner.ravel() + 1, minlength=len(full) + 1)[1:] < visible * full):
        return False
    scene.owner[:] = owner
    scene.things.append(thing)
    return True


def compose(preset: Preset, seed: int, split: int, index: int, size: int) -> Scene:
    """Decide image `index` of a split; every 25th image is empty, every 20th has a crowd."""
    rng = np.random.default_rng([seed, split, index])
    height, width = ((size, size), (round(0.8 * size), size), (size, round(0.8 * size)))[rng.integers(3)]
    canvas = _background(rng, height, width)
    for _ in range(rng.integers(*preset.clutter, endpoint=True)):
        _clutter(rng, canvas)
    scene = Scene(canvas.clip(0, 255), [], np.full((height, width), -1))
    if index % 25 == 12:
        return scene
    if index % 20 == 5:  # the lowest thing of all, so it never hides an object
        side = size // 3
        x, y = rng.integers(0, (width - side, height - side)).tolist()
        crowd = _crowd(rng, preset, CATEGORIES[rng.integers(len(CATEGORIES))], side)
        _add(scene, crowd._replace(x=x, y=y), preset.visible)
    for _ in range(rng.integers(*preset.objects, endpoint=True)):
        tries = (_candidate(rng, preset, scene) for _ in range(20))
        any(_add(scene, thing, preset.visible) for thing in tries)  # or none: the image is full
    return scene


def paint(canvas: np.ndarray, things: list[Thing]) -> np.ndarray:
    """The things painted in turn over a copy of the canvas [H, W, 3]: uint8 RGB of the same shape."""
    image = canvas.copy()
    for thing in things:
        there, here = thing.windows(*canvas.shape[:2])
        image[there] += (thing.colour[here] - image[there]) * thing.alpha[here][..., None]
    return image.round().clip(0, 255).astype(np.uint8)


def _run_lengths(mask: np.ndarray) -> dict[str, list[int]]:
    """COCO's uncompressed form of a mask [H, W]: lengths of runs down the columns, zeros first."""
    flat = np.concatenate([[False], mask.T.ravel()])
    bounds = np.flatnonzero(flat[1:] != flat[:-1])
    return {"counts": np.diff(bounds, prepend=0, append=mask.size).tolist(), "size": list(mask.shape)}


def annotate(scene: Scene) -> list[dict[str, Any]]:
    """COCO annotations, less their ids, of what is visible of each thing: box [x, y, w, h] and area in pixels."""
    annotations: list[dict[str, Any]] = []
    for number, thing in enumerate(scene.things):
        mask = scene.owner == number
        annotations.append(
            {
                "category_id": thing.category.id,
                "bbox": list(cv2.boundingRect(mask.astype(np.uint8))),
                "area": int(mask.sum()),
                "iscrowd": int(thing.crowd),
            }
        )
        if thing.crowd:
            annotations[-1]["segmentation"] = _run_lengths(mask)
    return annotations


def _draw(stamp: dict[str, Any], folder: Path, index: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Write one image into the folder of its split; return its COCO record and annotations, less their ids."""
    scene = compose(PRESETS[stamp["preset"]], stamp["seed"], SPLITS.index(folder.name), index, stamp["size"])
    height, width = scene.owner.shape
    record = {"id": index + 1, "file_name": f"{index + 1:06d}.jpg", "width": width, "height": height}
    pixels = cv2.cvtColor(paint(scene.canvas, scene.things), cv2.COLOR_RGB2BGR)
    _, code = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 92])
    (folder / record["file_name"]).write_bytes(code)  # unlike cv2.imwrite this names the error of a full disk
    return record, [{"image_id": index + 1} | annotation for annotation in annotate(scene)]


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    cv2.setNumThreads(0)  # the workers are the parallelism


def _draw_all(out: Path, stamp: dict[str, Any], workers: int) -> None:
    """Draw both splits and their annotation files into the new folder `out`, the stamp last."""
    (out / "annotations").mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        run: Callable[..., Iterable] = map
        if workers > 1:
            pool = stack.enter_context(multiprocessing.Pool(workers, _start_worker))
            run = functools.partial(pool.imap, chunksize=8)
        for split in SPLITS:
            (out / split).mkdir()
            jobs = run(functools.partial(_draw, stamp, out / split), range(stamp[split]))
            drawn = list(tqdm(jobs, split, stamp[split], unit="image", disable=None))  # None: only on a terminal
            annotations = [annotation for _, found in drawn for annotation in found]
            coco = {
                "info": {"description": f"shapes, preset {stamp['preset']}", "version": str(VERSION)},
                "licenses": [],
                "images": [record for record, _ in drawn],
                "categories": [{"id": c.id, "name": c.name, "supercategory": "shape"} for c in CATEGORIES],
                "annotations": [{"id": number} | annotation for number, annotation in enumerate(annotations, 1)],
            }
            (out / "annotations" / f"{split}.json").write_text(json.dumps(coco))
    (out / STAMP).write_text(json.dumps(stamp, indent=2) + "\n")


def _holds(out: Path, stamp: dict[str, Any]) -> bool:
    """Whether the folder has this stamp and as many images as it says."""
    with contextlib.suppress(OSError, ValueError):
        if json.loads((out / STAMP).read_text()) == stamp:
            return all(len(list((out / split).glob("*.jpg"))) == stamp[split] for split in SPLITS)
    return False


def draw_dataset(
    out: str | Path,
    preset: str = "demo",
    seed: int = 0,
    train: int | None = None,
    val: int | None = None,
    *,
    size: int | None = None,
    workers: int = 1,
) -> bool:
    """Draw a data set into the folder `out`; False if exactly this one is there already.

    `train` and `val` count images, `size` is the longer image side in pixels; None takes the preset's. More than
    one worker needs this module in `sys.modules`, where the processes look it up.
    Raises ValueError for bad arguments and FileExistsError if `out` holds anything else.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, not {preset!r}")
    law = PRESETS[preset]
    train = law.train if train is None else train
    val = law.val if val is None else val
    size = law.size if size is None else size
    bounds = {"seed": (seed, 0), "train": (train, 1), "val": (val, 1), "size": (size, law.min_size)}
    for key, (value, least) in (bounds | {"workers": (workers, 1)}).items():
        if value < least:
            raise ValueError(f"{key} must be at least {least}, not {value}")
    stamp = {"version": VERSION, "preset": preset, "seed": seed, "train": train, "val": val, "size": size}
    out = Path(out).absolute()
    if _holds(out, stamp):
        return False
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} holds something else; choose another folder or remove it")
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        _draw_all(partial, stamp, workers)
        if out.exists():
            out.rmdir()  # it is empty; not every system renames onto a folder
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


def _ious(boxes: np.ndarray) -> np.ndarray:
    """IoU [n, n] of each box [x, y, w, h] of [n, 4] with every other one; 0 with itself."""
    low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    shared = (np.minimum(high[:, None], high) - np.maximum(low[:, None], low)).clip(0).prod(2)
    np.fill_diagonal(shared, 0)
    area = boxes[:, 2:].prod(1)
    return shared / (area[:, None] + area - shared)


def properties(out: str | Path) -> dict[str, Any]:
    """What a drawn set holds, both splits together; crowds count as no objects.

    Returns the numbers of `images`, `empty` images and `crowds`, `objects` by class name, and the shares of
    objects which are `small` (box below 32 x 32 px) and `overlapping` (IoU >= 0.2 with another one's box).
    """
    images, empty, crowds = 0, 0, 0
    objects = {category.name: 0 for category in CATEGORIES}
    names = {category.id: category.name for category in CATEGORIES}
    small: list[np.ndarray] = []
    overlapping: list[np.ndarray] = []
    for split in SPLITS:
        coco = json.loads((Path(out) / "annotations" / f"{split}.json").read_text())
        by_image: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in coco["images"]}
        for annotation in coco["annotations"]:
            by_image[annotation["image_id"]].append(annotation)
        for found in by_image.values():
            singles = [a for a in found if not a["iscrowd"]]
            images, empty, crowds = images + 1, empty + (not found), crowds + len(found) - len(singles)
            for annotation in singles:
                objects[names[annotation["category_id"]]] += 1
            boxes = np.array([a["bbox"] for a in singles], float).reshape(-1, 4)
            small.append(boxes[:, 2:].prod(1) < SMALL_AREA)
            overlapping.append(_ious(boxes).max(1, initial=0) >= OVERLAP_IOU)
    parts = {"small": small, "overlapping": overlapping}
    shares = {key: float(np.concatenate(flags).mean()) for key, flags in parts.items()}
    return {"images": images, "empty": empty, "crowds": crowds, "objects": objects, **shares}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")  # one line, without the usage


def _parser() -> _Parser:
    parser = _Parser(
        description="Draw a detection data set of shapes in COCO form.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  python datasets/make_shapes.py --preset demo --out datasets/shapes\n"
        "  python datasets/make_shapes.py --preset hard --out datasets/shapes-hard --seed 1 --train 500 --val 100",
    )
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="demo",
        help="demo is easy, hard small and crowded, ablation small objects among clutter",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to draw into")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="another seed draws another set (default: 0)")
    numbers = {"train": "training images", "val": "validation images", "size": "longer image side in pixels"}
    for name, text in numbers.items():
        defaults = ", ".join(f"{key} {getattr(preset, name)}" for key, preset in PRESETS.items())
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"{text} (default: {defaults})")
    cpus = os.cpu_count() or 1
    parser.add_argument("--workers", type=int, default=cpus, metavar="N", help="processes (default: one per CPU)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """The command line: draw the set, then say what it holds and what to do next."""
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        drawn = draw_dataset(**vars(options))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        sys.exit("interrupted: nothing was kept")
    found = properties(options.out)
    print(f"{options.out}: " + ("drawn" if drawn else "holds exactly this data already, nothing to draw"))
    print(f"  {found['images']} images, {found['empty']} of them empty; {found['crowds']} crowds")
    print("  objects: " + ", ".join(f"{count} {name}" for name, count in found["objects"].items()))
    print(f"  small (< 32x32 px): {found['small']:.0%}, overlapping (IoU >= {OVERLAP_IOU}): {found['overlapping']:.0%}")
    ready = {"demo": "python tools/train.py configs/demo.yaml", "ablation": "python tools/focal_lab.py ablation"}
    other = f"copy configs/demo.yaml, point it at {options.out} and run python tools/train.py on the copy"
    print(f"next: {ready.get(options.preset, other)}")


if __name__ == "__main__":
    main()
