"""retinanet/data/images.py: every kind of picture becomes upright RGB uint8, or an error that names the file."""

import colorsys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from retinanet.data.images import UnreadableImageError, read_image, read_reduced, resize, resized_size, to_rgb
from retinanet.errors import UserError

# Each file: its (height, width) upright, or what the error must say.
AWKWARD: dict[str, tuple[int, int] | str] = {
    "16bit.cropped.tif": (64, 64),
    "1_trns.png": (64, 64),
    "bmp_b_shortfile.bmp": "truncated",
    "broken.png": "not an image",
    "broken_data_stream.png": "unrecognized data stream",
    "broken_exif_dpi.jpg": (100, 100),
    "chi.gif": (240, 320),
    "decompression_bomb.gif": "exceeds limit",
    "hopper.webp": (128, 128),
    "hopper_16bit.pgm": (128, 128),
    "hopper_bad_exif.jpg": (500, 500),
    "hopper_gray.jpg": (128, 128),
    "hopper_orientation_2.jpg": (128, 128),
    "hopper_orientation_3.jpg": (128, 128),
    "hopper_orientation_5.jpg": (128, 128),
    "hopper_orientation_6.jpg": (128, 128),
    "hopper_orientation_8.jpg": (128, 128),
    "i_trns.png": (64, 64),
    "l_trns.png": (64, 64),
    "multipage.tiff": (10, 10),
    "p_trns_single.png": (64, 64),
    "pil_sample_cmyk.jpg": (100, 100),
    "tiff_16bit_RGBa.tiff": (40, 100),
    "truncated_image.png": "truncated",
    "truncated_jpeg.jpg": "truncated",
    "uncompressed_la.png": (128, 128),
}


