"""retinanet/data/csv_rows: keras-retinanet's lines become boxes, or one line that says which line is wrong."""

from pathlib import Path

import pytest

from retinanet.data.csv_rows import load_csv
from retinanet.data.faults import Fault
from retinanet.errors import UserError
from retinanet.structures import Category

ROWS = """\
b/1.jpg,10,20,30.5,40,dog
empty.jpg,,,,,

"ç, 犬.jpg",0,0,5,5,cat
b/1.jpg,1,2,1,9, dog
"""


def write(folder: Path, text: str = ROWS, name: str = "train.csv") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_rows_by_hand(tmp_path: Path) -> None:
    data = load_csv(write(tmp_path))
    assert [data.file_names[i] for i in range(3)] == ["b/1.jpg", "empty.jpg", "ç, 犬.jpg"]  # in order of appearance
    assert data.image_dir == tmp_path and data.image_ids.tolist() == [1, 2, 3]
    assert data.sizes.tolist() == [[0, 0]] * 3  # a CSV file does not say
    assert data.offsets.tolist() == [0, 2, 2, 3]
    assert data.coco_boxes.tolist() == [[10, 20, 20.5, 20], [1, 2, 0, 7], [0, 0, 5, 5]]
    assert data.areas.tolist() == [410, 0, 25]
    assert data.annotation_ids.tolist() == [1, 5, 4]  # their lines
    assert data.categories == (Category(1, "cat"), Category(2, "dog"))  # the names found, sorted, from 1
    assert data.labels.tolist() == [1, 1, 0]


def test_a_list_of_classes_gives_the_ids_also_of_classes_without_objects(tmp_path: Path) -> None:
    file = write(tmp_path)
    write(tmp_path, "dog,4\nbird,0\ncat,9\n", "classes.csv")  # beside it: found
    expected = (Category(0, "bird"), Category(4, "dog"), Category(9, "cat"))
    assert load_csv(file).categories == expected
    assert load_csv(write(tmp_path, "a.jpg,,,,,\n")).categories == expected
    other = write(tmp_path, "cat,0\ndog,1\n", "other.csv")
    assert load_csv(write(tmp_path), classes=other).categories == (Category(0, "cat"), Category(1, "dog"))


def test_images_may_be_elsewhere(tmp_path: Path) -> None:
    data = load_csv(write(tmp_path, f"{tmp_path}/pictures/a.jpg,1,1,2,2,x\nb.jpg,,,,,"), tmp_path / "pictures")
    assert [data.file_names[i] for i in range(2)] == ["a.jpg", "b.jpg"]  # a path that lies inside may be absolute


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("filename,xmin,ymin,xmax,ymax,class", "the corners of the box must be finite numbers"),  # a header line
        ("a.jpg,1,2,3,4", "expected path,x1,y1,x2,y2,class, got 'a.jpg,1,2,3,4'"),
        ("a.jpg,1,2,3,4,x,y", "expected path,x1,y1,x2,y2,class"),
        ("a.jpg", "expected path,x1,y1,x2,y2,class"),
        ("a.jpg,1,2,nan,4,x", "must be finite numbers"),
        ("a.jpg,1,2,inf,4,x", "must be finite numbers"),
        ("a.jpg,-1e308,2,1e308,4,x", "must be finite numbers"),  # its width is not
        ("a.jpg,1,2,,4,x", "must be finite numbers"),
        ("a.jpg,1,2,3,4,", "class '' is not in the list of classes"),
        (",1,2,3,4,x", "inside the image folder"),
        ("../a.jpg,1,2,3,4,x", "inside the image folder"),
        ("b/../../a.jpg,1,2,3,4,x", "inside the image folder"),
        ("/etc/passwd,1,2,3,4,x", "inside the image folder"),
        ("a\0.jpg,1,2,3,4,x", "inside the image folder"),
    ],
)
def test_a_line_at_fault_is_named_and_a_check_reads_on(tmp_path: Path, row: str, said: str) -> None:
    file = write(tmp_path, f"good.jpg,1,2,3,4,x\n{row}\nfine.jpg,1,2,3,4,x\n")
    with pytest.raises(UserError) as caught:
        load_csv(file)
    assert "train.csv, line 2" in str(caught.value) and said in str(caught.value) and "\n" not in str(caught.value)
    faults: list[Fault] = []
    assert len(load_csv(file, faults=faults).labels) == 2
    assert [fault.message for fault in faults] == [str(caught.value)]


def test_a_class_that_is_not_listed(tmp_path: Path) -> None:
    write(tmp_path, "dog,0\nhorse,1\n", "classes.csv")
    with pytest.raises(UserError, match=r"line 1: class 'hors' is not in the list of classes. Did you mean 'horse'\?"):
        load_csv(write(tmp_path, "a.jpg,1,2,3,4,hors\n"))


@pytest.mark.parametrize("text", ["dog\n", "dog,x\n", "dog,-1\n", ",0\n", "dog,0.5\n", "", "dog,99999999999999999999\n"])
def test_a_list_of_classes_at_fault(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"classes\.csv: expected a line 'name,id' for each class"):
        load_csv(write(tmp_path), classes=write(tmp_path, text, "classes.csv"))


def test_files_at_fault(tmp_path: Path) -> None:
    for text, said in (("", "no images in it"), ("\n\n", "no images"), ("a.jpg,,,,,\n", "no objects in it")):
        with pytest.raises(UserError, match=said):
            load_csv(write(tmp_path, text))
    with pytest.raises(UserError, match="cannot be read: No such file"):
        load_csv(tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes("ç.jpg,1,2,3,4,x\n".encode("latin1"))
    with pytest.raises(UserError, match=r"latin\.csv: not UTF-8 text"):
        load_csv(tmp_path / "latin.csv")
    with pytest.raises(UserError, match="field larger than field limit"):
        load_csv(write(tmp_path, '"a.jpg,1,2,3,4,x\n' + "x" * 200_000))


def test_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfa.jpg,1,2,3,4,x\r\n")
    assert load_csv(tmp_path / "a.csv").file_names[0] == "a.jpg"
