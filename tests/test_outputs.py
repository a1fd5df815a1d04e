"""What prediction writes, read back by other readers: COCO's API, an XML parser, the csv module, a hand-written YOLO one."""

import csv
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
import torch
from pycocotools.coco import COCO

from retinanet.data.images import read_image
from retinanet.inputs import Frame, Source
from retinanet.outputs import FORMATS, Outputs, folder_names
from retinanet.structures import Category, Detections

CATEGORIES = (Category(3, "red"), Category(90, "tooth brush"))
VIDEO = Source("films/drive.mp4")


def found(*entries: tuple[list[float], float, int], categories: tuple[Category, ...] = CATEGORIES) -> Detections:
    boxes = torch.tensor([box for box, _, _ in entries]).reshape(-1, 4)
    scores, labels = (torch.tensor([entry[n] for entry in entries]) for n in (1, 2))
    return Detections(boxes, scores.float(), labels.long(), categories)


TWO = found(([10.0, 20, 30, 60], 0.75, 1), ([0.5, 0.25, 99.5, 50], 0.5, 0))


def still(name: str, image_id: int = 1, size: tuple[int, int] = (80, 100)) -> Frame:
    """Each pixel tells where it is: red its column, green its row."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    return Frame(Source(name), np.stack([columns % 256, rows % 256, 0 * rows], axis=2).astype(np.uint8), image_id)


def moving(number: int, size: tuple[int, int] = (80, 100), source: Source = VIDEO, time: float | None = None) -> Frame:
    image = np.full((*size, 3), 40 * number, np.uint8)
    return Frame(source, image, number + 1, number, number / 10 if time is None else time, 10.0)


def write(folder: Path, pairs: list[tuple[Frame, Detections]], **options: Any) -> int:
    options = {"formats": FORMATS, "inputs": [frame.source for frame, _ in pairs]} | options
    outputs = Outputs(folder, CATEGORIES, **options)
    for frame, detections in pairs:
        outputs.add(frame, detections)
    outputs.close()
    return outputs.objects


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_all_files(tmp_path: Path) -> None:
    pairs = [(still("a/street.png"), TWO), (still("b/street.png", 2), found())]
    assert write(tmp_path, pairs) == 2
    assert files(tmp_path) == {
        *("street.jpg", "street_2.jpg", "detections.json", "coco.json", "detections.csv"),
        *("yolo/street.txt", "yolo/street_2.txt", "voc/street.xml", "voc/street_2.xml"),
        *("crops/tooth_brush/street_1.jpg", "crops/red/street_2.jpg"),
    }


def test_only_what_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "one", [(still("a.png"), TWO)], formats=("csv",), pictures=False)
    assert files(tmp_path / "one") == {"detections.csv"}
    write(tmp_path / "two", [(moving(0), TWO)], formats=(), pictures=True)
    assert files(tmp_path / "two") == {"drive.mp4"}
    assert write(tmp_path / "three", []) == 0
    assert json.loads((tmp_path / "three" / "detections.json").read_text()) == []


def test_detections_json(tmp_path: Path) -> None:
    write(tmp_path, [(still("a.png"), TWO), (moving(3), TWO)])
    entries = json.loads((tmp_path / "detections.json").read_text())
    first = {"image_id": 1, "file_name": "a.png", "category_id": 90, "category_name": "tooth brush"}
    assert entries[0] == first | {"bbox": [10, 20, 20, 40], "score": 0.75}
    assert entries[2] == first | {
        "image_id": 4,
        "file_name": "films/drive.mp4",
        "bbox": [10, 20, 20, 40],
        "score": 0.75,
        "frame": 3,
        "time": 0.3,
    }


def test_coco_is_what_pycocotools_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, [(still("a.png"), TWO)], formats=("coco",))
    truth = COCO()
    truth.dataset = {"images": [{"id": 1}], "annotations": [], "categories": [{"id": c.id, "name": c.name} for c in CATEGORIES]}
    truth.createIndex()
    results = truth.loadRes(str(tmp_path / "coco.json"))
    (one,) = results.loadAnns(results.getAnnIds(catIds=[90]))
    assert (one["bbox"], one["score"], one["image_id"]) == ([10, 20, 20, 40], 0.75, 1)
    assert len(results.getAnnIds()) == 2


def test_yolo(tmp_path: Path) -> None:
    """In a picture 100 wide and 80 high. No file is left out: one without objects says that there are none."""
    write(tmp_path, [(still("a.png"), TWO), (still("b.png", 2), found())], formats=("yolo",))
    rows = [[float(value) for value in line.split()] for line in (tmp_path / "yolo" / "a.txt").read_text().splitlines()]
    assert rows[0] == pytest.approx([1, 0.2, 0.5, 0.2, 0.5, 0.75])  # label, centre, size, score
    assert rows[1] == pytest.approx([0, 0.5, 25.125 / 80, 0.99, 49.75 / 80, 0.5])
    assert (tmp_path / "yolo" / "b.txt").read_text() == ""


def test_voc(tmp_path: Path) -> None:
    write(tmp_path, [(still("photos/a.png"), TWO)], formats=("voc",))
    root = ElementTree.parse(tmp_path / "voc" / "a.xml").getroot()
    assert root.findtext("filename") == "a.png"
    assert [root.findtext(f"size/{side}") for side in ("width", "height")] == ["100", "80"]
    assert [entry.findtext("name") for entry in root.iter("object")] == ["tooth brush", "red"]
    box = root.find("object/bndbox")
    assert box is not None
    assert [float(box.findtext(side) or "") for side in ("xmin", "ymin", "xmax", "ymax")] == [10, 20, 30, 60]


def test_csv(tmp_path: Path) -> None:
    odd = (Category(1, 'a "quoted", name'), Category(2, "b\nc"))
    outputs = Outputs(tmp_path, odd, formats=("csv",))
    outputs.add(still("x,y.png"), found(([10.0, 20, 30, 60], 0.75, 0), categories=odd))
    outputs.add(moving(2), found(([10.0, 20, 30, 60], 0.5, 1), categories=odd))
    outputs.close()
    with (tmp_path / "detections.csv").open(newline="") as file:
        one, other = csv.DictReader(file)
    assert (one["file_name"], one["category_name"], one["frame"], one["time"]) == ("x,y.png", 'a "quoted", name', "", "")
    assert [float(one[key]) for key in ("x", "y", "width", "height", "score")] == [10, 20, 20, 40, 0.75]
    assert (other["category_name"], other["frame"], other["time"], other["image_id"]) == ("b\nc", "2", "0.2", "3")


def test_crops(tmp_path: Path) -> None:
    """Whole pixels that the box touches, of the picture without any drawing; a box outside it gives none."""
    boxes = found(([10.4, 20, 29.2, 60], 0.9, 1), ([90.0, 70, 120, 90], 0.8, 0), ([200.0, 200, 210, 210], 0.7, 0))
    write(tmp_path, [(still("a.png"), boxes)], formats=("crops",))
    assert files(tmp_path / "crops") == {"tooth_brush/a_1.jpg", "red/a_2.jpg"}
    crop = read_image(tmp_path / "crops" / "tooth_brush" / "a_1.jpg").astype(int)
    assert crop.shape == (40, 20, 3)  # rows 20 to 60, columns 10 to 30
    assert abs(crop[0, 0, :2] - [10, 20]).max() <= 6 and abs(crop[-1, -1, :2] - [29, 59]).max() <= 6
    assert read_image(tmp_path / "crops" / "red" / "a_2.jpg").shape == (10, 10, 3)


def test_names_of_classes_lead_nowhere_else(tmp_path: Path) -> None:
    names = ["..", "../../etc", "/abs", "a/b", "a_b", "", "con\x00trol", "A", "a", "日本 語", "x" * 500]
    categories = tuple(Category(n, name) for n, name in enumerate(names))
    folders = folder_names(categories)
    assert folders[:3] == ["class_0", "etc", "abs"]
    assert len(set(map(str.lower, folders))) == len(names)
    outputs = Outputs(tmp_path / "out", categories, formats=FORMATS)
    every = [([10.0, 20, 30, 60], 0.9, label) for label in range(len(names))]
    outputs.add(still("a.png"), found(*every, categories=categories))
    outputs.close()
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    crops = list((tmp_path / "out" / "crops").rglob("*.jpg"))
    assert len(crops) == len(names) and all(crop.parent.parent == tmp_path / "out" / "crops" for crop in crops)


def test_a_picture_too_large_for_jpeg(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = still("pano.tif", size=(20, 66_000))
    write(tmp_path, [(wide, found(([0.0, 0, 65_900, 20], 0.9, 0)))], formats=("crops",))
    assert files(tmp_path) == {"pano.png", "crops/red/pano_1.png"}
    assert read_image(tmp_path / "pano.png").shape == (20, 66_000, 3)
    assert f"{tmp_path / 'pano.png'}: PNG, because a JPEG holds no more than 65500 pixels a side" in capsys.readouterr().out


def test_inputs_are_not_written_over(tmp_path: Path) -> None:
    for name in ("a.jpg", "pano.png", "drive.mp4"):
        (tmp_path / name).write_bytes(b"mine")
    wide = still(str(tmp_path / "pano.png"), size=(20, 66_000))
    film = moving(0, source=Source(str(tmp_path / "drive.mp4")))
    write(tmp_path, [(still(str(tmp_path / "a.jpg")), TWO), (wide, TWO), (film, TWO)], formats=())
    assert files(tmp_path) == {"a.jpg", "pano.png", "drive.mp4", "a_2.jpg", "pano_2.png", "drive_2.mp4"}
    assert {(tmp_path / name).read_bytes() for name in ("a.jpg", "pano.png", "drive.mp4")} == {b"mine"}


def read_video(path: Path) -> tuple[float, list[np.ndarray]]:
    capture, pictures = cv2.VideoCapture(str(path)), []
    while (picture := capture.read()[1]) is not None:
        pictures.append(picture[:, :, ::-1])
    return capture.get(cv2.CAP_PROP_FPS), pictures


def test_a_video_with_boxes(tmp_path: Path) -> None:
    """Same size, same rate, a picture for each frame, drawn on: frame 1 has a box, the others none."""
    box = found(([20.0, 30, 80, 70], 0.9, 0))
    write(tmp_path, [(moving(n), box if n == 1 else found()) for n in range(4)], formats=("yolo",))
    assert files(tmp_path) == {"drive.mp4", *(f"yolo/drive_00000{n}.txt" for n in range(4))}
    fps, pictures = read_video(tmp_path / "drive.mp4")
    assert fps == 10 and [picture.shape for picture in pictures] == [(80, 100, 3)] * 4
    for n, picture in enumerate(pictures):
        assert abs(picture[75:, :10].mean() - 40 * n) < 5
        edge = picture[30:70, 19:22].astype(int)  # the box's left side; red's colour is none of the greys
        assert (np.ptp(edge, axis=2).max() > 60) == (n == 1)


def test_videos_one_after_the_other(tmp_path: Path) -> None:
    other = Source("other/drive.mp4")
    write(tmp_path, [(moving(0), TWO), (moving(1), TWO), (moving(0, (48, 64), other), TWO)], formats=("yolo",))
    assert files(tmp_path) >= {"drive.mp4", "drive_2.mp4", "yolo/drive_000001.txt", "yolo/drive_2_000000.txt"}
    assert len(read_video(tmp_path / "drive.mp4")[1]) == 2
    assert [picture.shape for picture in read_video(tmp_path / "drive_2.mp4")[1]] == [(48, 64, 3)]


def test_a_cameras_video_is_as_long_as_it_was(tmp_path: Path) -> None:
    """Ten a second, of which the second came after 0.5 s: it stands for the four that were missed too."""
    camera = Source("webcam:0", 0)
    write(tmp_path, [(moving(1, source=camera, time=0.0), TWO), (moving(4, source=camera, time=0.5), TWO)], formats=())
    _, pictures = read_video(tmp_path / "webcam_0.mp4")
    assert [round(float(picture[75:, :10].mean()) / 40) for picture in pictures] == [1, 4, 4, 4, 4, 4]


def test_a_video_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "drive.mp4").mkdir()
    with pytest.raises(Exception, match=r"drive\.mp4: this OpenCV cannot write such a video; --no-pictures does without"):
        write(tmp_path, [(moving(0), TWO)])


def test_files_are_named_in_the_order_of_the_inputs(tmp_path: Path) -> None:
    """Not in that of the pictures: of many ranks each sees only some."""
    sources = [Source("a/street.png"), Source("b/street.png"), Source("c/street.mp4"), Source("d/street.png")]
    write(tmp_path, [(still("d/street.png", 4), TWO), (still("b/street.png", 2), TWO)], formats=(), inputs=sources)
    assert files(tmp_path) == {"street_2.jpg", "street_4.jpg"}


def test_entries_of_all_ranks_in_the_pictures_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = [{"image_id": n, "score": score} for n, score in ((3, 0.5), (3, 0.9), (4, 0.1))]
    monkeypatch.setattr("retinanet.outputs.gather_to_main", lambda entries: [entries, other])
    pairs = [(still("a.png", 1), TWO), (still("b.png", 2), found()), (still("e.png", 5), TWO)]
    assert write(tmp_path, pairs, formats=("json",)) == 7
    entries = json.loads((tmp_path / "detections.json").read_text())
    assert [(e["image_id"], e["score"]) for e in entries] == [
        *((1, 0.75), (1, 0.5), (3, 0.5), (3, 0.9), (4, 0.1)),  # within a picture as they came
        *((5, 0.75), (5, 0.5)),
    ]


def test_other_ranks_leave_the_common_files_to_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retinanet.outputs.is_main", lambda: False)
    monkeypatch.setattr("retinanet.outputs.gather_to_main", lambda entries: [])
    write(tmp_path, [(still("a.png"), TWO)], formats=("json", "csv", "coco", "yolo"), sheet=True)
    assert files(tmp_path) == {"a.jpg", "yolo/a.txt"}


def test_what_goes_wrong_while_writing_is_raised_and_the_rest_is_kept(tmp_path: Path) -> None:
    """A folder stands where the second picture goes."""
    (tmp_path / "b.jpg").mkdir()
    outputs = Outputs(tmp_path, CATEGORIES)
    for n, name in enumerate("abc", start=1):
        outputs.add(still(f"{name}.png", n), TWO)
    with pytest.raises(IsADirectoryError):
        outputs.close()
    assert files(tmp_path) == {"a.jpg", "c.jpg", "detections.json"}
    outputs = Outputs(tmp_path, CATEGORIES)
    with pytest.raises(IsADirectoryError):  # and before the end, when it is a long one
        for n in range(1, 100):
            outputs.add(still("b.png", n), TWO)
    with pytest.raises(IsADirectoryError):
        outputs.close()
