"""retinanet/checks: each kind of fault is found where it was put, a sound data set has none, and the mended copy is sound."""

import json
import re
import struct
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from retinanet.checks.boxes import box_faults, neighbours
from retinanet.checks.check import Check, check, statistics
from retinanet.checks.kinds import KINDS
from retinanet.checks.kinds import REFUSED as REFUSED_KINDS
from retinanet.checks.mend import mend
from retinanet.checks.pictures import Pictures, look_at, look_at_all
from retinanet.checks.report import GREEN, GREY, RED, draw, report, verdict, worst_pictures
from retinanet.checks.splits import repeated_pictures
from retinanet.config import Config, DatasetConfig, InputConfig, parse_config
from retinanet.data.annotations import AnnotationRow, Annotations, ImageRow
from retinanet.data.coco import load_coco
from retinanet.data.faults import Fault
from retinanet.data.formats import load_dataset
from retinanet.data.images import UnreadableImageError, read_image
from retinanet.data.voc import load_voc
from retinanet.data.writers import write_coco
from retinanet.structures import Category

WIDTH, HEIGHT = 100, 80
CONFIG = parse_config({"input": {"short_edge": HEIGHT, "long_edge": 133}})  # pictures of that size keep it in training
FITTING = [30, 20, 36, 36]  # 32 x 32 anchors lie at 28, 36, ... in x: IoU 0.71 with the nearest of them alone


def picture(seed: int, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Image.Image:
    """Soft spots, other ones for each seed."""
    spots = np.random.default_rng(seed).integers(0, 255, (12, 12, 3), dtype=np.uint8)
    return Image.fromarray(spots).resize(size, Image.Resampling.BICUBIC)


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG whose header tells a size that its pixels do not have."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0" * 100)
    chunks = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, data, b"IEND"))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