def by_opencv(file: Path, flags: int = cv2.IMREAD_COLOR) -> np.ndarray:
    """What another decoder makes of the file, RGB(A)."""
    picture = cv2.imread(str(file), flags)
    assert picture is not None
    return picture if picture.ndim == 2 else picture[..., [2, 1, 0, 3][: picture.shape[2]]]


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Straight alpha on the 0..255 scale over white."""
    return colour * (alpha / 255) + 255 - alpha


def grey(values: np.ndarray) -> np.ndarray:
    return np.stack([values] * 3, axis=-1)


def test_the_table_lists_every_awkward_file(real_data: Path) -> None:
    assert {file.name for file in (real_data / "awkward").iterdir()} == {*AWKWARD, "LICENSE.Pillow"}


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_file(real_data: Path, name: str) -> None:
    file, expected = real_data / "awkward" / name, AWKWARD[name]
    if isinstance(expected, str):
        with pytest.raises(UnreadableImageError) as caught:
            read_image(file)
        assert str(file) in str(caught.value)
        assert expected in str(caught.value)
        assert "\n" not in str(caught.value)
        return
    image = read_image(file)
    assert image.shape == (*expected, 3)
    assert image.dtype == np.uint8


@pytest.mark.parametrize(
    "name",
    [
        "1_trns.png",  # what is transparent in the three is white anyway
        "l_trns.png",
        "chi.gif",
        "broken_exif_dpi.jpg",
        "hopper.webp",
        "hopper_16bit.pgm",
        "hopper_gray.jpg",
        "hopper_orientation_5.jpg",
        "multipage.tiff",
    ],
)
def test_awkward_file_equals_what_opencv_reads(real_data: Path, name: str) -> None:
    file = real_data / "awkward" / name
    if not cv2.haveImageReader(str(file)):
        pytest.skip(f"OpenCV {cv2.__version__} does not read {file.suffix}")
    difference = np.abs(read_image(file).astype(int) - by_opencv(file))
    assert difference.max() <= 2  # decoders round differently
    assert difference.mean() < 0.5


# Upright from what lies in the file, by the tag's definition: 3 is half a turn, 6 was taken with the camera turned left.
UNDO: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: np.fliplr,
    3: lambda stored: np.rot90(stored, 2),
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, -1),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", UNDO)
def test_exif_rotated_photo_is_upright(real_data: Path, orientation: int) -> None:
    file = real_data / "awkward" / f"hopper_orientation_{orientation}.jpg"
    image = read_image(file)
    np.testing.assert_array_equal(image, UNDO[orientation](np.asarray(Image.open(file))))
    upright = read_image(real_data / "awkward" / "hopper.webp").astype(int)
    turned = [np.rot90(picture, quarters) for picture in (upright, np.fliplr(upright)) for quarters in range(4)]
    differences = [np.abs(image - picture).mean() for picture in turned]
    assert differences[0] < 10  # two lossy encodings of one photo
    assert min(differences[1:]) > 50


def test_deep_grey_is_scaled_from_the_bits_in_use(real_data: Path) -> None:
    file = real_data / "awkward" / "16bit.cropped.tif"
    stored = by_opencv(file, cv2.IMREAD_UNCHANGED)
    assert (stored.min(), stored.max()) == (291, 694)  # less than 1024: a 10-bit sensor
    image = read_image(file)
    np.testing.assert_array_equal(image, grey(np.rint(stored / 1023 * 255)))
    assert (image.min(), image.max()) == (73, 173)  # neither black nor clipped

    file = real_data / "awkward" / "hopper_16bit.pgm"
    stored = np.frombuffer(file.read_bytes()[-128 * 128 * 2 :], ">u2").reshape(128, 128)
    np.testing.assert_array_equal(read_image(file), grey(stored >> 8))  # all are multiples of 257

    file = real_data / "awkward" / "i_trns.png"  # values up to 255 in 16 bits
    np.testing.assert_array_equal(read_image(file), grey(by_opencv(file, cv2.IMREAD_UNCHANGED)))


def test_cmyk_photo(real_data: Path) -> None:
    file = real_data / "awkward" / "pil_sample_cmyk.jpg"
    image = read_image(file).astype(int)
    with Image.open(file) as stored:
        assert stored.mode == "CMYK"
        cyan, magenta, yellow, key = np.moveaxis(np.asarray(stored).astype(float), -1, 0)
    expected = np.stack([(255 - ink) * (255 - key) / 255 for ink in (cyan, magenta, yellow)], axis=-1)
    assert np.abs(image - expected).max() <= 1
    assert np.abs(image - by_opencv(file)).max() <= 2
    assert image[0, 0].tolist() == [255, 13, 25]  # the picture shows RED in red on black
    assert image[0, -1].max() < 20


def test_palette_with_a_transparent_entry(real_data: Path) -> None:
    file = real_data / "awkward" / "p_trns_single.png"
    with Image.open(file) as stored:
        index, palette = np.asarray(stored), np.array(stored.getpalette()).reshape(-1, 3)
        assert stored.info["transparency"] == 164
    palette[164] = 255
    np.testing.assert_array_equal(read_image(file), palette[index])
    assert (index == 164).mean() > 0.2


def test_alpha_is_laid_over_white(real_data: Path) -> None:
    file = real_data / "awkward" / "uncompressed_la.png"
    rgba = by_opencv(file, cv2.IMREAD_UNCHANGED).astype(float)
    assert np.abs(read_image(file) - on_white(rgba[..., :3], rgba[..., 3:])).max() <= 1
    file = real_data / "awkward" / "tiff_16bit_RGBa.tiff"
    premultiplied = by_opencv(file, cv2.IMREAD_UNCHANGED) / 257  # 16 bits; the colour holds its alpha already
    # Pillow divides by an alpha of 8 bits and multiplies again, which costs up to three levels.
    assert np.abs(read_image(file) - (premultiplied[..., :3] + 255 - premultiplied[..., 3:])).max() <= 3


def test_first_frame_of_several(real_data: Path) -> None:
    file = real_data / "awkward" / "multipage.tiff"
    with Image.open(file) as stored:
        assert getattr(stored, "n_frames", 1) == 3  # green, red, blue
    assert np.unique(read_image(file).reshape(-1, 3), axis=0).tolist() == [[0, 128, 0]]


def test_grey_photo_shows_the_same_as_the_coloured_one(real_data: Path) -> None:
    image = read_image(real_data / "awkward" / "hopper_gray.jpg")
    luma = read_image(real_data / "awkward" / "hopper.webp") @ np.array([0.299, 0.587, 0.114])  # BT.601
    assert np.ptp(image, axis=2).max() == 0
    assert np.abs(image[..., 0] - luma).mean() < 5


# --------------------------------------------------------------------------------------------- drawn pictures

RAMP = np.array([[0, 51, 102], [153, 204, 255]], dtype=np.uint8)  # [2, 3]
COLOURS = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[255, 255, 255], [0, 0, 0], [200, 100, 50]]], dtype=np.uint8)
ALPHA = np.array([[0, 255, 128], [255, 64, 255]], dtype=np.uint8)


PALETTE = COLOURS.reshape(-1, 3)
Drawn = tuple[Image.Image, np.ndarray]  # a picture from its raw values, and the RGB that its mode's definition gives them


def planes(mode: str, *bands: np.ndarray) -> Image.Image:
    return Image.merge(mode, [Image.fromarray(np.asarray(band, dtype=np.uint8)) for band in bands])


def grey_with_alpha() -> Drawn:
    return planes("LA", RAMP, ALPHA), on_white(grey(RAMP), ALPHA[..., None])


def palette() -> Drawn:
    image = Image.frombytes("P", (3, 2), bytes([5, 4, 3, 2, 1, 0]))
    image.putpalette(PALETTE.tobytes())
    return image, PALETTE[[5, 4, 3, 2, 1, 0]].reshape(2, 3, 3)


def palette_with_alpha() -> Drawn:
    image = Image.frombytes("PA", (3, 2), np.stack([np.arange(6, dtype=np.uint8), ALPHA.ravel()], axis=1).tobytes())
    image.putpalette(PALETTE.tobytes())
    return image, on_white(COLOURS, ALPHA[..., None])


def premultiplied() -> Drawn:
    colour = (COLOURS * (ALPHA[..., None] / 255)).round()
    image = Image.frombytes("RGBa", (3, 2), np.dstack([colour, ALPHA]).astype(np.uint8).tobytes())
    return image, colour + 255 - ALPHA[..., None]


def cmyk() -> Drawn:
    key = np.full_like(RAMP, 51)  # a fifth of black
    return planes("CMYK", *np.moveaxis(255 - COLOURS, -1, 0), key), COLOURS * (204 / 255)


def ycbcr() -> Drawn:
    """JFIF's definition."""
    blue, red = np.array([[128, 90, 128], [128, 160, 128]]), np.array([[128, 128, 170], [128, 128, 100]])
    green = RAMP - 0.344136 * (blue - 128.0) - 0.714136 * (red - 128.0)
    expected = np.stack([RAMP + 1.402 * (red - 128.0), green, RAMP + 1.772 * (blue - 128.0)], axis=-1)
    return planes("YCbCr", RAMP, blue, red), expected.clip(0, 255)


