"""Whatever stands in the files of a data set, its readers load it whole or refuse it in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from retinanet.data.annotations import Annotations
from retinanet.data.csv_rows import load_csv
from retinanet.data.faults import Fault
from retinanet.data.files import read_classes
from retinanet.data.formats import load_path
from retinanet.data.voc import load_voc
from retinanet.data.yolo import load_yolo
from retinanet.errors import UserError

NUMBERS = st.one_of(
    st.sampled_from(["0", "1", "0.5", "-1", "nan", "inf", "-inf", "1e308", "-1e308", "1e999", "1_0", "٣", "", "0x1", " "]),
    st.floats().map(str),
    st.integers(-(10**30), 10**30).map(str),
    st.text(max_size=4),
)
ENCODINGS = st.sampled_from(["utf-8", "utf-16", "utf-16-le", "utf-8-sig", "latin-1", "utf-7", "cp037", "shift_jis"])
NAMES = st.sampled_from(
    ["a.png", "../a.png", "/a.png", "b/../../a.png", "a\0b", "", ".", "..", "x" * 300, "ç.png", "\\a", "C:\\a"]
)
TEXTS = NAMES | st.text(max_size=10)
JUNK = st.binary(max_size=60)


def encoded(texts: st.SearchStrategy[str]) -> st.SearchStrategy[bytes]:
    return JUNK | st.builds(lambda text, encoding: text.encode(encoding, "replace"), texts, st.just("utf-8") | ENCODINGS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(autouse=True)
def quiet(capsys: pytest.CaptureFixture[str]) -> None:
    """Notes of hundreds of data sets."""


def loads_or_refuses(load: Callable[..., Annotations]) -> None:
    """Both ways of reading: that of training, and that of a check, which reads on."""
    for more in ({}, {"faults": list[Fault]()}):
        try:
            data = load(**more)
        except UserError as error:
            assert "\n" not in str(error)
            continue
        assert np.isfinite(data.coco_boxes).all() and np.isfinite(data.areas).all()
        for index in range(len(data)):
            data.target(index, (10, 20))
            assert ".." not in Path(data.file_names[index]).parts and data.path(index).is_relative_to(data.image_dir)
        assert len(data.to_coco()["images"]) == len(data.select(np.arange(len(data)))) == len(data)


CSV_ROW = st.builds(lambda name, rest: ",".join([name, *rest]), TEXTS, st.lists(NUMBERS | TEXTS, max_size=6))


@settings(max_examples=100, deadline=None)
@given(encoded(st.lists(CSV_ROW | st.text(max_size=20), max_size=4).map("\n".join)), st.none() | encoded(st.text(max_size=12)))
def test_csv(folder: Path, content: bytes, classes: bytes | None) -> None:
    (folder / "a.csv").write_bytes(content)
    (folder / "list.csv").write_bytes(classes or b"")
    loads_or_refuses(lambda **more: load_csv(folder / "a.csv", classes=folder / "list.csv" if classes else None, **more))


TAGS = ["annotation", "object", "name", "bndbox", "xmin", "ymin", "xmax", "ymax", "filename", "size", "width", "difficult"]


def element(tag: str, inner: str) -> str:
    return f"<{tag}>{inner}</{tag}>"


VOC_BOX = st.tuples(*[NUMBERS] * 4).map(
    lambda values: element("bndbox", "".join(map(element, ("xmin", "ymin", "xmax", "ymax"), values)))
)
VOC_OBJECT = st.builds(lambda name, box: element("object", element("name", name) + box), TEXTS, VOC_BOX | st.just(""))
VOC_SIZE = st.tuples(NUMBERS, NUMBERS).map(
    lambda sides: element("size", element("width", sides[0]) + element("height", sides[1]))
)
XML = st.recursive(st.text(max_size=6), lambda inner: st.builds(element, st.sampled_from(TAGS), inner), max_leaves=6)
VOC_FILE = st.builds(
    lambda head, name, size, objects: head + element("annotation", element("filename", name) + size + "".join(objects)),
    st.sampled_from(
        ["", '<?xml version="1.0" encoding="utf-16"?>', '<?xml version="1.0" encoding="x"?>', "<!DOCTYPE a>", "\ufeff"]
    ),
    TEXTS,
    VOC_SIZE | XML,
    st.lists(VOC_OBJECT | XML, max_size=3),
)


@settings(max_examples=100, deadline=None)
@given(encoded(VOC_FILE | XML), st.none() | encoded(TEXTS), st.booleans())
def test_voc(folder: Path, content: bytes, image_set: bytes | None, one_based: bool) -> None:
    (folder / "voc" / "Annotations").mkdir(parents=True, exist_ok=True)
    (folder / "voc" / "Annotations" / "a.png.xml").write_bytes(content)
    (folder / "set.txt").write_bytes(image_set or b"")
    chosen = folder / "set.txt" if image_set is not None else None
    loads_or_refuses(lambda **more: load_voc(folder / "voc", chosen, one_based=one_based, **more))


YOLO_LINE = st.lists(NUMBERS, max_size=9).map(" ".join)
SCALAR = (
    TEXTS.map(repr) | NUMBERS | st.sampled_from(["images", "list.txt", "&a [*a]", "!!python/name:os.system", '"\\ud800"', "~"])
)
YAML = st.recursive(SCALAR, lambda inner: st.lists(inner, max_size=3).map(lambda many: f"[{', '.join(many)}]"), max_leaves=5)
DATA_YAML = st.builds(
    lambda keys, names: "".join(f"{key}: {value}\n" for key, value in keys.items()) + f"names: {names}\n",
    st.dictionaries(st.sampled_from(["path", "train", "val", "nc"]), YAML, max_size=3),
    YAML | st.sampled_from(["[a]", "{0: a, 1: b}", "{0: [a]}", "{? [1] : a}", "{-1: a}", "{1e3: a}"]),
)


@settings(max_examples=100, deadline=None)
@given(
    encoded(st.lists(YOLO_LINE, max_size=3).map("\n".join)),
    st.just(b"train: images\nnames: [a, b]") | encoded(DATA_YAML),
    encoded(TEXTS),
)
def test_yolo(folder: Path, labels: bytes, content: bytes, listing: bytes) -> None:
    root = folder / "yolo"
    if not root.exists():
        (root / "images").mkdir(parents=True)
        (root / "labels").mkdir()
        Image.new("RGB", (20, 10)).save(root / "images" / "a.png")
    (root / "labels" / "a.txt").write_bytes(labels)
    (root / "data.yaml").write_bytes(content)
    (root / "list.txt").write_bytes(listing)
    loads_or_refuses(lambda **more: load_yolo(root, root / "data.yaml", **more))


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([".txt", ".csv", ".yaml"]), encoded(st.text(max_size=30) | DATA_YAML | CSV_ROW))
def test_lists_of_classes(folder: Path, suffix: str, content: bytes) -> None:
    file = folder / f"classes{suffix}"
    file.write_bytes(content)
    try:
        categories = read_classes(file)
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert len({category.id for category in categories}) == len({category.name for category in categories}) > 0
    assert all(category.name.encode() and category.id >= 0 for category in categories)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(["a.json", "a.csv", "data.yaml", "a.xml", "a.txt", "classes.txt"]), JUNK, min_size=1))
def test_the_door(folder: Path, files: dict[str, bytes]) -> None:
    root = folder / "door"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    Image.new("RGB", (20, 10)).save(root / "a.png")
    for name, content in files.items():
        (root / name).write_bytes(content)
    try:
        load_path(root)
    except UserError as error:
        assert "\n" not in str(error) and str(root) in str(error)


def test_a_name_longer_than_any_file_has(tmp_path: Path) -> None:
    """Asking the system whether there is such a file is an error of its own."""
    (tmp_path / "data.yaml").write_text(f"path: {'p' * 300}\ntrain: {'x' * 300}\nnames: [a]")
    with pytest.raises(UserError, match="which does not exist"):
        load_yolo(tmp_path, tmp_path / "data.yaml", part="train")
    image = {"id": 1, "file_name": "y" * 300}
    content = {"images": [image], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert load_path(tmp_path / "a.json").file_names[0] == image["file_name"]


def test_names_that_would_unfold_without_end_are_refused(tmp_path: Path) -> None:
    """YAML's references: nine lists of nine each are short in memory, and a billion words when written out."""
    lists = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 40))
    for key in ("train", "path", "names"):
        (tmp_path / "data.yaml").write_text(f"{lists}names: [a]\n{key}: *a39\n")
        with pytest.raises(UserError, match=r"data\.yaml: (expected|'train' must name)"):
            load_yolo(tmp_path, tmp_path / "data.yaml", part="train")


def test_deep_nesting_is_refused_or_read(tmp_path: Path) -> None:
    deep = 20_000
    (tmp_path / "data.yaml").write_text("train: " + "[" * deep)
    with pytest.raises(UserError, match=r"data\.yaml: not valid YAML"):
        load_yolo(tmp_path, tmp_path / "data.yaml")
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Annotations" / "a.xml").write_text("<a>" * deep + "</a>" * deep)
    with pytest.raises(UserError, match="no objects in it"):
        load_voc(tmp_path)