class Coco:
    """A COCO file in the making."""

    def __init__(self, folder: Path, classes: dict[int, str]) -> None:
        self.folder = folder
        folder.mkdir()
        self.content: dict[str, Any] = {"images": [], "annotations": []}
        self.content["categories"] = [{"id": number, "name": name} for number, name in classes.items()]

    def image(self, number: int, name: str, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Path:
        self.content["images"].append({"id": number, "file_name": name, "width": size[0], "height": size[1]})
        return self.folder / name

    def box(self, number: int, image: Any, category: int, box: Any, **more: Any) -> None:
        entry = {"id": number, "image_id": image, "category_id": category, "bbox": box, **more}
        self.content["annotations"].append(entry)

    def load(self, faults: list[Fault] | None = None) -> Annotations:
        file = self.folder.with_suffix(".json")
        file.write_text(json.dumps(self.content))
        return load_coco(file, self.folder, faults)


def make_faulty(root: Path) -> tuple[Coco, Coco]:
    """A training and a validation set with each fault once; EXPECTED lists them."""
    train = Coco(root / "train", {1: "common", 3: "rare", 9: "never"})
    for number, name in enumerate(("good.png", "boxes.png", "many.png", "twice.png", "empty.png", "film.png"), start=1):
        picture(number).save(train.image(number, name))
    train.image(7, "twice.png")
    train.image(10, "missing.png")
    train.image(11, "broken.png").write_bytes(b"<html>404</html>")
    whole = train.folder / "whole.png"
    picture(12).save(whole)
    train.image(12, "truncated.png").write_bytes(whole.read_bytes()[:-2000])
    whole.unlink()
    train.image(13, "huge.png").write_bytes(png_that_claims(20_000, 20_000))
    picture(14).save(train.image(14, "mismatch.png", (50, 50)))
    tag = Image.Exif()
    tag[0x0112] = 6  # turn by 90 degrees to see it upright
    picture(15).save(train.image(15, "rotated.jpg"), exif=tag)
    picture(16).convert("RGBA").save(train.image(16, "alpha.png"))
    picture(17).convert("CMYK").save(train.image(17, "cmyk.jpg"))
    Image.fromarray(np.asarray(picture(18).convert("L")).astype(np.uint16) * 256).save(train.image(18, "deep.png"))
    train.image(19, "copy.png").write_bytes((train.folder / "good.png").read_bytes())
    picture(6).resize((70, 56)).save(train.image(20, "smaller.jpg", (70, 56)), quality=70)  # of film.png
    picture(21).save(train.folder / "unlisted.png")

    for number, image in enumerate((1, 3, 4, 6, 7, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20), start=100):
        train.box(number, image, 1, [10, 5, 36, 30])
    train.box(1, 2, 1, [30, 20, 0, 10])
    train.box(2, 2, 1, [30, 20, -10, 10])
    train.box(3, 2, 1, [100, 20, 10, 10])  # begins where the picture ends
    train.box(4, 2, 1, [70, 40, 32, 30])  # two pixels over the border
    train.box(5, 2, 1, [10, 10, 30, 30])
    train.box(6, 2, 1, [10.5, 10, 30, 30])
    train.box(7, 2, 3, [50, 20, 30, 30])
    train.box(8, 2, 1, [50, 20, 30, 30])
    train.box(9, 2, 1, [20, 60, 3.5, 8])
    train.box(10, 2, 1, [5, 70, 55, 5])
    train.box(11, 2, 3, [0, 0, WIDTH, HEIGHT])
    train.box(12, 1, 3, [50, 40, 30, 30])
    train.box(12, 2, 1, [60, 2, 36, 16])
    for n in range(300):  # 20 in a row; with annotation 101 that is one too many
        train.box(1000 + n, 3, 1, [n % 20 * 5, n // 20 * 5, 4.5, 4.5])

    train.image(1, "again.png")
    train.image(30, "../outside.png")
    train.content["images"].append({"file_name": "no id.png"})
    train.box(50, 1, 4, FITTING)
    train.box(51, 77, 1, FITTING)
    train.box(52, 1, 1, [1, 2, float("nan"), 4])
    train.box(53, 1, 1, [1, 2, 3])
    train.box(54, 1, 1, FITTING, area="large")

    val = Coco(root / "val", {1: "common", 3: "rare"})
    picture(40).save(val.image(1, "good.png"))
    val.image(2, "leak.png").write_bytes((train.folder / "good.png").read_bytes())
    picture(6).save(val.image(3, "next.jpg"), quality=60)
    for number in (1, 2, 3):
        val.box(number, number, 1, FITTING)
    val.box(4, 1, 3, [10, 10, 80, 60], iscrowd=1)
    return train, val


T, V = "train", "val"
EXPECTED: dict[str, list[tuple[str, str, int | None]]] = {
    "unusable entry": [(T, "train.json", None), (T, "train.json", 54)],
    "unusable file name": [(T, "train.json", None)],
    "unusable box": [(T, "train.json", 52), (T, "train.json", 53)],
    "unknown class": [(T, "train.json", 50)],
    "unknown image id": [(T, "train.json", 51)],
    "duplicate image id": [(T, "train.json", None)],
    "missing image": [(T, "missing.png", None)],
    "unreadable image": [(T, "broken.png", None)],
    "truncated image": [(T, "truncated.png", None)],
    "huge image": [(T, "huge.png", None)],
    "size mismatch": [(T, "mismatch.png", None)],
    "rotated size": [(T, "rotated.jpg", None)],
    "converted image": [(T, "alpha.png", None), (T, "cmyk.jpg", None), (T, "deep.png", None)],
    "duplicate file name": [(T, "twice.png", None)],
    "unlisted image": [(T, "unlisted.png", None)],
    "identical images": [(T, "copy.png", None), (T, "twice.png", None)],
    "near-identical images": [(T, "smaller.jpg", None)],
    "identical images across splits": [(V, "leak.png", None)],
    "near-identical images across splits": [(V, "next.jpg", None)],
    "zero-size box": [(T, "boxes.png", 1)],
    "negative box": [(T, "boxes.png", 2)],
    "outside box": [(T, "boxes.png", 3)],
    "border box": [(T, "boxes.png", 4)],
    "duplicate box": [(T, "boxes.png", 6)],
    "two classes on a box": [(T, "boxes.png", 8)],
    "tiny box": [(T, "boxes.png", 9)],
    "extreme box": [(T, "boxes.png", 10)],
    "whole-image box": [(T, "boxes.png", 11)],
    "duplicate annotation id": [(T, "boxes.png", 12)],
    "image without boxes": [(T, "empty.png", None)],
    "many boxes": [(T, "many.png", None)],
    "crowd boxes": [(V, "val.json", None)],
    "many crowds": [(V, "val.json", None)],  # one of four
    "class without boxes": [(T, "train.json", None)],
    "rare class": [(T, "train.json", None)],
    "class id gap": [(T, "train.json", None), (V, "val.json", None)],
    "class missing in a split": [(V, "val.json", None)],  # rare: 3 boxes in train, in val a crowd only
    "classes differ": [(V, "val.json", None)],
    "anchors miss boxes": [(T, "train.json", None)],  # the 300 boxes of 4.5 pixels
}


def check_both(train: Coco, val: Coco) -> Check:
    refused: dict[str, list[Fault]] = {"train": [], "val": []}
    return check({name: coco.load(refused[name]) for name, coco in (("train", train), ("val", val))}, refused, CONFIG)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Check:
    return check_both(*make_faulty(tmp_path_factory.mktemp("faulty")))


def found(result: Check, kind: str) -> list[tuple[str, str, int | None]]:
    return sorted(
        (
            (split, Path(f.file).name, f.annotation)
            for split, faults in result.findings.items()
            for f in faults
            if f.kind == kind
        ),
        key=str,
    )


@pytest.mark.parametrize("kind", EXPECTED)
def test_each_fault_is_found_where_it_is_and_nowhere_else(faulty: Check, kind: str) -> None:
    assert found(faulty, kind) == sorted(EXPECTED[kind], key=str)


def test_the_faulty_data_set_has_every_kind(faulty: Check) -> None:
    assert set(EXPECTED) == set(KINDS) - {"missing label file", "label file without image"}  # YOLO's; below
    assert all("\n" not in f.message and f.message for faults in faulty.findings.values() for f in faults)
    places = [file for faults in faulty.findings.values() for f in faults if (file := Path(f.file)).suffix != ".json"]
    assert {file.name for file in places if not file.is_file()} == {"missing.png"}


def test_the_documents_list_every_kind() -> None:
    text = (Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
    for kind, (severity, hint) in KINDS.items():
        assert f"| {kind} | {severity} | {hint} |" in text


def test_readers_note_only_kinds_that_are_known() -> None:
    """As strings in the source: the readers are below the checks and cannot import their table."""
    source = "".join(file.read_text() for file in (Path(__file__).parent.parent / "retinanet" / "data").glob("*.py"))
    kinds = set(re.findall(r'(?:DataError|Fault)\(\s*"([^"]+)"', source))
    assert kinds == REFUSED_KINDS | {"missing label file", "missing image"} and kinds < set(KINDS)


def test_rows_and_report(faulty: Check) -> None:
    rows = faulty.rows()
    assert len(rows) == sum(map(len, EXPECTED.values()))
    (row,) = (row for row in rows if row["kind"] == "outside box")
    assert row["severity"] == "error" and row["annotation"] == 3 and row["split"] == "train"
    assert row["hint"] == KINDS["outside box"].hint and "[100, 20, 10, 10] in 100 x 80 pixels" in row["message"]
    numbers = {
        name: statistics(data, faulty.sizes[name], faulty.coverage[name], CONFIG) for name, data in faulty.splits.items()
    }
    text = report(faulty, numbers, named=1)
    assert "error: unusable box: 2" in text and "... and 1 more" in text
    assert "annotation 52" in text and "annotation 53" not in text
    errors = [kind for kind, where in EXPECTED.items() for _ in where if KINDS[kind].severity == "error"]
    assert verdict(faulty).strip().startswith(f"not fit to train: {len(errors)} errors. First: unusable entry (2)")


def test_statistics(faulty: Check) -> None:
    """val: three boxes of 36 x 36, which are medium (32^2 .. 96^2), in pictures that keep their size."""
    numbers = statistics(faulty.splits["val"], faulty.sizes["val"], faulty.coverage["val"], CONFIG)
    assert numbers == {
        "images": 3,
        "images_without_boxes": 0,
        "boxes": 3,
        "crowds": 1,
        "classes": {"common": 3, "rare": 0},
        "box_sizes": {"small": 0, "medium": 3, "large": 0},
        "image_sizes": [[80, 100]] * 3,
        "image_sizes_in_training": [[80, 100]] * 3,
    }
    assert statistics(faulty.splits["val"], np.zeros((3, 2), np.int64), faulty.coverage["val"], CONFIG)["image_sizes"] == []


def test_worst_pictures_come_first_and_unreadable_ones_not_at_all(faulty: Check) -> None:
    data = faulty.splits["train"]
    names = [(split, faulty.splits[split].path(index).name) for split, index in worst_pictures(faulty)]
    assert names[:2] == [("train", "many.png"), ("train", "boxes.png")]
    assert len(names) == len(data) - 4 + 3  # missing, broken, truncated, huge


def sound(root: Path, name: str, seed: int, *, images: int = 6) -> Coco:
    """Two classes, ten boxes and more of each, all of them 36 x 36."""
    coco = Coco(root / name, {1: "red", 2: "green"})
    for n in range(images):
        picture(seed + n).save(coco.image(n + 1, f"{n}.png"))
        for k, (x, y) in enumerate(((4, 2), (52, 2), (4, 42), (52, 42))):
            coco.box(4 * n + k + 1, n + 1, 1 + k % 2, [x, y, 36, 36])
    return coco


def test_a_sound_data_set_has_no_findings(tmp_path: Path) -> None:
    result = check_both(sound(tmp_path, "train", 100), sound(tmp_path, "val", 200))
    assert result.findings == {"train": [], "val": []}
    assert verdict(result).strip() == "fit to train"


def test_warnings_alone_leave_it_fit(tmp_path: Path) -> None:
    result = check_both(sound(tmp_path, "train", 100, images=4), sound(tmp_path, "val", 200))  # 8 boxes of each class
    assert [f.kind for f in result.findings["train"]] == ["rare class", "rare class"] and not result.findings["val"]
    assert verdict(result).strip().startswith("fit to train, with warnings: 2 warnings. First: rare class (2)")


def mended(result: Check, way: Any, folder: Path) -> tuple[Check, Counter[str]]:
    """The check of what `mend` wrote."""
    splits, changes = {}, Counter[str]()
    for name, data in result.splits.items():
        fixed, done = mend(result, name, way)
        write_coco({name: fixed}, folder)
        splits[name] = load_coco(folder / f"{name}.json", data.image_dir)
        changes += done
    return check(splits, {name: [] for name in splits}, CONFIG), changes


def errors(result: Check) -> set[str]:
    return {f.kind for faults in result.findings.values() for f in faults if KINDS[f.kind].severity == "error"}


def boxes_of(data: Annotations, name: str) -> list[list[float]]:
    (index,) = (n for n in range(len(data)) if data.file_names[n] == name)
    return data.coco_boxes[data.offsets[index] : data.offsets[index + 1]].tolist()


REFUSED = {"unusable entry": 2, "unusable file name": 1, "unusable box": 2} | dict.fromkeys(
    ("unknown class", "unknown image id", "duplicate image id"), 1
)
LOST = dict.fromkeys(("missing image", "unreadable image", "truncated image", "huge image"), 1)
LOST |= dict.fromkeys(("zero-size box", "negative box", "outside box", "duplicate box"), 1)


def test_clip_leaves_only_what_the_user_must_decide(faulty: Check, tmp_path: Path) -> None:
    result, done = mended(faulty, "clip", tmp_path)
    undecided = {"size mismatch", "rotated size", "duplicate file name", "identical images across splits", "classes differ"}
    assert errors(result) == undecided
    assert done == REFUSED | LOST | {"border box, clipped": 1}
    assert not found(result, "border box") and not found(result, "duplicate box")
    kept = boxes_of(result.splits["train"], "boxes.png")
    assert kept[:2] == [[70, 40, 30, 30], [10, 10, 30, 30]]  # the first was 32 wide, from 70 to 102
    assert len(kept) == 12 - 4
    assert len(result.splits["train"]) == len(faulty.splits["train"]) - 4


def test_drop_leaves_no_error(faulty: Check, tmp_path: Path) -> None:
    result, done = mended(faulty, "drop", tmp_path)
    assert errors(result) == {"classes differ"}  # no entry's fault
    kinds = ("border box", "two classes on a box", "size mismatch", "rotated size", "duplicate file name")
    assert done == REFUSED | LOST | dict.fromkeys((*kinds, "identical images across splits"), 1)
    assert not found(result, "border box") and not found(result, "two classes on a box")
    assert [result.splits["val"].file_names[n] for n in range(2)] == ["good.png", "next.jpg"]
    assert boxes_of(result.splits["train"], "boxes.png")[0] == [10, 10, 30, 30]


def test_a_sound_data_set_is_mended_into_itself(tmp_path: Path) -> None:
    before = check_both(sound(tmp_path, "train", 100), sound(tmp_path, "val", 200))
    for way in ("clip", "drop"):
        fixed, done = mend(before, "train", way)  # type: ignore[arg-type]
        assert not done and fixed.to_coco() == before.splits["train"].to_coco()


def test_drop_leaves_no_entry_of_a_picture_that_is_missing_and_named_twice(tmp_path: Path) -> None:
    coco = sound(tmp_path, "train", 100)
    for number in (50, 51):
        coco.image(number, "gone.png")
    result, done = mended(check_both(coco, sound(tmp_path, "val", 200)), "drop", tmp_path / "mended")
    assert done == {"missing image": 2} and not errors(result) and len(result.splits["train"]) == 6


def rows(boxes: list[list[float]], labels: list[int] | None = None, crowd: list[bool] | None = None) -> Annotations:
    """One picture of 100 x 80 with these boxes."""
    entries = [
        AnnotationRow(0, n + 1, labels[n] if labels else 0, box, 1.0, bool(crowd and crowd[n])) for n, box in enumerate(boxes)
    ]
    categories = [Category(1, "a"), Category(2, "b")]
    return Annotations.pack("x.json", Path(), categories, [ImageRow(1, "a.png", HEIGHT, WIDTH)], entries)


@pytest.mark.parametrize(
    ("box", "kinds"),
    [
        ([10, 10, 30, 30], set()),
        ([-1, -1, 102, 82], {"whole-image box"}),  # a pixel over every side is rounding
        ([-1.5, 10, 30, 30], {"border box"}),
        ([71.5, 10, 30, 30], {"border box"}),
        ([-30, 10, 30, 30], {"outside box"}),  # ends where the picture begins
        ([10, 80, 30, 30], {"outside box"}),
        ([10, 10, 0, 0], {"zero-size box"}),
        ([10, 10, 0, -1], {"negative box"}),
        ([10, 10, 4, 4], set()),
        ([10, 10, 3.9, 30], {"tiny box"}),
        ([10, 10, 50, 5], set()),  # just ten times as wide as high
        ([10, 10, 51, 5], {"extreme box"}),
        ([0, 0, 99, 79.2], {"whole-image box"}),  # 99 % of both sides
        ([0, 0, 98, 80], set()),
    ],
)
def test_bounds(box: list[float], kinds: set[str]) -> None:
    sizes = np.array([[HEIGHT, WIDTH]])
    assert {kind for kind, mask in box_faults(rows([box]), sizes, CONFIG.input).items() if mask[0]} == kinds
    if not kinds & {"zero-size box", "negative box", "outside box", "border box"}:  # crowds may be tiny, long or large
        assert not any(mask[0] for mask in box_faults(rows([box], crowd=[True]), sizes, CONFIG.input).values())


def test_tiny_is_measured_after_the_resize() -> None:
    """100 x 80 becomes 50 x 40: 7 pixels become 3.5, 8 become 4. Without a size nothing can be said."""
    half, data = InputConfig(short_edge=40, long_edge=133), rows([[10, 10, 7, 30], [10, 50, 8, 20]])
    assert box_faults(data, np.array([[HEIGHT, WIDTH]]), half)["tiny box"].tolist() == [True, False]
    assert not any(mask.any() for mask in box_faults(data, np.array([[0, 0]]), half).values())
    assert all(mask.tolist() == [] for mask in box_faults(rows([]), np.array([[HEIGHT, WIDTH]]), half).values())


def test_duplicates() -> None:
    """Corners at most a pixel apart and an IoU of 0.8: of 10 x 10 boxes half a pixel apart 95 / 105, one apart 90 / 110.

    Both are over 0.8; a pixel apart in x and y it is 81 / 119. In a row of equals all but the first are duplicates.
    """
    boxes = [[10, 10, 10, 10], [10.5, 10, 10, 10], [50, 50, 10, 10], [51, 50, 10, 10], [30, 30, 10, 10], [31, 31, 10, 10]]
    sizes = np.array([[HEIGHT, WIDTH]])
    expected = [False, True, False, True, False, False]
    assert box_faults(rows(boxes), sizes, CONFIG.input)["duplicate box"].tolist() == expected
    other = box_faults(rows(boxes, labels=[0, 1] * 3), sizes, CONFIG.input)
    assert other["two classes on a box"].tolist() == expected and not other["duplicate box"].any()
    many = box_faults(rows([[20, 20, 30, 30]] * 50), sizes, CONFIG.input)["duplicate box"]
    assert many.tolist() == [False] + [True] * 49
    crowd = box_faults(rows([[20, 20, 30, 30]] * 2, crowd=[False, True]), sizes, CONFIG.input)
    assert not crowd["duplicate box"].any()


def test_neighbours_are_all_pairs_that_are_near() -> None:
    rng = np.random.default_rng(0)
    group, value = rng.integers(0, 4, 200), rng.integers(0, 60, 200).astype(float)
    pairs = [pair for a, b in neighbours(group, value, 2.0) for pair in zip(a.tolist(), b.tolist(), strict=True)]
    near = (group[:, None] == group) & (np.abs(value[:, None] - value) <= 2)
    assert sorted(pairs) == [(a, b) for a, b in np.argwhere(near).tolist() if a < b]
    assert not list(neighbours(np.empty(0, int), np.empty(0), 1.0)) and not list(neighbours(np.zeros(1), np.zeros(1), 1.0))


def test_refused_entries_of_voc(tmp_path: Path) -> None:
    """Each is noted with its XML file, and the rest is read."""
    (tmp_path / "Annotations").mkdir()
    thing = "<object><name>{}</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>{}</xmax><ymax>9</ymax></bndbox></object>"
    contents = {"a": thing.format("dog", 9) + thing.format("dog", "inf"), "b": "<object>", "c": thing.format(" ", 9)}
    contents["d"] = "<filename>../d.jpg</filename>"
    for name, content in contents.items():
        (tmp_path / "Annotations" / f"{name}.xml").write_text(f"<annotation>{content}</annotation>")
    faults: list[Fault] = []
    data = load_voc(tmp_path, faults=faults)
    assert data.coco_boxes.tolist() == [[1, 1, 8, 8]] and [data.file_names[n] for n in range(2)] == ["a.jpg", "c.jpg"]
    noted = sorted((f.kind, Path(f.file).name) for f in faults)
    assert noted == [
        ("unknown class", "c.xml"),
        ("unusable box", "a.xml"),
        ("unusable entry", "b.xml"),
        ("unusable file name", "d.xml"),
    ]
    result = check({"data": data}, {"data": faults}, CONFIG)
    assert Counter(f.kind for f in result.findings["data"])["missing image"] == 2


def test_refused_entries_of_yolo(tmp_path: Path) -> None:
    for name in "abcd":
        picture(ord(name)).save(tmp_path / f"{name}.png")
    (tmp_path / "d.png").write_bytes(b"no picture")
    (tmp_path / "classes.txt").write_text("dog\n")
    (tmp_path / "a.txt").write_text("0 0.5 0.5 0.36 0.45\n1 0.5 0.5 0.3 0.3\n0 0.5 nan 0.3 0.3\n0 7 7 1 1\n")
    (tmp_path / "b.txt").write_text("")
    (tmp_path / "d.txt").write_text("")
    (tmp_path / "lost.txt").write_text("0 0.5 0.5 0.36 0.45\n")
    faults: list[Fault] = []
    data = load_dataset(DatasetConfig(path=str(tmp_path), format="yolo"), faults)
    result = check({"data": data}, {"data": faults}, CONFIG)
    kinds = Counter(f.kind for f in result.findings["data"])
    assert data.coco_boxes.tolist() == [[pytest.approx(v) for v in (32, 22, 36, 36)]]  # 50 - 18, 40 - 18
    assert kinds == {
        "unknown class": 1,
        "unusable box": 2,
        "missing label file": 1,
        "label file without image": 1,  # lost.txt, while classes.txt is none
        "unreadable image": 1,  # which the reader has noted as well
        "image without boxes": 3,
        "rare class": 1,
    }
    (missing,) = (f for f in result.findings["data"] if f.kind == "missing label file")
    assert missing.file == str(tmp_path / "c.png") and missing.message == f"there is no {tmp_path / 'c.txt'}"

    (tmp_path / "list.txt").write_text("a.png\nnone.png\n../b.png\nc.png\n")
    faults.clear()
    data = load_dataset(DatasetConfig(path=str(tmp_path / "list.txt")), faults)
    assert [data.file_names[n] for n in range(len(data))] == ["a.png", "c.png"]
    assert [(f.kind, f.file) for f in faults[:2]] == [
        ("missing image", str(tmp_path / "none.png")),
        ("unusable file name", str(tmp_path / "list.txt")),
    ]


def awkward(real_data: Path) -> Iterator[Path]:
    yield from (file for file in sorted((real_data / "awkward").iterdir()) if file.name != "LICENSE.Pillow")


@pytest.mark.filterwarnings("ignore")  # Pillow's about broken EXIF; `look_at_all` ignores them for all threads
def test_pictures_are_judged_as_training_reads_them(real_data: Path) -> None:
    """JPEG is decoded at an eighth of its size here: what cannot be read, and how large it is upright, must not change."""
    unreadable = 0
    for file in awkward(real_data):
        look = look_at(file, [0, 0])
        try:
            assert look.size == read_image(file).shape[:2], file
        except UnreadableImageError as error:
            unreadable += 1
            assert look.size == (0, 0) and [f.message for f in look.findings] == [str(error)]
    assert unreadable == 6


def test_different_pictures_are_not_near_identical_but_copies_are(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "coco_mini" / "train2017"
    files = sorted(folder.glob("*.jpg"))
    for n, file in enumerate(files[:6]):
        with Image.open(file) as image:
            small = image.resize((image.width // 2, image.height // 2)) if n % 2 else image.point(lambda v: min(255, v + 6))
            small.save(tmp_path / f"{n}.jpg", quality=60)
    names = [*map(str, files), *(str(tmp_path / f"{n}.jpg") for n in range(6))]
    images = [ImageRow(n, name, 0, 0) for n, name in enumerate(names)]
    data = Annotations.pack("x", Path(), [Category(1, "a")], images, [])
    pictures, faults = look_at_all(data, "coco_mini")
    assert not [f for f in faults if f.kind != "converted image"]
    pairs = repeated_pictures(pictures, np.zeros(len(data), int))
    assert pairs == [(n, len(files) + n, False) for n in range(6)]


def test_difference_hashes_are_near_up_to_six_bits() -> None:
    """Greys rise by 1 from left to right; where the last of a row falls instead, one bit of 64 differs, and 2 / 72 greys."""
    thumbnails = np.tile(np.arange(9, dtype=np.uint8), (4, 8, 1))
    for picture_, fallen in ((1, 6), (2, 7), (3, 7)):
        thumbnails[picture_, :fallen, 8] = 6
    thumbnails[3, 6, 8], thumbnails[3, 7, 8] = 8, 6  # other rows than those of the third: two bits from it
    pictures = Pictures(np.ones((4, 2), np.int64), np.arange(4, dtype=np.uint64), thumbnails)
    # 1 is near 0. 2 and 3 are 7 from 0 and one from 1; 3 is near 2 too, which is in another split
    assert repeated_pictures(pictures, np.zeros(4, int)) == [(0, 1, False), (1, 2, False), (1, 3, False)]
    assert repeated_pictures(pictures, np.array([0, 1, 0, 1])) == [(0, 1, False), (1, 2, False), (2, 3, False)]
    pictures.thumbnails[1] += np.arange(0, 200, 25, dtype=np.uint8)[:, None]  # the same bits, other greys
    assert repeated_pictures(pictures, np.zeros(4, int)) == [(2, 3, False)]


def test_bccd_has_two_boxes_without_area(real_data: Path) -> None:
    root = real_data / "bccd" / "BCCD"
    sets = {part: root / "ImageSets" / "Main" / f"{part}.txt" for part in ("train", "val", "test")}
    refused: dict[str, list[Fault]] = {part: [] for part in sets}
    splits = {part: load_voc(root, file, faults=refused[part]) for part, file in sets.items()}
    result = check(splits, refused, Config())
    assert errors(result) == {"zero-size box"}
    files = {f.file: f.annotation for faults in result.findings.values() for f in faults if f.kind == "zero-size box"}
    places = {root / "JPEGImages" / f"BloodImage_00{n}.jpg" for n in (338, 343)}
    assert set(map(Path, files)) == places
    for split, data in splits.items():
        for f in (f for f in result.findings[split] if f.kind == "zero-size box"):
            (row,) = np.flatnonzero(data.annotation_ids == f.annotation)
            assert (data.coco_boxes[row, 2:] == 0).any()
    assert not result.count("note")  # not a picture is unlisted: the three sets name all 364


def test_drawn_boxes_are_green_red_or_grey(faulty: Check) -> None:
    """The picture is enlarged six times (80 -> 480); lines are 2 pixels wide and begin on the corner, mid-side is seen.

    [50, 40, 30, 30] has an anchor of 32 x 32 at 52, 44: IoU over 0.5. 4.5 x 4.5 has none, crowds are not trained.
    """
    good = draw(faulty, "train", 0)
    assert good.shape == (480, 600, 3)
    assert tuple(good[330, 300]) == GREEN  # annotation 12: the left side at x 50
    assert tuple(draw(faulty, "train", 2)[12, 30]) == RED  # many.png, the box at [5, 0]: its left side at x 5
    assert tuple(draw(faulty, "val", 0)[300, 60]) == GREY  # the crowd at [10, 10, 80, 60]: its left side at x 10