def lab() -> Drawn:
    """Greys (a and b are 0): Y = ((L + 16) / 116)^3, then sRGB's curve."""
    lightness = RAMP / 2.55
    linear = np.where(lightness > 8, ((lightness + 16) / 116) ** 3, lightness / 903.3)
    curve = np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
    return planes("LAB", RAMP, np.full_like(RAMP, 128), np.full_like(RAMP, 128)), grey(curve * 255)


def hsv() -> Drawn:
    hue, saturation = np.array([[0, 85, 170], [43, 128, 200]]), np.array([[255, 255, 255], [128, 0, 64]])
    rows = zip(hue.ravel() / 255, saturation.ravel() / 255, RAMP.ravel() / 255)
    return planes("HSV", hue, saturation, RAMP), np.array([colorsys.hsv_to_rgb(*row) for row in rows]).reshape(2, 3, 3) * 255


def deep(mode: str, dtype: str) -> Drawn:
    return Image.frombytes(mode, (3, 2), (RAMP.astype(dtype) * 257).astype(dtype).tobytes()), grey(RAMP)  # 255 is 65535


MODES: dict[str, tuple[Callable[[], Drawn], int]] = {  # and how far Pillow's integers may lie from the definition
    "1": (lambda: (Image.fromarray(RAMP > 127), grey(np.where(RAMP > 127, 255, 0))), 0),
    "L": (lambda: (Image.fromarray(RAMP), grey(RAMP)), 0),
    "LA": (grey_with_alpha, 1),
    "P": (palette, 0),
    "PA": (palette_with_alpha, 1),
    "RGB": (lambda: (Image.fromarray(COLOURS), COLOURS), 0),
    "RGBA": (lambda: (Image.fromarray(np.dstack([COLOURS, ALPHA])), on_white(COLOURS, ALPHA[..., None])), 1),
    "RGBa": (premultiplied, 2),
    "CMYK": (cmyk, 1),
    "YCbCr": (ycbcr, 2),
    "LAB": (lab, 2),
    "HSV": (hsv, 2),
    "I": (lambda: deep("I", "i4"), 0),
    "F": (lambda: (Image.fromarray((RAMP / 255).astype(np.float32)), grey(RAMP)), 0),
    "I;16": (lambda: deep("I;16", "<u2"), 0),
    "I;16L": (lambda: deep("I;16L", "<u2"), 0),
    "I;16B": (lambda: deep("I;16B", ">u2"), 0),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode(mode: str) -> None:
    draw, tolerance = MODES[mode]
    image, expected = draw()
    assert image.mode == mode
    result = to_rgb(image)
    assert result.dtype == np.uint8
    assert result.shape == (2, 3, 3)
    assert np.abs(result - np.asarray(expected, dtype=float)).max() <= tolerance


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_turned_by_exif(mode: str) -> None:
    image, _ = MODES[mode][0]()
    upright = to_rgb(image)
    image.getexif()[0x0112] = 6  # shown after a quarter turn clockwise
    np.testing.assert_array_equal(to_rgb(image), np.rot90(upright, -1))


# The tag's definition (TIFF 6, CIPA DC-008): which visual side row 0 and column 0 of the file are.
# stored[r, c] = upright[...] with H rows and W columns upright.
STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda p: p,  # top, left
    2: lambda p: p[:, ::-1],  # top, right
    3: lambda p: p[::-1, ::-1],  # bottom, right
    4: lambda p: p[::-1],  # bottom, left
    5: lambda p: np.array([[p[c, r] for c in range(p.shape[0])] for r in range(p.shape[1])]),  # left, top
    6: lambda p: np.array([[p[c, -1 - r] for c in range(p.shape[0])] for r in range(p.shape[1])]),  # right, top
    7: lambda p: np.array([[p[-1 - c, -1 - r] for c in range(p.shape[0])] for r in range(p.shape[1])]),  # right, bottom
    8: lambda p: np.array([[p[-1 - c, r] for c in range(p.shape[0])] for r in range(p.shape[1])]),  # left, bottom
}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    upright = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / "turned.png"
    Image.fromarray(np.ascontiguousarray(STORED[orientation](upright))).save(file, exif=exif)
    np.testing.assert_array_equal(read_image(file), upright)


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_meaningless_orientation_is_ignored(tmp_path: Path, value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    file = tmp_path / "odd.png"
    Image.fromarray(COLOURS).save(file, exif=exif)
    np.testing.assert_array_equal(read_image(file), COLOURS)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 128, 255], [0, 128, 255]),  # 8 bits in 16
        ([0, 512, 1023], [0, 128, 255]),  # 10 bits
        ([0, 2048, 4095], [0, 128, 255]),  # 12
        ([0, 16383, 8192], [0, 255, 128]),  # 14
        ([0, 32768, 65535], [0, 128, 255]),  # 16
        ([0, 0, 0], [0, 0, 0]),
    ],
)
def test_depth_of_16_bit_grey(values: list[int], expected: list[int]) -> None:
    image = Image.fromarray(np.array([values], dtype=np.uint16))
    assert image.mode == "I;16"
    np.testing.assert_array_equal(to_rgb(image), grey(np.array([expected])))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),  # 127.5 rounds to even
        ([0.0, np.nan, 1.0], [0, 0, 255]),
        ([0.25, 1.0, np.inf], [64, 255, 255]),  # one overexposed pixel does not turn the others black
        ([-np.inf, -1.0, 0.5], [0, 0, 128]),
        ([np.nan, np.nan, np.nan], [0, 0, 0]),
        ([0.0, 2048.0, 4095.0], [0, 128, 255]),
        ([0.0, 1e30, np.inf], [0, 255, 255]),
    ],
)
def test_float_pictures(values: list[float], expected: list[int]) -> None:
    image = Image.fromarray(np.array([values], dtype=np.float32))
    np.testing.assert_array_equal(to_rgb(image), grey(np.array([expected])))


