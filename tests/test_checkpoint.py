"""Checkpoints: complete, plain, never torn, and nothing that is none gets far."""

import contextlib
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from retinanet.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from retinanet.config import Config, parse_config
from retinanet.errors import UserError
from retinanet.model import build_model
from retinanet.structures import Category

CATEGORIES = (Category(3, "bird"), Category(90, "Käse"))
TINY = {
    "model": {
        "num_classes": 2,
        "backbone": "resnet18",
        "backbone_weights": "none",
        "norm": "batch",
        "fpn_channels": 32,
        "head_convs": 1,
        "anchors": {"sizes": [8, 16, 32, 64, 128], "scales": [1.0]},
    },
    "input": {"short_edge": 64, "long_edge": 96, "mean": [1, 2, 3]},
    "postprocess": {"nms_threshold": 0.25},
    "seed": 5,
}


def tiny_config() -> Config:
    return parse_config(TINY)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Random ones of a tiny model."""
    torch.manual_seed(0)
    config = tiny_config()
    return build_model(config.model, config.input).state_dict()


@pytest.fixture
def checkpoint(weights: dict[str, Tensor]) -> Checkpoint:
    return Checkpoint(tiny_config(), CATEGORIES, weights, thresholds={"bird": 0.31, "Käse": 0.5})


def test_round_trip(tmp_path: Path, checkpoint: Checkpoint) -> None:
    checkpoint.ema = {key: value + 1 for key, value in checkpoint.model.items()}
    checkpoint.training = {"step": 7, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}, "random": (1, [2, 3], None)}
    file = tmp_path / "new" / "folder" / "last.pt"
    save_checkpoint(file, checkpoint)
    again = load_checkpoint(file)
    assert again.config == checkpoint.config
    assert again.categories == CATEGORIES and isinstance(again.categories[0], Category)
    assert again.thresholds == {"bird": 0.31, "Käse": 0.5}
    for one, other in ((again.model, checkpoint.model), (again.ema, checkpoint.ema)):
        assert one is not None and other is not None and list(one) == list(other)
        assert all(torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one)
    assert again.training is not None
    assert again.training["step"] == 7 and again.training["random"] == (1, [2, 3], None)
    assert torch.equal(again.training["optimizer"]["state"][0]["exp_avg"], torch.ones(3))


def test_holds_tensors_and_plain_data_only(tmp_path: Path, checkpoint: Checkpoint) -> None:
    save_checkpoint(tmp_path / "best.pt", checkpoint)
    content = torch.load(tmp_path / "best.pt", weights_only=True)  # refuses anything else
    assert set(content) == {"format", "config", "categories", "model", "ema", "thresholds", "training"}
    plain = {type(leaf) for key in content if key != "model" for leaf in leaves(content[key])}
    assert plain <= {str, int, float, bool, type(None)}
    assert {type(value) for value in content["model"].values()} == {Tensor}
    assert content["categories"] == [{"id": 3, "name": "bird"}, {"id": 90, "name": "Käse"}]
    assert content["config"]["postprocess"]["nms_threshold"] == 0.25


def leaves(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return [leaf for key, value in tree.items() for leaf in [key, *leaves(value)]]
    return [leaf for value in tree for leaf in leaves(value)] if isinstance(tree, list) else [tree]


def test_build_gives_the_model_in_eval_mode(tmp_path: Path, checkpoint: Checkpoint) -> None:
    save_checkpoint(tmp_path / "best.pt", checkpoint)
    before = torch.get_rng_state()
    model = load_checkpoint(tmp_path / "best.pt").build()
    assert torch.equal(torch.get_rng_state(), before)  # no weight was drawn that is then thrown away
    assert not model.training
    assert model.mean.flatten().tolist() == [1, 2, 3]
    assert all(torch.equal(value, checkpoint.model[key]) for key, value in model.state_dict().items())


def test_build_prefers_the_averaged_weights(checkpoint: Checkpoint) -> None:
    bias = "cls_subnet.final.bias"
    assert torch.equal(checkpoint.build().state_dict()[bias], checkpoint.model[bias])
    checkpoint.ema = {**checkpoint.model, bias: torch.full_like(checkpoint.model[bias], 9.0)}
    assert torch.equal(checkpoint.build().state_dict()[bias], checkpoint.ema[bias])


def test_build_says_what_does_not_fit(checkpoint: Checkpoint) -> None:
    checkpoint.config.model.fpn_channels = 64
    with pytest.raises(UserError, match=r"weights do not fit .*: size mismatch for fpn\.") as error:
        checkpoint.build()
    assert "\n" not in str(error.value)


def test_an_interrupted_save_leaves_the_old_file(
    tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "last.pt"
    save_checkpoint(file, checkpoint)
    before = file.read_bytes()

    def half(content: Any, target: Any) -> None:
        target.write(before[: len(before) // 2])
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(file, checkpoint)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]  # no temporary either


def test_a_file_is_never_seen_half_written(tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """It appears under its name only after it has been flushed to the disk, so that a power cut cannot leave an empty one."""
    file, events = tmp_path / "last.pt", list[str]()
    fsync, replace = os.fsync, Path.replace

    def watched_fsync(number: int) -> None:
        events.append(f"fsync, {file.exists()}")
        fsync(number)

    def watched_replace(self: Path, target: Path) -> Path:
        events.append(f"replace, {file.exists()}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    save_checkpoint(file, checkpoint)
    assert events == ["fsync, False", "replace, False", "fsync, True"]  # the last is the folder's
    assert load_checkpoint(file).thresholds == checkpoint.thresholds


class Malicious:
    """What an attacker's pickle does: it calls a function of his choice while it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("form", ["archive", "bare pickle", "inside a checkpoint"])
