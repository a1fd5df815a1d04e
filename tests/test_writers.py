"""retinanet/data/writers: COCO, VOC, YOLO and CSV files that hold what they can and say what they cannot."""

import csv
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from PIL import Image

from retinanet.data.annotations import AnnotationRow, Annotations, ImageRow
from retinanet.data.coco import load_coco
from retinanet.data.formats import load_path
from retinanet.data.voc import load_voc
from retinanet.data.writers import voc_xml, write_dataset, yolo_line
from retinanet.errors import UserError
from retinanet.structures import Category

FORMATS = ("coco", "voc", "yolo", "csv")


def make_images(folder: Path, images: list[ImageRow]) -> None:
    for image in images:
        path = folder / image.file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (image.width, image.height), (image.id % 256, 0, 0)).save(path)


@pytest.fixture
def awkward(tmp_path: Path) -> Annotations:
    """Gapped ids, decimals, a crowd, an image without objects, names that are not ASCII or hold spaces."""
    images = [
        ImageRow(42, "z last.jpg", 100, 200),
        ImageRow(7, "ç 犬.png", 333, 77),
        ImageRow(9, "empty.png", 50, 60),
        ImageRow(1000, "a.b.jpg", 1201, 1999),
    ]
    categories = [Category(3, "stop sign"), Category(7, "犬 & <dog>"), Category(90, "no")]
    boxes = [  # image, label, x, y, width, height, crowd
        (0, 2, 10.0, 20.0, 30.5, 40.25, False),
        (0, 0, 0.0, 0.0, 200.0, 100.0, False),
        (1, 1, 1 / 3, 2 / 3, 70.123456, 300.987654, False),
        (3, 0, 1998.0, 1200.0, 1.0, 1.0, False),
        (3, 2, 0.001, 700.0, 1500.0, 0.125, False),
        (3, 1, 5.0, 6.0, 7.0, 8.0, True),
    ]
    rows = [AnnotationRow(i, n, k, [x, y, w, h], w * h, c) for n, (i, k, x, y, w, h, c) in enumerate(boxes, start=1)]
    make_images(tmp_path / "source", images)
    return Annotations.pack("source", tmp_path / "source", categories, images, rows)


def content(data: Annotations) -> dict[str, Any]:
    """For each image its size, whatever its order: (name of the class, xyxy, crowd), and each class."""
    found: dict[str, Any] = {}
    for index in range(len(data)):
        rows = slice(data.offsets[index], data.offsets[index + 1])
        boxes = data.coco_boxes[rows].copy()
        boxes[:, 2:] += boxes[:, :2]
        names = [data.categories[label].name for label in data.labels[rows]]
        found[Path(data.file_names[index]).name] = (boxes, names, data.crowd[rows].tolist())
    return found


def assert_same(found: Annotations, expected: Annotations) -> None:
    found_images, expected_images = content(found), content(expected)
    assert found_images.keys() == expected_images.keys()
    for name, (boxes, names, crowd) in expected_images.items():
        assert found_images[name][1:] == (names, crowd), name
        np.testing.assert_allclose(found_images[name][0], boxes, rtol=0, atol=1e-3, err_msg=name)


def without_crowds(data: Annotations) -> Annotations:
    image_of = np.repeat(np.arange(len(data)), np.diff(data.offsets))
    images = [ImageRow(int(data.image_ids[i]), data.file_names[i], *(int(v) for v in data.sizes[i])) for i in range(len(data))]
    rows = [
        AnnotationRow(int(image_of[n]), n, int(data.labels[n]), data.coco_boxes[n].tolist(), 0.0, False)
        for n in range(len(data.labels))
        if not data.crowd[n]
    ]
    return Annotations.pack(data.source, data.image_dir, data.categories, images, rows)


@pytest.mark.parametrize("first", FORMATS)
@pytest.mark.parametrize("second", FORMATS)
def test_boxes_come_through_any_two_formats(awkward: Annotations, tmp_path: Path, first: str, second: str) -> None:
    """To within a thousandth of a pixel, although the names of the files have no numbers in common."""
    write_dataset({"": awkward}, first, tmp_path / "one")
    once = load_path(tmp_path / "one")
    write_dataset({"": once}, second, tmp_path / "two")
    twice = load_path(tmp_path / "two")
    expected = awkward if {first, second} <= {"coco", "voc"} else without_crowds(awkward)
    assert_same(twice, expected)
    assert all(twice.path(index).is_file() for index in range(4))
    if second != "csv":
        sizes = {twice.file_names[i].rpartition("/")[2]: tuple(twice.sizes[i]) for i in range(4)}
        assert sizes == {"z last.jpg": (100, 200), "ç 犬.png": (333, 77), "empty.png": (50, 60), "a.b.jpg": (1201, 1999)}


