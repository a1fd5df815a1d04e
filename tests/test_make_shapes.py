"""datasets/make_shapes.py: what it draws, what it says about it, and that it draws the same again."""

import colorsys
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

SCRIPT = Path(__file__).parents[1] / "datasets" / "make_shapes.py"
spec = importlib.util.spec_from_file_location("make_shapes", SCRIPT)
make_shapes = importlib.util.module_from_spec(spec)
sys.modules["make_shapes"] = make_shapes  # its worker processes look it up by name
spec.loader.exec_module(make_shapes)


@pytest.fixture(scope="module", params=["demo", "hard"])
def drawn(request, tmp_path_factory):
    """A small set of each preset: its name and folder."""
    out = tmp_path_factory.mktemp(request.param) / "set"
    assert make_shapes.draw_dataset(out, request.param, seed=3, train=40, val=14)
    return request.param, out


@pytest.fixture(scope="module", params=["demo", "hard", "ablation"])
def scenes(request):
    """A preset and twenty of its scenes, one of them empty and one with a crowd."""
    preset = make_shapes.PRESETS[request.param]
    return preset, [make_shapes.compose(preset, 7, 0, index, preset.size) for index in range(20)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tight(mask: np.ndarray) -> list[int]:
    """[x, y, w, h] by the definition: up to the last column and row plus one."""
    rows, columns = np.nonzero(mask)
    left, top = int(columns.min()), int(rows.min())
    return [left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top]


def block(rows: int, columns: int, x: int, y: int):
    """A full rectangle as a thing, for sums by hand."""
    alpha, colour = np.ones((rows, columns), np.float32), np.zeros((rows, columns, 3), np.float32)
    return make_shapes.Thing(make_shapes.CATEGORIES[0], alpha, colour, x, y)


def test_same_arguments_give_the_same_bytes_whatever_the_workers(tmp_path):
    make_shapes.draw_dataset(tmp_path / "one", "demo", seed=1, train=26, val=4, size=96, workers=1)
    make_shapes.draw_dataset(tmp_path / "two", "demo", seed=1, train=26, val=4, size=96, workers=2)
    one = contents(tmp_path / "one")
    assert len(one) == 26 + 4 + 3  # the images, two annotation files and the stamp
    assert one == contents(tmp_path / "two")


def test_an_image_depends_on_seed_split_and_index_only(tmp_path):
    make_shapes.draw_dataset(tmp_path / "a", "demo", seed=1, train=3, val=3, size=96)
    make_shapes.draw_dataset(tmp_path / "b", "demo", seed=1, train=5, val=3, size=96)
    make_shapes.draw_dataset(tmp_path / "c", "demo", seed=2, train=3, val=3, size=96)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    images = [name for name in a if name.endswith(".jpg")]
    assert all(a[name] == b[name] for name in images)  # two more images change none of the others
    assert len({a[name] for name in images} | {c[name] for name in images}) == 12  # 2 seeds x 2 splits x 3, all differ
    assert a["annotations/val.json"] != c["annotations/val.json"]


def test_boxes_and_areas_are_those_of_the_painted_pixels(scenes):
    """Paint one object white, all else black, all with hard edges: what stays white is the visible mask."""
    preset, drawn = scenes
    for scene in drawn:
        hard = [t._replace(alpha=np.float32(t.alpha >= 0.5), colour=t.colour * 0) for t in scene.things]
        annotations = make_shapes.annotate(scene)
        assert len(annotations) == len(hard)
        for number, annotation in enumerate(annotations):
            white = hard[number]._replace(colour=hard[number].colour + 255)
            things = [*hard[:number], white, *hard[number + 1 :]]
            mask = make_shapes.paint(scene.canvas * 0, things)[..., 0] == 255
            assert annotation["bbox"] == tight(mask)
            assert annotation["area"] == mask.sum() >= preset.visible * hard[number].alpha.sum()
            assert annotation["category_id"] == hard[number].category.id


def test_the_topmost_object_changes_the_picture_in_its_box_only(scenes):
    """The picture itself with and without the last object: beyond its box are but slim tips that fade."""
    for scene in (scene for scene in scenes[1] if scene.things):
        image = make_shapes.paint(scene.canvas, scene.things).astype(int)
        without = make_shapes.paint(scene.canvas, scene.things[:-1]).astype(int)
        x, y, w, h = make_shapes.annotate(scene)[-1]["bbox"]
        left, top, wide, high = tight(np.abs(image - without).max(2) > 8)
        assert np.abs([left - x, top - y, left + wide - x - w, top + high - y - h]).max() <= 2


def test_truncation_and_occlusion_by_hand():
    scene = make_shapes.Scene(np.zeros((20, 20, 3), np.float32), [], np.full((20, 20), -1))
    # 10 rows x 6 columns from (-2, 3): columns 0-3 and rows 3-12 are inside, 40 of 60 pixels.
    assert make_shapes._add(scene, block(10, 6, -2, 3), 0.35)
    assert make_shapes.annotate(scene)[0]["bbox"] == [0, 3, 4, 10]
    # 4 x 4 over its rows 9-12 leaves rows 3-8: 24 of 60 pixels, 0.40.
    assert make_shapes._add(scene, block(4, 4, 0, 9), 0.35)
    # One more row gone would leave 20 of 60, 0.33 < 0.35: refused, and nothing changes.
    assert not make_shapes._add(scene, block(1, 4, 0, 3), 0.35)
    # 2 of 6 columns inside, 0.33: the newcomer itself would be too little.
    assert not make_shapes._add(scene, block(4, 6, 18, 0), 0.35)
    found = [(annotation["bbox"], annotation["area"]) for annotation in make_shapes.annotate(scene)]
    assert found == [([0, 3, 4, 6], 24), ([0, 9, 4, 4], 16)]


def test_run_lengths_by_hand():
    # Down the columns: 0 0, 1 0, 1 1, so two zeros, a one, a zero, two ones.
    mask = np.array([[0, 1, 1], [0, 0, 1]], bool)
    assert make_shapes._run_lengths(mask) == {"counts": [2, 1, 1, 2], "size": [2, 3]}
    # The first run counts zeros even where there are none.
    assert make_shapes._run_lengths(np.array([[True], [False]])) == {"counts": [0, 1, 1], "size": [2, 1]}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools under NumPy 2
@pytest.mark.parametrize("split", ["train", "val"])
def test_pycocotools_reads_valid_annotations(drawn, split):
    coco = COCO(drawn[1] / "annotations" / f"{split}.json")
    annotations = coco.dataset["annotations"]
    assert len({annotation["id"] for annotation in annotations}) == len(annotations) > 0
    assert min(annotation["id"] for annotation in annotations) > 0  # pycocotools takes a match with id 0 for none
    assert len(coco.imgs) == len(coco.dataset["images"]) == {"train": 40, "val": 14}[split]
    for record in coco.imgs.values():
        with Image.open(drawn[1] / split / record["file_name"]) as image:
            assert image.size == (record["width"], record["height"])
            assert image.mode == "RGB"
    for annotation in annotations:
        image, (x, y, w, h) = coco.imgs[annotation["image_id"]], annotation["bbox"]
        assert x >= 0 and y >= 0 and w > 0 and h > 0
        assert x + w <= image["width"] and y + h <= image["height"]
        assert 0 < annotation["area"] <= w * h
        assert annotation["category_id"] in coco.cats
        if annotation["iscrowd"]:
            mask = coco.annToMask(annotation)
            assert tight(mask) == annotation["bbox"] and mask.sum() == annotation["area"]


def test_category_ids_have_gaps_and_start_above_one(drawn):
    categories = json.loads((drawn[1] / "annotations" / "train.json").read_text())["categories"]
    ids = [category["id"] for category in categories]
    assert len(ids) == len(set(ids)) >= 6
    assert min(ids) > 1 and max(ids) > len(ids)  # neither id nor id - 1 is an index


def test_empty_images_and_crowds(drawn):
    # Empty are the indices 12 and 37 of 40 and 12 of 14; crowds are at 5 and 25 of 40 and 5 of 14.
    found = make_shapes.properties(drawn[1])
    assert (found["images"], found["empty"], found["crowds"]) == (54, 3, 3)
    assert min(found["objects"].values()) >= 10  # 1/6 of more than 100 objects


def test_properties_by_hand(tmp_path):
    images = [{"id": 1}, {"id": 2}]
    boxes = [[0, 0, 10, 10], [0, 5, 10, 10], [8, 0, 10, 10], [40, 40, 32, 32]]
    # IoU of the first two: 50 / 150; of the first and third: 20 / 180 < 0.2; the last one is not below 32 x 32.
    annotations = [{"image_id": 1, "category_id": 2, "bbox": box, "iscrowd": 0} for box in boxes]
    annotations.append({"image_id": 1, "category_id": 3, "bbox": [0, 0, 10, 10], "iscrowd": 1})
    (tmp_path / "annotations").mkdir()
    for split, found in {"train": annotations, "val": []}.items():
        coco = {"images": images, "annotations": found}
        (tmp_path / "annotations" / f"{split}.json").write_text(json.dumps(coco))
    found = make_shapes.properties(tmp_path)
    assert found["objects"] == {"heart": 4, "star": 0, "triangle": 0, "ring": 0, "disc": 0, "cross": 0}
    del found["objects"]
    assert found == {"images": 4, "empty": 3, "crowds": 1, "small": 3 / 4, "overlapping": 2 / 4}


def test_what_the_presets_promise(drawn):
    preset, out = drawn
    found = make_shapes.properties(out)
    coco = json.loads((out / "annotations" / "train.json").read_text())
    shapes = {(image["width"], image["height"]) for image in coco["images"]}
    sides = [max(a["bbox"][2:]) for a in coco["annotations"] if not a["iscrowd"]]
    if preset == "hard":
        assert shapes == {(320, 320), (320, 256), (256, 320)}
        assert found["small"] >= 0.25 and found["overlapping"] >= 0.15
        assert min(sides) < 16 and max(sides) > 96
    else:
        assert shapes == {(160, 160), (160, 128), (128, 160)}
        assert 0.05 <= found["overlapping"] <= 0.35  # overlaps exist, but most objects stand free
        assert min(sides) < 24 and 80 < max(sides) <= 98  # 0.6 * 160, and at most a pixel more on either side


def test_hue_tells_the_class_in_demo_but_not_in_hard(scenes):
    preset, drawn = scenes
    hues: dict[str, list[float]] = {}
    for thing in (thing for scene in drawn for thing in scene.things if not thing.crowd):
        mean = np.median(thing.colour[thing.alpha >= 0.5], 0)
        hues.setdefault(thing.category.name, []).append(colorsys.rgb_to_hsv(*mean.tolist())[0])
    assert hues.keys() == {category.name for category in make_shapes.CATEGORIES}
    for category in make_shapes.CATEGORIES:
        # The distance on the circle of hues; typical ones lie at least 0.12 apart.
        off = [abs((hue - category.hue + 0.5) % 1 - 0.5) for hue in hues[category.name]]
        assert max(off) < 0.08 if preset.typical_hue else max(off) > 0.35


def test_a_finished_set_is_not_drawn_again(tmp_path, capsys):
    out = tmp_path / "set"
    arguments = ["--out", str(out), "--train", "2", "--val", "1", "--workers", "1"]
    make_shapes.main(arguments)
    assert "drawn" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    make_shapes.main(arguments)
    said = capsys.readouterr().out
    assert "already" in said and said.splitlines()[-1] == "next: python tools/train.py configs/demo.yaml"
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(FileExistsError, match="something else"):
        make_shapes.draw_dataset(out, train=3, val=1)
    (out / "train" / "000001.jpg").unlink()
    with pytest.raises(FileExistsError, match="something else"):  # no longer exactly this data
        make_shapes.draw_dataset(out, train=2, val=1)


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    draw = make_shapes._draw

    def interrupted(stamp, folder, index):
        if index == 2:
            raise KeyboardInterrupt
        return draw(stamp, folder, index)

    monkeypatch.setattr(make_shapes, "_draw", interrupted)
    with pytest.raises(SystemExit, match="interrupted"):
        make_shapes.main(["--out", str(tmp_path / "set"), "--workers", "1"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--preset", "easy"], "invalid choice: 'easy'"),
        (["--train", "0"], "train must be at least 1, not 0"),
        (["--val", "many"], "invalid int value: 'many'"),
        (["--seed", "-1"], "seed must be at least 0, not -1"),
        (["--preset", "hard", "--size", "256"], "size must be at least 320, not 256"),
        (["--workers", "0"], "workers must be at least 1, not 0"),
        ([], "holds something else"),
    ],
)
def test_a_bad_argument_gets_one_line(tmp_path, capsys, arguments, said):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        make_shapes.main(["--out", str(tmp_path), *arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert said in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
