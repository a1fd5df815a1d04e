"""retinanet/data/splits: parts that have each class in its share, every class in the first, and no picture twice."""

import runpy
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retinanet.data import splits
from retinanet.data.annotations import AnnotationRow, Annotations, ImageRow
from retinanet.data.splits import split_images
from retinanet.data.voc import load_voc
from retinanet.errors import UserError
from retinanet.structures import Category

THREE = {"train": 0.8, "val": 0.1, "test": 0.1}


def make(folder: Path, labels: list[list[int]], contents: list[int] | None = None, crowd: bool = False) -> Annotations:
    """An image with an object of each of its `labels`; equal `contents` make equal files (by default all differ)."""
    images = [ImageRow(n, f"{n}.png", 10, 10) for n in range(len(labels))]
    for n in range(len(labels)):
        (folder / f"{n}.png").write_bytes(b"%4d" % (n if contents is None else contents[n]))
    rows = [AnnotationRow(n, n, k, [0, 0, 1, 1], 1.0, crowd) for n, of_image in enumerate(labels) for k in of_image]
    classes = 1 + max((k for of_image in labels for k in of_image), default=0)
    return Annotations.pack("made", folder, [Category(k, f"class {k}") for k in range(classes)], images, rows)


def counts(data: Annotations, parts: dict[str, np.ndarray]) -> dict[str, list[int]]:
    return {name: data.select(images).counts().tolist() for name, images in parts.items()}


def test_shares_of_one_class_are_exact(tmp_path: Path) -> None:
    data = make(tmp_path, [[0]] * 100)
    assert [len(images) for images in split_images(data, THREE).values()] == [80, 10, 10]


def test_each_class_has_its_share_also_the_rarest(tmp_path: Path) -> None:
    """1,000 images of class 0, every tenth with class 1 too, every hundredth with class 2: ten images, 8, 1 and 1."""
    data = make(tmp_path, [[0] + [1] * (n % 10 == 0) + [2] * (n % 100 == 0) for n in range(1000)])
    parts = split_images(data, THREE)
    assert counts(data, parts) == {"train": [800, 80, 8], "val": [100, 10, 1], "test": [100, 10, 1]}
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(1000))
    assert all((np.diff(images) > 0).all() for images in parts.values())


def test_the_seed_decides_and_nothing_else(tmp_path: Path) -> None:
    data = make(tmp_path, [[n % 3] for n in range(60)])
    first, again, other = (split_images(data, THREE, seed) for seed in (1, 1, 2))
    assert all((first[name] == again[name]).all() for name in THREE)
    assert any((first[name] != other[name]).any() for name in THREE)


