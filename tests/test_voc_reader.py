"""retinanet/data/voc: what the files of other programs need. The plain cases are in test_annotations."""

import re
from pathlib import Path

import pytest

from retinanet.data.faults import Fault
from retinanet.data.voc import load_voc
from retinanet.errors import UserError

OBJECT = "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"


def xml(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"<annotation>{content}</annotation>", encoding="utf-8")


def test_one_based_boxes_by_hand(tmp_path: Path) -> None:
    """VOC's own count pixels from 1, the last inside: 1..200 is all of a picture 200 wide, in our corners 0 to 200."""
    xml(tmp_path / "Annotations" / "a.xml", OBJECT.format("x", 1, 1, 200, 100) + OBJECT.format("x", 11.5, 21, 30, 40))
    assert load_voc(tmp_path, one_based=True).coco_boxes.tolist() == [[0, 0, 200, 100], [10.5, 20, 19.5, 20]]
    assert load_voc(tmp_path).coco_boxes.tolist() == [[1, 1, 199, 99], [11.5, 21, 18.5, 19]]


def test_xml_may_lie_beside_the_images(tmp_path: Path) -> None:
    xml(tmp_path / "a.xml", "<filename>a.png</filename>" + OBJECT.format("x", 1, 2, 3, 4))
    data = load_voc(tmp_path)
    assert data.path(0) == tmp_path / "a.png" and data.coco_boxes.tolist() == [[1, 2, 2, 2]]


def test_xml_in_sub_folders(tmp_path: Path) -> None:
    xml(tmp_path / "Annotations" / "x" / "one.xml", "<filename>x/one.png</filename>" + OBJECT.format("a", 1, 2, 3, 4))
    xml(tmp_path / "Annotations" / "y" / "one.xml", OBJECT.format("b", 1, 2, 3, 4))
    data = load_voc(tmp_path)
    assert [data.file_names[i] for i in range(2)] == ["x/one.png", "y/one.jpg"]
    (tmp_path / "set.txt").write_text("y/one\n")
    assert load_voc(tmp_path, tmp_path / "set.txt").file_names[0] == "y/one.jpg"


LAUGHS = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 9))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le", "utf-16-be", "iso-8859-1"])
@pytest.mark.parametrize(
    "declared",
    [
        '<!DOCTYPE a [<!ENTITY l0 "ha">' + LAUGHS + "]><annotation><filename>&l8;</filename></annotation>",
        '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation><filename>&x;</filename></annotation>',
        '<!DOCTYPE a SYSTEM "http://example.com/a.dtd"><annotation/>',
        '<!DOCTYPE a [<!ENTITY % p SYSTEM "a.dtd"> %p;]><annotation/>',
    ],
)
def test_declarations_are_refused_unread(tmp_path: Path, declared: str, encoding: str) -> None:
    """Entities can grow to gigabytes, or bring in other files."""
    (tmp_path / "Annotations").mkdir()
    head = f'<?xml version="1.0" encoding="{encoding}"?>' if encoding != "utf-16" else ""
    (tmp_path / "Annotations" / "a.xml").write_bytes((head + declared).encode(encoding))
    with pytest.raises(UserError, match=r"a\.xml: has a DOCTYPE"):
        load_voc(tmp_path)


def test_an_entity_without_a_declaration_is_no_xml(tmp_path: Path) -> None:
    xml(tmp_path / "Annotations" / "a.xml", "<filename>&x;</filename>")
    with pytest.raises(UserError, match=r"a\.xml: not valid XML: undefined entity"):
        load_voc(tmp_path)


def test_a_file_too_large_for_its_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retinanet.data.voc.LARGEST_XML", 1 << 20)
    xml(tmp_path / "Annotations" / "a.xml", " " * (1 << 20))
    with pytest.raises(UserError, match=r"a\.xml: larger than 1 MB"):
        load_voc(tmp_path)


@pytest.mark.parametrize("size", ["-1", "1e300", "nan", "99999999999"])
def test_a_size_that_is_none(tmp_path: Path, size: str) -> None:
    xml(tmp_path / "Annotations" / "a.xml", f"<size><width>{size}</width><height>3</height></size>")
    with pytest.raises(UserError, match=r"a\.xml: <width> of <size> must be a number of pixels"):
        load_voc(tmp_path)


def test_a_data_set_without_objects_is_refused_with_the_first_reason(tmp_path: Path) -> None:
    xml(tmp_path / "Annotations" / "a.xml", "")
    with pytest.raises(UserError, match=r"Annotations: no objects in it$"):
        load_voc(tmp_path)
    xml(tmp_path / "Annotations" / "a.xml", "<object>")
    with pytest.raises(UserError, match=r"no objects in it; the first fault: .*a\.xml: not valid XML"):
        load_voc(tmp_path, faults=[])
    xml(tmp_path / "Annotations" / "a.xml", OBJECT.format("x", 1, 2, 3, 4))
    (tmp_path / "set.txt").write_text("\n")
    with pytest.raises(UserError, match=r"set\.txt: no images in it"):
        load_voc(tmp_path, tmp_path / "set.txt")


def test_a_check_notes_all_faults_and_reads_on(tmp_path: Path) -> None:
    folder = tmp_path / "Annotations"
    good = OBJECT.format("x", 1, 2, 3, 4)
    xml(folder / "a.xml", OBJECT.format("x", 1, 2, "?", 4) + good + OBJECT.format("", 1, 2, 3, 4))
    xml(folder / "b.xml", "<filename>../b.jpg</filename>" + good)
    xml(folder / "c.xml", "<object>")
    xml(folder / "d.xml", good)
    (tmp_path / "set.txt").write_text("a\nb\nd\nnone\n")
    faults: list[Fault] = []
    data = load_voc(tmp_path, tmp_path / "set.txt", faults=faults)
    assert [data.file_names[i] for i in range(2)] == ["a.jpg", "d.jpg"] and data.offsets.tolist() == [0, 1, 2]
    assert [(fault.kind, Path(fault.file).name) for fault in faults] == [
        ("unusable entry", "c.xml"),
        ("unusable entry", "set.txt"),
        ("unusable box", "a.xml"),
        ("unknown class", "a.xml"),
        ("unusable file name", "b.xml"),
    ]


def test_real_boxes_are_those_that_a_search_for_numbers_finds(real_data: Path) -> None:
    root = real_data / "bccd" / "BCCD"
    found = []
    for file in sorted((root / "Annotations").iterdir()):
        texts = [re.findall(rf"<{tag}>(\d+)</{tag}>", file.read_text()) for tag in ("xmin", "ymin", "xmax", "ymax")]
        found += [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in zip(*[map(int, column) for column in texts], strict=True)]
    assert len(found) == 4888
    assert load_voc(root).coco_boxes.tolist() == found