def test_code_in_a_file_is_not_executed(tmp_path: Path, checkpoint: Checkpoint, form: str) -> None:
    file, marker = tmp_path / "evil.pt", tmp_path / "marker"
    if form == "archive":
        torch.save(Malicious(marker), file)
    elif form == "bare pickle":
        file.write_bytes(pickle.dumps(Malicious(marker), protocol=2))
    else:
        save_checkpoint(file, Checkpoint(tiny_config(), CATEGORIES, checkpoint.model, training={"x": Malicious(marker)}))
    with pytest.raises(UserError) as error:
        load_checkpoint(file)
    assert not marker.exists()
    assert "evil.pt" in str(error.value) and "\n" not in str(error.value)
    assert "weights_only" not in str(error.value)  # torch's message tells how to execute it
    if form == "bare pickle":
        pickle.loads(file.read_bytes())
    else:
        torch.load(file, weights_only=False)
    assert marker.exists()  # the file would have done it


def damaged(name: str, good: bytes) -> bytes:
    return {
        "empty": b"",
        "html": b"<!DOCTYPE html><html><head><title>404</title></head></html>",
        "half": good[: len(good) // 2],
        "beginning": good[:64],
        "almost all": good[:-65],  # the last 64 bytes are the seal, of which none is missed
        "json": b'{"format": 1}',
        "another archive": b"PK\x03\x04" + bytes(200),
        "pickle opcodes": b"(d.",
    }[name]


@pytest.mark.parametrize(
    "name", ["empty", "html", "half", "beginning", "almost all", "json", "another archive", "pickle opcodes"]
)
def test_damaged_files_and_other_kinds(tmp_path: Path, checkpoint: Checkpoint, name: str) -> None:
    file = tmp_path / "best.pt"
    save_checkpoint(file, checkpoint)
    file.write_bytes(damaged(name, file.read_bytes()))
    with pytest.raises(UserError, match=r"weights .*best\.pt are (not a checkpoint|damaged)") as error:
        load_checkpoint(file)
    assert "\n" not in str(error.value)


def test_a_flipped_bit_is_found(tmp_path: Path, checkpoint: Checkpoint) -> None:
    """A zip archive carries a checksum of each of its parts."""
    file = tmp_path / "best.pt"
    save_checkpoint(file, checkpoint)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(file)


def test_a_picture_a_folder_and_nothing(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png are not a checkpoint: another kind of file"):
        load_checkpoint(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"are a folder; name a file in it, such as .*best\.pt"):
        load_checkpoint(tmp_path)
    with pytest.raises(UserError, match=r"none\.pt do not exist"):
        load_checkpoint(tmp_path / "none.pt")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(UserError, match=r"a\.zip are damaged, or another kind of archive"):
        load_checkpoint(tmp_path / "a.zip")


FOREIGN: dict[str, Any] = {
    "a state dict": {"conv1.weight": torch.zeros(2, 2)},
    "another project's": {"model": {}, "optimizer": {}, "epoch": 3},
    "a list": [1, 2],
    "a tensor": torch.zeros(3),
    "a format that is no number": {"format": "1", "config": {}, "categories": [], "model": {}},
    "parts of ours": {"format": 1, "config": {}, "categories": [], "model": {}},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_another_programs_file(tmp_path: Path, name: str) -> None:
    torch.save(FOREIGN[name], tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt are not a checkpoint of this project"):
        load_checkpoint(tmp_path / "other.pt")


def test_a_newer_format_and_an_unknown_key(tmp_path: Path, checkpoint: Checkpoint) -> None:
    file = tmp_path / "best.pt"
    save_checkpoint(file, checkpoint)
    content = torch.load(file, weights_only=True)
    torch.save({**content, "format": 2}, file)
    with pytest.raises(UserError, match=r"best\.pt were written by a newer version of this project \(format 2\)"):
        load_checkpoint(file)
    torch.save({**content, "config": {**content["config"], "colour": 1}}, file)
    with pytest.raises(UserError, match=r"config in .*best\.pt: unknown key 'colour'"):
        load_checkpoint(file)


def test_an_interrupt_while_saving_leaves_nothing_behind(
    tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C is no `Exception`: it must clean up all the same."""

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with contextlib.suppress(KeyboardInterrupt):
        save_checkpoint(tmp_path / "last.pt", checkpoint)
    assert list(tmp_path.iterdir()) == []
