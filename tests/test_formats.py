"""retinanet/data/formats: which format a path is, told by its files and said; and the line that asks for help."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from retinanet.config import DatasetConfig
from retinanet.config.load import parse_config
from retinanet.data.formats import find_dataset, load_dataset, load_path
from retinanet.errors import UserError

XML = "<annotation><filename>a.png</filename><object><name>cat</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>4</xmax><ymax>6</ymax></bndbox></object></annotation>"  # fmt: skip # noqa: E501
COCO = {
    "images": [{"id": 1, "file_name": "a.png", "width": 20, "height": 10}],
    "categories": [{"id": 1, "name": "cat"}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}],
}


def put(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".png"):
            Image.new("RGB", (20, 10)).save(root / name)
        else:
            (root / name).write_text(text)
    return root


LABEL = "0 0.125 0.4 0.15 0.4"  # in 20 x 10: centre (2.5, 4), 3 wide, 4 high
CSV = "a.png,1,2,4,6,cat\n"
LAYOUTS = {  # format, files, path
    "coco, beside the images": ("coco", {"a.png": "", "_annotations.coco.json": json.dumps(COCO)}, "."),
    "coco, the file": ("coco", {"images/a.png": "", "x.json": json.dumps(COCO)}, "x.json"),
    "coco, as published": (
        "coco",
        {"val2017/a.png": "", "annotations/instances_val2017.json": json.dumps(COCO)},
        "annotations/instances_val2017.json",
    ),
    "coco, the folder of that": ("coco", {"images/a.png": "", "annotations/train.json": json.dumps(COCO)}, "."),
    "voc": ("voc", {"JPEGImages/a.png": "", "Annotations/a.xml": XML}, "."),
    "voc, flat": ("voc", {"a.png": "", "a.xml": XML}, "."),
    "voc, an image set": (
        "voc",
        {"JPEGImages/a.png": "", "Annotations/a.xml": XML, "ImageSets/Main/train.txt": "a"},
        "ImageSets/Main/train.txt",
    ),
    "yolo": ("yolo", {"images/a.png": "", "labels/a.txt": LABEL, "data.yaml": "train: images\nnames: [cat]"}, "."),
    "yolo, the file": ("yolo", {"train/a.png": "", "train/a.txt": LABEL, "x.yml": "train: train\nnames: [cat]"}, "x.yml"),
    "yolo, no yaml": ("yolo", {"images/a.png": "", "labels/a.txt": LABEL, "classes.txt": "cat"}, "."),
    "yolo, flat": ("yolo", {"a.png": "", "a.txt": LABEL, "classes.txt": "cat"}, "."),
    "yolo, a list": (
        "yolo",
        {"images/a.png": "", "labels/a.txt": LABEL, "l.txt": "images/a.png", "classes.txt": "cat"},
        "l.txt",
    ),
    "csv": ("csv", {"a.png": "", "train.csv": CSV, "classes.csv": "cat,0"}, "."),
    "csv, the file": ("csv", {"a.png": "", "train.csv": CSV, "val.csv": CSV}, "val.csv"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_format_is_told_by_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str) -> None:
    kind, files, path = LAYOUTS[layout]
    put(tmp_path, files)
    data = load_path(tmp_path / path)
    assert capsys.readouterr().out.startswith(f"{tmp_path / path}: {kind}, from ")
    assert data.coco_boxes.tolist() == [pytest.approx([1, 2, 3, 4])]
    assert [category.name for category in data.categories] == ["cat"]
    assert data.path(0).is_file()
    again = load_path(tmp_path / path, format=kind)  # said by hand it is the same, and needs no word
    assert capsys.readouterr().out == ""
    assert again.coco_boxes.tolist() == data.coco_boxes.tolist() and again.image_dir == data.image_dir


@pytest.mark.parametrize(
    ("annotations", "kind"), [("a.json", "coco"), ("a.csv", "csv"), ("a.txt", "yolo"), ("A.JSON", "coco"), ("x/a.yaml", "yolo")]
)
def test_the_format_is_told_by_the_annotations(tmp_path: Path, annotations: str, kind: str) -> None:
    assert find_dataset(DatasetConfig(path=str(tmp_path), annotations=annotations)) == (kind, tmp_path, Path(annotations))
    assert find_dataset(DatasetConfig(path=str(tmp_path), annotations=annotations, format="voc"))[0] == "voc"


def test_a_text_file_beside_annotations_is_an_image_set(tmp_path: Path) -> None:
    put(tmp_path, {"Annotations/a.xml": XML, "Annotations/b.xml": XML, "some.txt": "b"})
    assert len(load_path(tmp_path, tmp_path / "some.txt")) == 1


@pytest.mark.parametrize(
    ("files", "settings", "said"),
    [
        ({}, {}, "no data set found in it; looked for COCO's *.json, *.csv, YOLO's data.yaml or .txt labels"),
        ({"a.png": "", "readme.txt": ""}, {}, "no data set found"),
        ({"a.csv": CSV}, {"format": "coco"}, "no data set found"),
        ({"classes.csv": "cat,0"}, {}, "no data set found"),
        ({"train.csv": CSV, "val.csv": CSV}, {}, "train.csv, "),
        ({"a.json": "{}", "Annotations/a.xml": XML}, {}, "more than one data set could be meant"),
        (
            {"a.xml": XML, "a.png": "", "a.txt": LABEL},
            {},
            "voc files, yolo files; give one of the files as path, or set format",
        ),
        ({}, {"format": "voc"}, "a VOC data set has XML files in"),
        ({}, {"format": "yolo"}, "classes.txt: cannot be read"),
        ({"a.csv": CSV}, {"one_based": True}, "one_based is for voc, and this is csv"),
        ({"a.xml": XML}, {"classes": "x.txt"}, "classes is for yolo and csv, and this is voc"),
    ],
)
def test_one_line_asks_for_what_is_missing(tmp_path: Path, files: dict[str, str], settings: dict, said: str) -> None:
    put(tmp_path, files)
    with pytest.raises(UserError) as caught:
        load_path(tmp_path, **settings)
    assert str(tmp_path) in str(caught.value) and said in str(caught.value) and "\n" not in str(caught.value)


def test_paths_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none is not a folder, nor a file"):
        load_path(tmp_path / "none")
    put(tmp_path, {"notes.doc": ""})
    with pytest.raises(UserError, match=r"notes\.doc: the format cannot be told by this name"):
        load_path(tmp_path / "notes.doc")


def test_a_config_reads_each_part_of_a_yaml(tmp_path: Path) -> None:
    yaml = "train: images/train\nval: images/val\nnames: [cat]"
    put(tmp_path, {"data.yaml": yaml, "images/train/a.png": "", "images/val/b.png": "", "labels/train/a.txt": LABEL})
    put(tmp_path, {"labels/val/b.txt": ""})
    for path in (tmp_path, tmp_path / "data.yaml"):
        data = parse_config({"data": {"train": {"path": str(path)}, "val": {"path": str(path)}}}).data
        assert data.train is not None and data.val is not None
        assert [load_dataset(part).file_names[0] for part in (data.train, data.val)] == [
            "images/train/a.png",
            "images/val/b.png",
        ]


def test_real_data_is_told_apart(real_data: Path, tmp_path: Path, make_coco: Callable[..., dict[str, str]]) -> None:
    assert len(load_path(real_data / "bccd" / "BCCD" / "ImageSets" / "Main" / "val.txt")) == 87
    assert load_path(real_data / "coco_mini" / "annotations" / "instances_val2017.json").path(0).is_file()
    made = make_coco()
    shutil.copy(made["annotations"], Path(made["path"]) / "labels.json")
    assert len(load_path(made["path"])) == 8