def test_what_each_format_says_about_ids_and_names(awkward: Annotations, tmp_path: Path) -> None:
    for kind in FORMATS:
        write_dataset({"": awkward}, kind, tmp_path / kind)
    read = {kind: load_path(tmp_path / kind).categories for kind in FORMATS}
    names = ["stop sign", "犬 & <dog>", "no"]
    assert read["coco"] == read["csv"] == tuple(map(Category, (3, 7, 90), names))
    assert read["yolo"] == tuple(map(Category, (0, 1, 2), names))
    assert read["voc"] == tuple(map(Category, (1, 2, 3), ["no", "stop sign", "犬 & <dog>"]))  # VOC knows names alone
    assert load_path(tmp_path / "coco").image_ids.tolist() == [42, 7, 9, 1000]


def test_what_is_lost_is_counted(tmp_path: Path) -> None:
    images = [ImageRow(1, "a.png", 10, 20)]
    rows = [
        AnnotationRow(0, 1, 0, [1, 1, 4, 4], 9.0, False),  # an outline's area
        AnnotationRow(0, 2, 0, [1, 1, 0, 4], 0.0, False),  # a line
        AnnotationRow(0, 3, 0, [15, 5, 10, 3], 30.0, False),  # five over the right border
        AnnotationRow(0, 4, 0, [30, 5, 10, 3], 30.0, False),  # outside
        AnnotationRow(0, 5, 1, [0, 0, 2, 2], 4.0, True),
    ]
    make_images(tmp_path, images)
    data = Annotations.pack("x", tmp_path, [Category(0, "a"), Category(5, "b\ufffe"), Category(6, "c")], images, rows)
    area, border = "areas other than width x height", "boxes reaching over the border, cut there"
    lost = {kind: dict(write_dataset({"": data}, kind, tmp_path / kind)) for kind in FORMATS}
    changed = "class ids or names, which change"
    assert lost["coco"] == {}
    assert lost["voc"] == {"classes without objects": 1, area: 1, changed: 2}  # a 0 -> 1, b 5 -> 2
    assert lost["yolo"] == {changed: 2, area: 1, border: 2, "boxes without area": 2, "crowd or difficult regions": 1}
    assert lost["csv"] == {changed: 1, area: 1, "boxes without area": 1, "crowd or difficult regions": 1}
    # yolo keeps the first and what of the third lies in the image, whose width is 20
    np.testing.assert_allclose(load_path(tmp_path / "yolo").coco_boxes, [[1, 1, 4, 4], [15, 5, 5, 3]], atol=1e-6)
    assert load_path(tmp_path / "csv").coco_boxes.tolist() == [[1, 1, 4, 4], [15, 5, 10, 3], [30, 5, 10, 3]]
    assert load_path(tmp_path / "voc").coco_boxes.tolist() == [row.coco_box for row in rows]
    assert load_path(tmp_path / "voc").categories[1].name == "b\ufffd"  # XML has no such character


def test_yolo_is_laid_out_as_ultralytics_wants_it(awkward: Annotations, tmp_path: Path) -> None:
    parts = {"train": awkward.select(np.array([0, 1])), "val": awkward.select(np.array([2, 3]))}
    write_dataset(parts, "yolo", tmp_path / "y")
    raw = yaml.safe_load((tmp_path / "y" / "data.yaml").read_text(encoding="utf-8"))
    assert raw == {"train": "images/train", "val": "images/val", "names": {0: "stop sign", 1: "犬 & <dog>", 2: "no"}}
    files = sorted(p.relative_to(tmp_path / "y").as_posix() for p in (tmp_path / "y").rglob("*.*"))
    images = ["train/z last.jpg", "train/ç 犬.png", "val/a.b.jpg", "val/empty.png"]
    labels = ["train/z last.txt", "train/ç 犬.txt", "val/a.b.txt", "val/empty.txt"]
    assert files == sorted(["data.yaml", *(f"images/{name}" for name in images), *(f"labels/{name}" for name in labels)])
    assert (tmp_path / "y" / "labels/val/empty.txt").read_text() == ""
    # the box [10, 20, 30.5, 40.25] in 200 x 100: centre (25.25, 40.125)
    assert (tmp_path / "y" / "labels/train/z last.txt").read_text().splitlines()[0] == "2 0.12625 0.40125 0.1525 0.4025"
    assert len(load_path(tmp_path / "y" / "data.yaml", part="val")) == 2


