"""Detectors by name: fetched once, checked, converted, kept; and one line that says what to do when that fails."""

import hashlib
import io
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torchvision.models.detection import RetinaNet_ResNet50_FPN_V2_Weights, RetinaNet_ResNet50_FPN_Weights

from retinanet.checkpoint import Checkpoint, save_checkpoint
from retinanet.config import parse_config
from retinanet.errors import UserError
from retinanet.model import build_model
from retinanet.structures import Category
from retinanet.weights import zoo
from retinanet.weights.layout import COCO_CATEGORIES
from retinanet.weights.torchvision import published_eps
from retinanet.weights.zoo import ZOO, ZooEntry, cache_folder, fetch, file_digest, load_weights


@dataclass
class Server:
    """A web server of one file, which counts how often it is asked."""

    url: str
    content: bytes = b""
    announced: int | None = None  # another length than there is
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(state.announced or len(state.content)))
            self.end_headers()
            self.wfile.write(state.content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        state = Server(f"http://127.0.0.1:{running.server_address[1]}/coco/7/model_final_abc.pth")
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield state
        running.shutdown()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RETINANET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """An mmdet detector: a ResNet's names are ours there, the rest is written out."""
    torch.manual_seed(0)
    config = parse_config({"model": {"backbone": "resnet18", "num_classes": 80, "fpn_channels": 32, "head_convs": 1}})
    state = build_model(config.model, config.input, trained_backbone=False).state_dict()
    names = {
        **{f"fpn.lateral.{n}": f"neck.lateral_convs.{n}.conv" for n in range(3)},
        **{f"fpn.output.{n}": f"neck.fpn_convs.{n}.conv" for n in range(3)},
        "fpn.p6": "neck.fpn_convs.3.conv",
        "fpn.p7": "neck.fpn_convs.4.conv",
        "cls_subnet.convs.0": "bbox_head.cls_convs.0.conv",
        "box_subnet.convs.0": "bbox_head.reg_convs.0.conv",
        "cls_subnet.final": "bbox_head.retina_cls",
        "box_subnet.final": "bbox_head.retina_reg",
    }
    theirs = {}
    for key, value in state.items():
        place, _, kind = key.rpartition(".")
        if place:  # not mean and std
            theirs[f"{names.get(place, place)}.{kind}"] = value
    return theirs


@pytest.fixture
def entry(
    server: Server, cache: Path, weights: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> ZooEntry:
    """A detector named "tiny" in the zoo, at the local server."""
    torch.save({"state_dict": weights}, tmp_path / "published.pth")
    server.content = (tmp_path / "published.pth").read_bytes()
    digest = hashlib.sha256(server.content).hexdigest()[:8]
    made = ZooEntry(server.url, "mmdet", 12.3, 45, "CC BY-SA 3.0", ("sha256", digest))
    monkeypatch.setitem(ZOO, "tiny", made)
    return made


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_fetched_and_converted_once(
    entry: ZooEntry, server: Server, cache: Path, weights: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    first = load_weights("tiny")
    assert server.asked == ["/coco/7/model_final_abc.pth"]
    assert f"downloading tiny (45 MB, mmdet, CC BY-SA 3.0): {server.url}" in capsys.readouterr().out
    assert files(cache) == ["model_final_abc.pth", "tiny.1.pt"]
    assert first.categories == COCO_CATEGORIES
    assert not first.config.model.p7_relu  # mmdet's geometry came with it
    assert torch.equal(first.model["cls_subnet.final.bias"], weights["bbox_head.retina_cls.bias"])

    server.content = b"something else by now"
    (cache / "model_final_abc.pth").unlink()
    second = load_weights("tiny")
    assert len(server.asked) == 1
    assert second.config == first.config and second.categories == first.categories
    assert all(torch.equal(value, first.model[key]) for key, value in second.model.items())
    assert capsys.readouterr().out == ""


def test_changed_conversion_makes_kept_checkpoints_anew(
    entry: ZooEntry, server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_weights("tiny")
    monkeypatch.setattr(zoo, "CONVERSION", 2)
    load_weights("tiny")
    assert files(cache) == ["model_final_abc.pth", "tiny.1.pt", "tiny.2.pt"]
    assert len(server.asked) == 1  # the file itself is still right


@pytest.mark.parametrize("fault", ["other content", "cut off"])
def test_wrong_content_is_refused_and_not_kept(entry: ZooEntry, server: Server, cache: Path, fault: str) -> None:
    if fault == "cut off":
        server.announced = len(server.content)
        server.content = server.content[: len(server.content) // 2]
    else:
        server.content = b"<html>log in to this network first</html>"
    with pytest.raises(UserError) as caught:
        load_weights("tiny")
    message = str(caught.value)
    assert message.startswith("tiny could not be downloaded (") and "\n" not in message
    assert server.url in message and str(cache / "model_final_abc.pth") in message
    assert "sha256" in message
    assert files(cache) == []


def test_without_network_one_line_says_what_to_do(
    entry: ZooEntry, server: Server, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ZooEntry("http://127.0.0.1:9/no/where/model_final_abc.pth", *list(vars(entry).values())[1:])  # nobody listens there
    monkeypatch.setitem(ZOO, "tiny", asked)
    with pytest.raises(UserError) as caught:
        load_weights("tiny")
    message = str(caught.value)
    assert "\n" not in message
    assert f"get {asked.url} elsewhere and put it at {cache / 'model_final_abc.pth'}" in message

    (cache / "model_final_abc.pth").write_bytes((tmp_path / "published.pth").read_bytes())  # as it says
    assert load_weights("tiny").config.model.backbone == "resnet18"


def test_wrong_file_put_there_by_hand_is_named_and_stays(entry: ZooEntry, server: Server, cache: Path) -> None:
    cache.mkdir()
    (cache / "model_final_abc.pth").write_bytes(b"my only copy of something")
    with pytest.raises(UserError, match=r"model_final_abc\.pth is damaged or another file, its sha256 does not begin with"):
        load_weights("tiny")
    assert files(cache) == ["model_final_abc.pth"] and server.asked == []


def test_damaged_file_without_a_full_digest_is_found_by_the_conversion(
    entry: ZooEntry, cache: Path, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir()
    torch.save({key: value for key, value in weights.items() if "fpn_convs.4" not in key}, cache / "model_final_abc.pth")
    content = (cache / "model_final_abc.pth").read_bytes()
    lenient = ZooEntry(*list(vars(entry).values())[:-1], ("md5", hashlib.md5(content).hexdigest()[:6]))  # type: ignore[arg-type]
    monkeypatch.setitem(ZOO, "tiny", lenient)
    with pytest.raises(UserError, match=r"model_final_abc\.pth: nothing in it is fpn\.p7\.weight \[32, 32, 3, 3\]"):
        load_weights("tiny")
    assert files(cache) == ["model_final_abc.pth"]


@pytest.mark.parametrize("algorithm", ["sha256", "md5"])
def test_digests(cache: Path, algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both publishers' digests, worked out by the standard library."""
    calls = []

    class Response(io.BytesIO):
        length = 7

    def open_url(url: str) -> Response:
        calls.append(url)
        return Response(b"content")

    monkeypatch.setattr("retinanet.download.open_url", open_url)
    right = ZooEntry(
        "https://x.org/a/b/c.pkl", "detectron2", 1.0, 1, "free", (algorithm, hashlib.new(algorithm, b"content").hexdigest()[:6])
    )
    path = fetch("c", right)
    assert path == cache / "c.pkl" and path.read_bytes() == b"content"
    assert fetch("c", right) == path and calls == ["https://x.org/a/b/c.pkl"]
    wrong = ZooEntry("https://x.org/a/b/d.pkl", "detectron2", 1.0, 1, "free", (algorithm, "000000"))
    with pytest.raises(UserError, match=f"the {algorithm} of what came does not begin with 000000"):
        fetch("d", wrong)
    assert files(cache) == ["c.pkl"]


def test_unwritable_cache_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RETINANET_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="could not be downloaded"):
        load_weights("retinanet_resnet50_fpn")


def test_unknown_names(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"'retinanet_resnet50_fpn_v3' are neither a file nor in the zoo\. Did you mean 'retinanet_resnet50_fpn"
    ):
        load_weights("retinanet_resnet50_fpn_v3")
    with pytest.raises(
        UserError, match=r"'yolo' are neither a file nor in the zoo\. In the zoo are .*detectron2_retinanet_r50_3x"
    ):
        load_weights("yolo")
    with pytest.raises(UserError, match=r"'imagenet' is a backbone, no detector: set model\.backbone_weights=imagenet"):
        load_weights("imagenet")
    with pytest.raises(UserError, match=r"weights runs/best\.pt do not exist"):
        load_weights("runs/best.pt")
    with pytest.raises(UserError, match=r"weights best\.pt do not exist"):
        load_weights("best.pt")


def test_a_file_goes_before_the_name_and_a_folder_does_not(
    entry: ZooEntry, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = parse_config({"model": {"backbone": "resnet18", "num_classes": 1, "fpn_channels": 32, "head_convs": 0}})
    model = build_model(config.model, config.input, trained_backbone=False)
    save_checkpoint(tmp_path / "tiny", Checkpoint(config, (Category(0, "own"),), model.state_dict()))
    assert load_weights("tiny").categories == load_weights(tmp_path / "tiny").categories == (Category(0, "own"),)
    assert server.asked == []
    (tmp_path / "tiny").unlink()
    (tmp_path / "tiny").mkdir()
    assert load_weights("tiny").categories == COCO_CATEGORIES


def test_where_downloads_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RETINANET_CACHE", str(tmp_path / "here"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "here"
    monkeypatch.delenv("RETINANET_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "retinanet"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "retinanet"


def test_entries() -> None:
    """What is said of torchvision's files is what torchvision says of them; every digest is that of the file's name."""
    for name, weights in (
        ("retinanet_resnet50_fpn", RetinaNet_ResNet50_FPN_Weights.COCO_V1),
        ("retinanet_resnet50_fpn_v2", RetinaNet_ResNet50_FPN_V2_Weights.COCO_V1),
    ):
        assert ZOO[name].url == weights.url
        assert ZOO[name].ap == weights.meta["_metrics"]["COCO-val2017"]["box_map"]
        assert ZOO[name].megabytes == round(weights.meta["_file_size"])
    for entry in ZOO.values():
        assert entry.url.startswith("https://")
        assert entry.source in zoo.IMPORTERS
        assert entry.digest[1] in entry.file_name.replace("-", "_").replace(".", "_").split("_")
        assert entry.digest[0] == {"torchvision": "sha256", "detectron2": "md5"}[entry.source]
    assert len({entry.file_name for entry in ZOO.values()}) == len(ZOO)
    assert zoo.DEFAULT in ZOO and ZOO[zoo.DEFAULT].ap == max(entry.ap for entry in ZOO.values())


def test_epsilon_of_published_files() -> None:
    """Only of version 1, whose frozen norms torchvision gives an epsilon of 0, the weights having been trained so."""
    assert published_eps("eeacb38b" + "0" * 56) == 0.0
    assert published_eps("5905b1c5" + "0" * 56) is None
    assert published_eps("0" * 64) is None


def test_coco_classes_are_torchvisions() -> None:
    names = RetinaNet_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    assert [(n, name) for n, name in enumerate(names) if name not in ("__background__", "N/A")] == list(COCO_CATEGORIES)


def test_file_digest(tmp_path: Path) -> None:
    content = os.urandom(3_000_000)
    (tmp_path / "x").write_bytes(content)
    assert file_digest(tmp_path / "x", "sha256") == hashlib.sha256(content).hexdigest()
    assert file_digest(tmp_path / "x", "md5") == hashlib.md5(content).hexdigest()
