"""retinanet/data/yolo: label files in shares of the picture's sides become boxes in its pixels."""

from pathlib import Path

import pytest
from PIL import Image

from retinanet.data.faults import Fault
from retinanet.data.images import UnreadableImageError
from retinanet.data.yolo import load_yolo
from retinanet.errors import UserError
from retinanet.structures import Category

NAMES = "names: [cat, no, '7']\n"


def picture(path: Path, width: int = 200, height: int = 100, orientation: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    Image.new("RGB", (width, height)).save(path, exif=exif)


def label(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three training pictures, of which the second has no objects and the third no label file; one to validate with."""
    for name in ("train/a.jpg", "train/b.png", "train/sub/c d.jpg", "val/ç.jpg"):
        picture(tmp_path / "images" / name)
    label(tmp_path / "labels" / "train" / "a.txt", "0 0.5 0.5 0.2 0.4\n\n2 0.25 0.1 0.5 0.2\n")
    label(tmp_path / "labels" / "train" / "b.txt", "")
    label(tmp_path / "labels" / "val" / "ç.txt", "1 0.5 0.5 1 1")
    (tmp_path / "data.yaml").write_text("train: images/train\nval: images/val\ntest:\n" + NAMES)
    return tmp_path


def test_boxes_by_hand(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = load_yolo(root, root / "data.yaml", part="train")
    assert [data.file_names[i] for i in range(3)] == ["images/train/a.jpg", "images/train/b.png", "images/train/sub/c d.jpg"]
    assert data.sizes.tolist() == [[100, 200]] * 3
    # centre (100, 50), 40 wide, 40 high; centre (50, 10), 100 wide, 20 high
    assert data.coco_boxes.tolist() == [pytest.approx([80, 30, 40, 40]), pytest.approx([0, 0, 100, 20])]
    assert data.areas.tolist() == pytest.approx([1600, 2000])
    assert data.offsets.tolist() == [0, 2, 2, 2]
    assert data.labels.tolist() == [0, 2] and not data.crowd.any()
    assert data.categories == (Category(0, "cat"), Category(1, "no"), Category(2, "7"))  # as the text stands there
    assert data.path(2).is_file()
    assert "1 of 3 pictures have no label file and count as empty" in capsys.readouterr().out


def test_parts_share_their_classes_and_all_are_read_if_none_is_named(root: Path) -> None:
    every = load_yolo(root, root / "data.yaml")
    assert [every.file_names[i] for i in range(4)][3] == "images/val/ç.jpg"
    assert every.coco_boxes[2].tolist() == [0, 0, 200, 100]
    assert load_yolo(root, root / "data.yaml", part="val").categories == every.categories
    with pytest.raises(UserError, match=r"data\.yaml: expected test with a folder of pictures"):
        load_yolo(root, root / "data.yaml", part="test")


def test_sides_are_those_of_the_upright_picture(tmp_path: Path) -> None:
    """Orientation 6 is a picture that the camera stored lying: 200 x 100 is 100 wide and 200 high."""
    picture(tmp_path / "a.jpg", orientation=6)
    label(tmp_path / "a.txt", "0 0.5 0.5 0.5 0.5")
    label(tmp_path / "classes.txt", "cat")
    data = load_yolo(tmp_path)
    assert data.sizes.tolist() == [[200, 100]]
    assert data.coco_boxes.tolist() == [[25, 50, 50, 100]]


def test_an_outline_becomes_its_box(root: Path) -> None:
    label(root / "labels/train/b.txt", "1 0.1 0.2 0.3 0.1 0.2 0.6")
    data = load_yolo(root, root / "data.yaml", part="train")
    assert data.coco_boxes[-1].tolist() == pytest.approx([20, 10, 40, 50])  # x 0.1..0.3 of 200, y 0.1..0.6 of 100


@pytest.mark.parametrize(
    "names",
    ["names: {0: cat, 5: dog}", "names:\n  5: dog\n  0: cat", "path: .\nnc: 2\nnames: {'0': cat, '5': dog}"],
)
def test_names_may_be_a_mapping_with_gaps(root: Path, names: str) -> None:
    label(root / "labels/train/a.txt", "5 0.5 0.5 0.2 0.4")
    (root / "data.yaml").write_text("train: images/train\n" + names)
    data = load_yolo(root, root / "data.yaml", part="train")
    assert data.categories == (Category(0, "cat"), Category(5, "dog"))
    assert data.labels.tolist() == [1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: ../images/train\n", 3),  # Roboflow's, of a folder beside the file
        ("path: /nowhere/datasets/mine\ntrain: images/train\n", 3),  # of another machine
        ("path: mine\ntrain: images/train\n", 3),  # from ultralytics' own folder
        ("path: images\ntrain: train\n", 3),
        ("train: [images/train, images/val, images/train]\n", 4),  # each picture once
        ("train: list.txt\n", 2),
        ("train: .\n", 4),
    ],
)
def test_where_the_pictures_are(root: Path, text: str, expected: int) -> None:
    (root / "list.txt").write_text(f"./images/train/a.jpg\n\n{root}/images/val/ç.jpg\n", encoding="utf-8")
    (root / "data.yaml").write_text(text + NAMES)
    assert len(load_yolo(root, root / "data.yaml", part="train")) == expected


@pytest.mark.parametrize("classes", ["classes.txt", "obj.names", "labels/classes.txt"])
def test_without_a_yaml_the_names_stand_in_a_text_file(root: Path, classes: str) -> None:
    (root / "data.yaml").unlink()
    label(root / classes, "cat\nno\n7\n\n")
    data = load_yolo(root)
    assert len(data) == 4 and [category.name for category in data.categories] == ["cat", "no", "7"]


def test_classes_may_be_elsewhere(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "mine.names"
    elsewhere.write_text("x\ny\nz\n")
    data = load_yolo(root / "images", classes=elsewhere)  # the labels lie beside the folder
    assert [category.name for category in data.categories] == ["x", "y", "z"]
    assert len(data.labels) == 3 and data.file_names[0] == "train/a.jpg"


def test_linked_folders_are_followed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    (other / "images").symlink_to(root / "images", target_is_directory=True)
    (other / "labels").symlink_to(root / "labels", target_is_directory=True)
    (other / "data.yaml").write_text("train: images\n" + NAMES)
    assert len(load_yolo(other, other / "data.yaml").labels) == 3


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("0 0.5 0.5 0.2", "expected 'class cx cy width height', got '0 0.5 0.5 0.2'"),
        ("0 0.5 0.5 0.2 0.1 0.9", "expected 'class cx cy width height'"),  # with a score
        ("cat 0.5 0.5 0.2 0.1", "expected 'class cx cy width height'"),
        ("0,0.5,0.5,0.2,0.1", "expected 'class cx cy width height'"),
        ("0 100 50 20 10", "no shares of the picture's sides"),
        ("0 0.5 0.5 nan 0.1", "no shares of the picture's sides"),
        ("0 0.5 0.5 inf 0.1", "no shares of the picture's sides"),
        ("0 0.5 0.5 -0.2 0.1", "no shares of the picture's sides"),
        ("3 0.5 0.5 0.2 0.1", "class 3 is none of the 3 that have a name"),
        ("-1 0.5 0.5 0.2 0.1", "class -1 is none"),
        ("0.5 0.5 0.5 0.2 0.1", "class 0.5 is none"),
        ("nan 0.5 0.5 0.2 0.1", "class nan is none"),
    ],
)
def test_a_line_at_fault_is_named_and_a_check_reads_on(root: Path, line: str, said: str) -> None:
    label(root / "labels/train/a.txt", f"0 0.5 0.5 0.2 0.4\n{line}\n1 0.5 0.5 0.1 0.1")
    with pytest.raises(UserError) as caught:
        load_yolo(root, root / "data.yaml", part="train")
    assert "a.txt, line 2: " in str(caught.value) and said in str(caught.value) and "\n" not in str(caught.value)
    faults: list[Fault] = []
    assert load_yolo(root, root / "data.yaml", part="train", faults=faults).labels.tolist() == [0, 1]
    (fault,) = (fault for fault in faults if fault.kind != "missing label file")
    assert fault.message == str(caught.value) and fault.file.endswith("a.txt")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: ../../etc\n" + NAMES, "must be a path inside the image folder"),
        ("train: /etc\n" + NAMES, "must be a path inside the image folder"),
        ("path: /etc\ntrain: ssl\n" + NAMES, "must be a path inside the image folder"),
        ("train: images/tarin\n" + NAMES, "'train' names"),
        (NAMES, "expected train"),
        ("train: images/train\n", "expected 'names' with the classes"),
        ("train: images/train\nnames: cat\n", "expected 'names'"),
        ("train: images/train\nnames: []\n", "expected 'names'"),
        ("train: images/train\nnames: ['']\n", "expected 'names'"),
        ("train: images/train\nnames: [[cat]]\n", "expected 'names'"),
        ("train: images/train\nnames: {a: cat}\n", "expected 'names'"),
        ("train: images/train\nnames: {-1: cat}\n", "expected 'names'"),
        ("train: images/train\nnames: [cat, cat]\n", "category name 'cat' occurs more than once"),
        ("train: [images/train\n", "not valid YAML"),
        ("- train\n", "expected 'key: value' lines"),
        ("", "expected 'key: value' lines"),
        ("train: labels\n" + NAMES, "no pictures in"),
        ("a: !!python/object/apply:os.system [exit]\n", "expected"),
    ],
)
def test_a_yaml_at_fault_is_named(root: Path, text: str, said: str) -> None:
    (root / "data.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_yolo(root, root / "data.yaml", part="train")
    assert "data.yaml" in str(caught.value) and said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("../out.jpg", "inside the image folder"),
        ("/etc/hostname", "inside the image folder"),
        ("images/train/../../../out.jpg", "inside the image folder"),
        ("images/train/none.jpg", "none.jpg does not exist"),
        ("a\0b.jpg", "inside the image folder"),
    ],
)
def test_a_list_names_only_what_is_in_the_folder(root: Path, line: str, said: str) -> None:
    picture(root.parent / "out.jpg")
    (root / "list.txt").write_text(f"images/train/a.jpg\n{line}\n")
    (root / "classes.txt").write_text("cat\nno\n7")
    with pytest.raises(UserError, match=r"list\.txt, line 2") as caught:
        load_yolo(root, root / "list.txt")
    assert said in str(caught.value)


def test_faults_of_other_kinds(root: Path) -> None:
    (root / "labels").rename(root / "elsewhere")
    with pytest.raises(UserError, match=r"no picture has a label file; looked for .*labels/train/a\.txt"):
        load_yolo(root, root / "data.yaml")
    (root / "elsewhere").rename(root / "labels")
    (root / "images/train/b.png").write_bytes(b"no picture")
    with pytest.raises(UnreadableImageError, match=r"b\.png: not an image"):
        load_yolo(root, root / "data.yaml")
    (root / "labels/train/a.txt").write_bytes(b"\xff\xfe\xff")
    (root / "images/train/b.png").unlink()
    with pytest.raises(UserError, match=r"a\.txt: not UTF-8 text"):
        load_yolo(root, root / "data.yaml")
    (root / "data.yaml").unlink()
    with pytest.raises(UserError, match=r"classes\.txt: cannot be read: No such file"):
        load_yolo(root)