def test_same_bytes_stay_together(tmp_path: Path) -> None:
    contents = [n // 4 for n in range(80)]  # twenty pictures, each four times
    data = make(tmp_path, [[n % 2] for n in range(80)], contents)
    parts = split_images(data, {"train": 0.5, "val": 0.5})
    in_part = {name: {contents[n] for n in images} for name, images in parts.items()}
    assert not in_part["train"] & in_part["val"]
    assert sum(map(len, in_part.values())) == 20
    assert [len(images) for images in parts.values()] == [40, 40]


def test_images_without_objects_are_shared_too(tmp_path: Path) -> None:
    parts = split_images(make(tmp_path, [[]] * 20), THREE)
    assert [len(images) for images in parts.values()] == [16, 2, 2]
    crowds = split_images(make(tmp_path, [[0]] * 20, crowd=True), THREE)  # regions to be ignored are no objects
    assert [len(images) for images in crowds.values()] == [16, 2, 2]


def test_tiny_data_sets(tmp_path: Path) -> None:
    three = make(tmp_path, [[0], [0], [0]])
    assert [len(images) for images in split_images(three, THREE).values()] == [1, 1, 1]
    lonely = split_images(make(tmp_path, [[0], [1], [1], [2], []]), {"train": 0.9, "val": 0.1})
    assert 0 in lonely["train"] and 3 in lonely["train"]  # the only ones of their classes
    (validation,) = lonely["val"].tolist()
    assert validation in (1, 2)  # of the class that there is more of, rather than the empty image
    with pytest.raises(UserError, match="made: 2 different images cannot be split into 3 parts"):
        split_images(make(tmp_path, [[0]] * 9, [0, 1, 1, 1, 1, 1, 1, 1, 0]), THREE)


def test_a_class_that_others_would_use_up_is_in_the_first_part(tmp_path: Path) -> None:
    """Classes 1 to 3 have two images each, the second of which is one of the three of class 0. Dealt out first, they
    would put all of these into the other parts.
    """
    data = make(tmp_path, [[1], [1, 0], [2], [2, 0], [3], [3, 0]])
    for seed in range(20):
        assert min(counts(data, split_images(data, {"train": 0.5, "val": 0.5}, seed))["train"]) > 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sets(st.integers(0, 4), max_size=3), st.integers(0, 12)), min_size=1, max_size=25),
    st.sampled_from([(0.8, 0.1, 0.1), (0.5, 0.5), (0.1, 0.9), (1 / 3, 1 / 3, 1 / 3)]),
    st.integers(0, 3),
)
def test_any_split(
    tmp_path_factory: pytest.TempPathFactory, images: list[tuple[set[int], int]], sizes: tuple[float, ...], seed: int
) -> None:
    contents = [content for _, content in images]
    data = make(tmp_path_factory.getbasetemp(), [sorted(labels) for labels, _ in images], contents)
    shares = dict(zip(THREE, sizes, strict=False))
    if len(set(contents)) < len(shares):
        with pytest.raises(UserError, match="cannot be split"):
            split_images(data, shares, seed)
        return
    parts = split_images(data, shares, seed)
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(len(images)))
    of_part = [{contents[n] for n in chosen} for chosen in parts.values()]
    assert sum(map(len, of_part)) == len(set(contents))  # no content in two parts
    assert all(of_part)
    groups: dict[int, set[int]] = {}
    for labels, content in images:
        groups.setdefault(content, set()).update(labels)
    spare = min((sum(k in labels for labels in groups.values()) for k in set().union(*groups.values())), default=0)
    if spare > len(shares):  # else filling an empty part may have to take the last one of a class
        assert set().union(*(groups[content] for content in of_part[0])) == set().union(*groups.values())


def test_only_files_of_equal_size_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make(tmp_path, [[0]] * 4)
    (tmp_path / "0.png").write_bytes(b"longer than the others")
    read = []
    digest = splits.hashlib.file_digest
    monkeypatch.setattr(
        splits.hashlib, "file_digest", lambda stream, kind: read.append(Path(stream.name).name) or digest(stream, kind)
    )
    split_images(data, THREE)
    assert sorted(read) == ["1.png", "2.png", "3.png"]


def test_a_picture_that_is_not_there(tmp_path: Path) -> None:
    data = make(tmp_path, [[0]] * 4)
    (tmp_path / "2.png").unlink()
    with pytest.raises(UserError, match=r"2\.png: cannot be read: No such file"):
        split_images(data, THREE)


def test_table(tmp_path: Path) -> None:
    data = make(tmp_path, [[0], [0, 0], [0], [1]])
    tool = runpy.run_path(str(Path(__file__).parents[1] / "tools" / "convert_dataset.py"))
    table = tool["split_table"]({"train": data.select(np.array([0, 1, 3])), "val": data.select(np.array([2]))})
    assert [line.split() for line in table.splitlines()] == [
        ["train", "val"],
        ["images", "3", "75.0%", "1", "25.0%"],
        ["class", "0", "3", "75.0%", "1", "25.0%"],
        ["class", "1", "1", "100.0%", "0", "0.0%"],
    ]
    assert len({len(line) for line in table.splitlines()}) == 1  # in columns


def test_real_classes_have_their_shares(real_data: Path) -> None:
    data = load_voc(real_data / "bccd" / "BCCD")
    parts = split_images(data, THREE)
    found = np.array(list(counts(data, parts).values()))
    np.testing.assert_allclose(found / found.sum(axis=0), [[0.8] * 3, [0.1] * 3, [0.1] * 3], atol=0.025)
    assert [len(images) / 364 for images in parts.values()] == pytest.approx([0.8, 0.1, 0.1], abs=0.02)