def test_without_a_split_val_is_train_for_those_who_must_have_one(awkward: Annotations, tmp_path: Path) -> None:
    write_dataset({"": awkward}, "yolo", tmp_path / "y")
    raw = yaml.safe_load((tmp_path / "y" / "data.yaml").read_text(encoding="utf-8"))
    assert raw["train"] == raw["val"] == "images/train"
    assert len(load_path(tmp_path / "y")) == 4  # each once


def test_parts_of_the_other_formats(awkward: Annotations, tmp_path: Path) -> None:
    parts = {"train": awkward.select(np.array([0, 1])), "val": awkward.select(np.array([2, 3]))}
    for kind in ("coco", "voc", "csv"):
        write_dataset(parts, kind, tmp_path / kind)
    for file in ("coco/val.json", "csv/val.csv", "voc/ImageSets/Main/val.txt"):
        data = load_path(tmp_path / file)
        assert content(data).keys() == {"empty.png", "a.b.jpg"}, file
        assert {category.name for category in data.categories} == {"stop sign", "犬 & <dog>", "no"}  # as train has
        assert all(data.path(index).is_file() for index in range(2))


@pytest.mark.parametrize("kind", FORMATS)
def test_names_that_collide_keep_their_folders(tmp_path: Path, kind: str) -> None:
    names = ["x/one.png", "y/one.png", "x/two.jpg", "x/TWO.png"]
    images = [ImageRow(n, name, 5 + n, 9) for n, name in enumerate(names)]
    rows = [AnnotationRow(n, n, 0, [n, 0, 2, 2], 4.0, False) for n in range(4)]
    make_images(tmp_path / "s", images)
    write_dataset({"": Annotations.pack("s", tmp_path / "s", [Category(0, "a")], images, rows)}, kind, tmp_path / "out")
    data = load_path(tmp_path / "out")
    first = {"/".join(Path(data.file_names[i]).parts[-2:]): round(data.coco_boxes[i, 0], 6) for i in range(4)}
    assert first == {"x/one.png": 0, "y/one.png": 1, "x/two.jpg": 2, "x/TWO_2.png": 3}


def test_images_are_linked_copied_or_left(awkward: Annotations, tmp_path: Path) -> None:
    source = awkward.path(0)
    write_dataset({"": awkward}, "coco", tmp_path / "linked", "link")
    write_dataset({"": awkward}, "coco", tmp_path / "copied", "copy")
    assert (tmp_path / "linked" / "images" / "z last.jpg").samefile(source)
    assert not (tmp_path / "copied" / "images" / "z last.jpg").samefile(source)
    assert (tmp_path / "copied" / "images" / "z last.jpg").read_bytes() == source.read_bytes()
    for kind, file in (("coco", "annotations.json"), ("csv", "annotations.csv")):
        write_dataset({"": awkward}, kind, tmp_path / f"{kind}_alone", "none")
        data = load_path(awkward.image_dir, tmp_path / f"{kind}_alone" / file)
        assert data.path(3).is_file()