def test_negative_numbers_of_mode_i_are_black() -> None:
    assert to_rgb(Image.fromarray(np.array([[-5, 0, 255]], dtype=np.int32)))[0, :, 0].tolist() == [0, 0, 255]


def test_result_is_writable_and_contiguous(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.fromarray(COLOURS).save(file)
    image = read_image(file)
    assert image.flags.writeable and image.flags.c_contiguous


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("missing.jpg", None, "no such file"),
        ("empty.jpg", b"", "not an image"),
        ("page.jpg", b"<!DOCTYPE html><html></html>", "not an image"),
        ("notes.png", b"\x89PNG\r\n\x1a\n", "not an image"),
    ],
)
def test_no_image(tmp_path: Path, name: str, content: bytes | None, reason: str) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UnreadableImageError) as caught:
        read_image(file)
    assert str(caught.value).startswith(str(file)) and reason in str(caught.value)


def test_folder_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImageError, match=str(tmp_path)):
        read_image(tmp_path)


def test_unreadable_is_the_users_to_mend() -> None:
    assert issubclass(UnreadableImageError, UserError)


@settings(deadline=None)
@given(data=st.data())
def test_damaged_files_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    file = tmp_path_factory.getbasetemp() / "damaged.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.kron(COLOURS, np.ones((8, 8, 1), np.uint8))).save(file, format="jpeg", exif=exif)
    content = bytearray(file.read_bytes())
    for place, value in data.draw(st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=5)):
        content[place] = value
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        image = read_image(file)
    except UnreadableImageError as error:
        assert "\n" not in str(error)
    else:
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size > 0


