"""Any picture to RGB uint8, upright; and the resize that training and inference share."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from retinanet.data.annotations import Annotations
from retinanet.data.faults import Fault, reading
from retinanet.errors import UserError

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".pgm", ".ppm", ".jfif", ".avif"}
# All that is decoded, whatever a file is called. Pillow would hand PostScript, which is a program, to an interpreter.
FORMATS = ["JPEG", "PNG", "BMP", "DIB", "GIF", "PPM", "TIFF", "WEBP", "JPEG2000", "TGA"]
FORMATS += ["AVIF"] if find_spec("PIL.AvifImagePlugin") else []  # since Pillow 11.3
DECODER_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow's decoders raise
Size = tuple[int, int]  # (height, width)
MANY = 2000  # files whose reading takes seconds, so that progress is shown


class UnreadableImageError(UserError):
    """A file that is missing, truncated, no image, or larger than is safe to open. The message names it."""


def read_image(path: str | Path) -> np.ndarray:
    """The picture as RGB uint8 [height, width, 3], turned upright by its EXIF tag; the first frame of several.

    Raises `UnreadableImageError`, with the file and the reason in one line.
    """
    with warnings.catch_warnings(action="ignore"), opened(path) as image:  # corrupt EXIF, palette transparency: handled here
        return to_rgb(image)


def read_reduced(path: str | Path, wanted: Callable[[Size], Size]) -> tuple[np.ndarray, Size]:
    """The picture like `read_image`'s, and the size that it has in full. A JPEG is decoded at a half, a quarter or an eighth
    of that where this is still no smaller than the size that `wanted` makes of the full one.

    The decoder then averages pixels that `resize` would leave out; it takes a fraction of the time.
    """
    with warnings.catch_warnings(action="ignore"), opened(path) as image:
        size = _upright_size(image)
        height, width = wanted(size)
        image.draft(None, (height, width) if lies_down(image) else (width, height))
        return to_rgb(image), size


def read_sizes(paths: Sequence[Path], faults: list[Fault] | None = None) -> np.ndarray:
    """[I, 2] int64 (height, width) of the pictures as `read_image` gives them, from their headers; many at a time.

    Raises `UnreadableImageError`; with a list `faults` it is noted there, and the size 0.
    """
    from tqdm import tqdm

    def read(path: Path) -> tuple[int, int]:
        with reading(faults, path), opened(path) as image:
            return _upright_size(image)
        return 0, 0

    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor(8) as pool:
        sizes = tqdm(pool.map(read, paths), "image sizes", len(paths), unit="image", disable=len(paths) < MANY)
        return np.array(list(sizes), np.int64).reshape(-1, 2)


def known_sizes(annotations: Annotations, faults: list[Fault] | None = None, *, again: bool = False) -> np.ndarray:
    """[I, 2] (height, width): what the annotations leave open, or with `again` all, is read as by `read_sizes`."""
    sizes = annotations.sizes.copy()
    read = np.flatnonzero((sizes <= 0).any(axis=1) | again)
    sizes[read] = read_sizes([annotations.path(index) for index in read.tolist()], faults)
    return sizes


def _upright_size(image: Image.Image) -> Size:
    turned = lies_down(image)
    if turned and image.format == "TIFF":  # turns itself when decoded, in newer Pillows even before
        image.load()
        turned = False
    return (image.width, image.height) if turned else (image.height, image.width)


def lies_down(image: Image.Image) -> bool:
    """By its EXIF tag it is stored turned by 90 degrees."""
    return Image.Image.getexif(image).get(ExifTags.Base.Orientation) in (5, 6, 7, 8)  # PngImageFile's would decode it all


@contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """The file opened by Pillow; what that and the body raise about it becomes `UnreadableImageError`."""
    try:
        if Path(path).is_fifo():  # which would be waited for, without end
            raise UnreadableImageError(f"{path}: a pipe, not a file")
        with Image.open(path, formats=FORMATS) as image:
            yield image
    except FileNotFoundError:
        raise UnreadableImageError(f"{path}: no such file") from None
    except UnidentifiedImageError:
        raise UnreadableImageError(f"{path}: not an image, or one of unknown format") from None
    except DECODER_ERRORS as error:
        raise UnreadableImageError(f"{path}: {' '.join(str(error).split())}") from None


def to_rgb(image: Image.Image) -> np.ndarray:
    """A PIL image of any mode as upright RGB uint8 [height, width, 3]. Transparent parts become white."""
    image.load()  # before its EXIF tag is asked: a TIFF turns itself, a PNG may have the tag at its end
    if image.getexif().get(ExifTags.Base.Orientation) in range(2, 9):  # else exif_transpose would copy it all the same
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_to_8_bits(np.asarray(image)))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Grey values of more than 8 bits, scaled from the depth that they use: sensors put 10, 12 or 14 bits into 16."""
    brightest = float(np.max(values, initial=0, where=np.isfinite(values)))
    if values.dtype.kind == "f" and brightest <= 1:
        scale = 255.0
    else:
        depth = next((bits for bits in (8, 10, 12, 14, 16) if brightest < 2**bits), 32)
        scale = 255 / (2**depth - 1)
    return (np.nan_to_num(values, posinf=brightest, neginf=0) * scale).clip(0, 255).round().astype(np.uint8)


def resized_size(
    size: Size, short_edge: int, long_edge: int, rounding: str = "nearest", *, largest: Size | None = None
) -> Size:
    """(height, width) after scaling the shorter side to `short_edge`, or less if the longer would exceed `long_edge`, or
    the whole `largest`, a (height, width).

    `rounding` "floor" cuts off fractions, as torchvision does; a side that is whole but for a float's last digit too.
    """
    scale = min(short_edge / min(size), long_edge / max(size))
    if largest is not None:
        scale = min(scale, largest[0] / size[0], largest[1] / size[1])
    half = 0.5 if rounding == "nearest" else 0.0
    return max(1, int(size[0] * scale + half)), max(1, int(size[1] * scale + half))


def resize(image: np.ndarray, size: Size) -> np.ndarray:
    """uint8 [H, W, 3] at another (height, width): bilinear, pixel centres aligned, no antialiasing, as the peers do."""
    if image.shape[:2] == tuple(size):
        return image
    import cv2

    return cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