def test_a_disk_without_links_gets_copies(awkward: Annotations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    write_dataset({"": awkward}, "coco", tmp_path / "out", "link")
    assert len(list((tmp_path / "out" / "images").iterdir())) == 4


def test_what_cannot_be_written(awkward: Annotations, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    for out in (tmp_path / "full", tmp_path / "full" / "a"):
        with pytest.raises(UserError, match="is no empty folder"):
            write_dataset({"": awkward}, "coco", out)
    (tmp_path / "empty").mkdir()
    awkward.path(1).unlink()
    with pytest.raises(UserError, match=r"1 of 4 images are missing, the first is .*犬\.png"):
        write_dataset({"": awkward}, "coco", tmp_path / "empty")
    assert not any((tmp_path / "empty").iterdir())
    images = [ImageRow(1, "a.png", 5, 5), ImageRow(2, "a.jpg", 5, 5)]
    make_images(tmp_path / "s", images)
    twins = Annotations.pack("s", tmp_path / "s", [Category(0, "a "), Category(1, "a")], images, [])
    with pytest.raises(UserError, match="class names apart: 'a ', 'a'"):
        write_dataset({"": twins}, "yolo", tmp_path / "empty")
    twins.categories = (Category(0, "a"),)
    for kind in ("voc", "yolo"):
        with pytest.raises(UserError, match="differ in their ending only"):  # one label file for both
            write_dataset({"": twins}, kind, tmp_path / "empty", "none")


def test_shares_are_of_the_real_size(tmp_path: Path) -> None:
    """An annotation file may err about it; who reads the labels goes by the picture."""
    make_images(tmp_path, [ImageRow(1, "a.png", 10, 20)])
    row = AnnotationRow(0, 1, 0, [5, 5, 5, 5], 25.0, False)
    data = Annotations.pack("x", tmp_path, [Category(0, "a")], [ImageRow(1, "a.png", 100, 200)], [row])
    write_dataset({"": data}, "yolo", tmp_path / "y")
    assert (tmp_path / "y/labels/train/a.txt").read_text() == "0 0.375 0.75 0.25 0.5\n"


def test_real_coco_loses_its_crowds_alone(real_data: Path, tmp_path: Path) -> None:
    data = load_coco(real_data / "coco_mini/annotations/instances_val2017.json", real_data / "coco_mini/val2017")
    lost = write_dataset({"": data}, "yolo", tmp_path / "y")
    assert lost["crowd or difficult regions"] == data.crowd.sum() == 8
    assert "boxes reaching over the border, cut there" not in lost
    assert_same(load_path(tmp_path / "y"), without_crowds(data))


def test_real_voc_comes_back_the_same(real_data: Path, tmp_path: Path) -> None:
    data = load_voc(real_data / "bccd" / "BCCD")
    write_dataset({"": data}, "voc", tmp_path / "v", "none")
    again = load_voc(tmp_path / "v")
    for name in ("image_ids", "sizes", "offsets", "coco_boxes", "labels", "crowd"):
        np.testing.assert_array_equal(getattr(again, name), getattr(data, name))
    assert again.categories == data.categories


# -------------------------------------------------------------------------------------------- the pieces


def test_voc_xml() -> None:
    root = ElementTree.fromstring(voc_xml("a & b.jpg", (10, 20), [("<cat>", [1, 2.25, 3.123456789, 4e-7], True)]))
    assert root.findtext("filename") == "a & b.jpg"
    assert [root.findtext(f"size/{tag}") for tag in ("width", "height", "depth")] == ["20", "10", "3"]
    assert [root.findtext(f"object/{tag}") for tag in ("name", "difficult")] == ["<cat>", "1"]
    corners = [float(root.findtext(f"object/bndbox/{tag}") or "") for tag in ("xmin", "ymin", "xmax", "ymax")]
    assert corners == [1, 2.25, pytest.approx(3.123456789, abs=1e-8), pytest.approx(4e-7)]


def test_voc_xml_of_nothing_and_of_names_that_xml_cannot_hold() -> None:
    assert ElementTree.fromstring(voc_xml("a.jpg", (1, 1), [])).find("object") is None
    hostile = "\x00\x1b]]><!DOCTYPE x>\ud800\uffff../"
    root = ElementTree.fromstring(voc_xml(hostile, (1, 1), [(hostile, [0, 0, 1, 1], False)]))
    assert root.findtext("object/name") == "\ufffd\ufffd]]><!DOCTYPE x>\ufffd\ufffd../"


def test_yolo_line() -> None:
    # 200 wide, 100 high: centre (30, 40), 20 wide, 60 high
    assert yolo_line(3, [20, 10, 40, 70], (100, 200)) == "3 0.15 0.4 0.1 0.6"
    assert yolo_line(0, [0, 0, 200, 100], (100, 200), 0.875) == "0 0.5 0.5 1 1 0.875"
    third = yolo_line(1, np.float32([0, 0, 1, 1]), (3, 3)).split()[3]
    assert third == "0.333333333"


def test_csv_is_what_a_csv_reader_sees(tmp_path: Path) -> None:
    images = [ImageRow(1, 'a,"b".png', 10, 20), ImageRow(2, "c.png", 10, 20)]
    make_images(tmp_path, images)
    row = AnnotationRow(0, 1, 0, [1, 2, 3.5, 4], 14.0, False)
    write_dataset({"": Annotations.pack("x", tmp_path, [Category(4, "x, y")], images, [row])}, "csv", tmp_path / "out")
    with (tmp_path / "out" / "annotations.csv").open(newline="") as stream:
        assert list(csv.reader(stream)) == [
            ['images/a,"b".png', "1", "2", "4.5", "6", "x, y"],
            ["images/c.png", "", "", "", "", ""],
        ]
    assert (tmp_path / "out" / "classes.csv").read_text().splitlines() == ['"x, y",4']
    assert load_path(tmp_path / "out").coco_boxes.tolist() == [[1, 2, 3.5, 4]]


def test_coco_is_what_a_json_reader_sees(awkward: Annotations, tmp_path: Path) -> None:
    write_dataset({"": awkward}, "coco", tmp_path / "c")
    raw = json.loads((tmp_path / "c" / "annotations.json").read_text(encoding="utf-8"))
    assert raw["images"][1] == {"id": 7, "file_name": "ç 犬.png", "height": 333, "width": 77}
    assert [entry["iscrowd"] for entry in raw["annotations"]] == [0, 0, 0, 0, 0, 1]