def test_the_picture_given_is_left_as_it_was() -> None:
    for orientation in (1, 6):
        image = Image.fromarray(COLOURS)
        image.getexif()[0x0112] = orientation
        to_rgb(image)[:] = 7
        assert image.size == (3, 2) and image.getexif()[0x0112] == orientation
        np.testing.assert_array_equal(np.asarray(image), COLOURS)


# ---------------------------------------------------------------------------------------------- decoding at a part

BLOCKS = np.random.default_rng(0).integers(0, 256, (25, 38, 3), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)  # 200 x 304


def jpeg(folder: Path, orientation: int = 1) -> Path:
    """Each 8 x 8 block of the file has one colour: decoded at an eighth it is one pixel of it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(BLOCKS).save(folder / "blocks.jpg", quality=100, subsampling=0, exif=exif)
    return folder / "blocks.jpg"


@pytest.mark.parametrize(
    ("wanted", "decoded"),
    [
        ((25, 38), (25, 38)),  # an eighth
        ((26, 38), (50, 76)),  # which would be too low
        ((25, 39), (50, 76)),  # or too narrow
        ((50, 60), (50, 76)),
        ((51, 76), (100, 152)),
        ((100, 152), (100, 152)),
        ((101, 152), (200, 304)),
        ((800, 1216), (200, 304)),
        ((1, 1), (25, 38)),  # no decoder goes further
    ],
)
def test_jpeg_is_decoded_at_the_smallest_part_that_is_enough(
    tmp_path: Path, wanted: tuple[int, int], decoded: tuple[int, int]
) -> None:
    image, size = read_reduced(jpeg(tmp_path), lambda full: wanted if full == (200, 304) else full)
    assert size == (200, 304) and image.shape == (*decoded, 3)
    expected = BLOCKS[:: 200 // decoded[0], :: 304 // decoded[1]]
    assert np.abs(image.astype(int) - expected).max() <= 3  # the file's colours are rounded, and converted to and fro


def test_part_of_a_turned_jpeg(tmp_path: Path) -> None:
    upright, _ = read_reduced(jpeg(tmp_path), lambda size: (25, 38))
    asked: list[tuple[int, int]] = []

    def wanted(size: tuple[int, int]) -> tuple[int, int]:
        asked.append(size)
        return 38, 25

    turned, size = read_reduced(jpeg(tmp_path, orientation=6), wanted)
    assert asked == [size] == [(304, 200)]  # (height, width) as it is shown, not as it is stored
    np.testing.assert_array_equal(turned, np.rot90(upright, -1))


def test_files_that_cannot_be_decoded_at_a_part_are_decoded_in_full(tmp_path: Path, real_data: Path) -> None:
    Image.fromarray(BLOCKS).save(tmp_path / "blocks.png")
    for file in [tmp_path / "blocks.png", *(real_data / "awkward").iterdir()]:
        if isinstance(AWKWARD.get(file.name), str) or file.suffix == ".Pillow":
            continue
        full = read_image(file)
        image, size = read_reduced(file, lambda size: (max(1, size[0] // 2), max(1, size[1] // 2)))
        assert size == full.shape[:2], file
        if file.suffix != ".jpg":
            np.testing.assert_array_equal(image, full)
        else:
            assert image.shape == (*(-(-side // 2) for side in size), 3), file


def test_faults_are_the_same_at_a_part(tmp_path: Path, real_data: Path) -> None:
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(jpeg(tmp_path).read_bytes()[:-2000])
    for file in (cut, tmp_path / "missing.jpg", real_data / "awkward" / "decompression_bomb.gif"):
        messages = []
        for read in (read_image, lambda path: read_reduced(path, lambda size: (1, 1))):
            with pytest.raises(UnreadableImageError, match=str(file)) as caught:
                read(file)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


def test_photos_decoded_at_a_part_look_the_same(real_data: Path) -> None:
    """And nearer to the mean of the pixels that each new one covers, which bilinear resizing does not look at."""
    differences = []
    for file in sorted((real_data / "coco_mini").rglob("*.jpg"))[:20]:
        full = read_image(file)
        part, size = read_reduced(file, lambda size: resized_size(size, 120, 1333))
        new = resized_size(size, 120, 1333)
        assert size == full.shape[:2] and new[0] <= part.shape[0] <= size[0] // 2 + 1
        mean = cv2.resize(full, new[::-1], interpolation=cv2.INTER_AREA).astype(int)
        pictures = (resize(full, new) - mean, resize(part, new) - mean, resize(full, new).astype(int) - resize(part, new))
        differences.append([np.abs(picture).mean() for picture in pictures])
    of_full, of_part, between = np.mean(differences, axis=0)
    assert of_part < 4 < of_full and between < 8  # 2.7, 5.7 and 6.3 grey levels of 255


# ----------------------------------------------------------------------------------------------------- resizing


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (800, 1067)),  # x 5/3: 1066.67
        ((640, 480), (1067, 800)),
        ((800, 1333), (800, 1333)),
        ((427, 640), (800, 1199)),  # x 800/427: 1199.06
        ((400, 1000), (533, 1333)),  # the long edge limits: x 1.333 gives 533.2
        ((1000, 400), (1333, 533)),
        ((2000, 2000), (800, 800)),
        ((1, 1), (800, 800)),
        ((1, 100_000), (1, 1333)),  # 0.013 would round to 0
        ((100_000, 1), (1333, 1)),
    ],
)
def test_resized_size(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert resized_size(size, 800, 1333) == expected


@pytest.mark.parametrize("size", [(48, 64), (64, 48), (427, 640), (400, 1000), (617, 243), (77, 77), (50, 31), (30, 500)])
def test_resized_size_rounded_down_is_torchvisions(size: tuple[int, int]) -> None:
    resized, _ = GeneralizedRCNNTransform(80, 133, [0.0] * 3, [1.0] * 3).resize(torch.zeros(3, *size), None)
    assert resized_size(size, 80, 133, "floor") == tuple(resized.shape[1:])


@settings(deadline=None)
@given(st.integers(1, 20_000), st.integers(1, 20_000), st.integers(32, 2000), st.integers(32, 2000))
def test_resized_size_reaches_a_limit_and_passes_none(height: int, width: int, short_edge: int, long_edge: int) -> None:
    new = resized_size((height, width), short_edge, long_edge)
    assert min(new) >= 1
    assert max(new) <= long_edge
    assert min(new) <= short_edge
    assert min(new) == short_edge or max(new) == long_edge
    assert (new[0] <= new[1]) if height <= width else (new[0] >= new[1])


@pytest.mark.parametrize(
    ("old", "new"),
    [((5, 7), (13, 11)), ((40, 30), (20, 15)), ((64, 48), (100, 75)), ((97, 33), (41, 14)), ((1, 1), (4, 3)), ((9, 1), (3, 5))],
)
def test_resize_is_bilinear_as_torch_does_it(old: tuple[int, int], new: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*old, 3), dtype=np.uint8)
    as_tensor = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    expected = F.interpolate(as_tensor, size=new, mode="bilinear", align_corners=False, antialias=False)
    result = resize(image, new)
    assert result.dtype == np.uint8 and result.shape == (*new, 3)
    # OpenCV weighs in steps of 1/2048 and rounds: less than one level
    assert np.abs(result - expected[0].permute(1, 2, 0).numpy()).max() < 1


def test_resize_by_hand() -> None:
    image = grey(np.array([[0, 100]], dtype=np.uint8))
    # centres of 4 new pixels lie at -0.25, 0.25, 0.75, 1.25 of the old ones; outside the border is repeated
    assert resize(image, (1, 4))[0, :, 0].tolist() == [0, 25, 75, 100]


def test_resize_to_the_same_size_changes_nothing() -> None:
    np.testing.assert_array_equal(resize(COLOURS, (2, 3)), COLOURS)
