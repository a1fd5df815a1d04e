"""What docs/security.md promises of pictures, videos, downloads and archives, with hostile files."""

import hashlib
import importlib.util
import os
import struct
import sys
import threading
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
from hostile import needs_linux, refusal, within
from PIL import Image

from retinanet.data.images import read_image, read_sizes
from retinanet.download import download, open_url
from retinanet.inputs import Source, read_video

# --- pictures and videos


def png(*chunks: tuple[bytes, bytes], size: tuple[int, int] = (1, 1)) -> bytes:
    """A grey PNG of (width, height) `size` with these chunks before its pixels."""
    pixels = zlib.compress(bytes(2))
    every = [(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 0, 0, 0, 0)), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    parts = [struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c)) for kind, c in every]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


ZEROS = zlib.compress(bytes(512 << 20), 1)  # half a gigabyte


@needs_linux
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (png(size=(100_000, 100_000)), "exceeds limit"),
        (png((b"zTXt", b"a\0\0" + ZEROS)), "Decompressed data too large"),
        (png((b"iTXt", b"a\0\1\0\0\0" + ZEROS)), "Decompressed data too large"),
        (png((b"iCCP", b"a\0\0" + ZEROS)), "Decompressed data too large"),
        (b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\0\0\0;", "a.png: "),
        (b"P5 99999 99999 255\n", "exceeds limit"),
    ],
    ids=["PNG size", "PNG zTXt", "PNG iTXt", "PNG iCCP", "GIF size", "PGM size"],
)
def test_a_picture_that_would_unfold_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.png").write_bytes(content)
    assert reason in within(lambda: read_image(tmp_path / "a.png"))


def test_of_many_frames_only_the_first_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [Image.new("L", (8, 8), grey) for grey in (10, 20, 30)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    monkeypatch.setattr("PIL.GifImagePlugin.GifImageFile.seek", lambda *_: pytest.fail("another frame was looked for"))
    assert read_image(tmp_path / "a.gif").tolist() == [[[10, 10, 10]] * 8] * 8


def test_postscript_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow takes a file for what it begins with, and starts Ghostscript for this one; here a stand-in that leaves a mark."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # it looks for Ghostscript once only
    Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg", "EPS")
    assert "not an image" in refusal(lambda: read_image(tmp_path / "a.jpg"))
    assert "not an image" in refusal(lambda: read_sizes([tmp_path / "a.jpg"]))
    assert not (tmp_path / "ran").exists()
    with pytest.raises(OSError), Image.open(tmp_path / "a.jpg") as image:  # what it would have done
        image.load()
    assert (tmp_path / "ran").exists()


def test_a_video_is_no_list_of_other_files(tmp_path: Path) -> None:
    """FFmpeg takes a file for what it begins with, too: here for a list, of files on this machine or in the network."""
    (tmp_path / "other").mkdir()
    writer = cv2.VideoWriter(str(tmp_path / "other" / "private.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10, (64, 64))
    for grey in range(0, 250, 50):
        writer.write(np.full((64, 64, 3), grey, np.uint8))
    writer.release()
    assert len(list(read_video(Source(str(tmp_path / "other" / "private.mp4"))))) == 5
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile other/private.mp4\n")
    (tmp_path / "hls.mp4").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother/private.mp4\n#EXT-X-ENDLIST\n")
    for name in ("list.mp4", "hls.mp4"):
        assert "no video that can be read" in refusal(lambda name=name: list(read_video(Source(str(tmp_path / name)))))


# --- downloads


@dataclass
class Site:
    """What a server on this machine answers: a body, or a redirect."""

    url: str = ""
    body: bytes = b""
    redirect: str = ""
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    state = Site()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked.append(self.path)
            self.send_response(302 if state.redirect and self.path == "/a" else 200)
            if state.redirect:
                self.send_header("Location", state.redirect)
            self.end_headers()  # and says no length
            self.wfile.write(state.body)

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        state.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield state
        server.shutdown()


@pytest.mark.parametrize(
    "url", ["http://example.com/a", "file:///etc/passwd", "ftp://example.com/a", "a.pth", "http://127.0.0.1.example.com/a"]
)
def test_only_https_is_fetched(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib.request.OpenerDirector.open", lambda *_, **__: pytest.fail("it was fetched"))
    assert "only https" in refusal(lambda: open_url(url))


@pytest.mark.parametrize("target", ["{}/b", "http://example.com/b"])
def test_a_redirect_away_from_https_is_not_followed(site: Site, target: str) -> None:
    site.redirect = target.format(site.url)
    assert "only https is followed" in refusal(lambda: open_url(f"{site.url}/a"))
    assert site.asked == ["/a"]


@pytest.mark.parametrize(
    ("size", "digest", "reason"),
    [
        ((2 << 20) + 1, None, "more than 2 MB came"),
        (2 << 20, "00000000", "the sha256 of what came does not begin with 00000000"),
        (2 << 20, None, None),
    ],
)
def test_what_comes_is_bounded_and_checked_before_it_has_its_name(
    site: Site, tmp_path: Path, size: int, digest: str | None, reason: str | None
) -> None:
    site.body = bytes(size)
    digest = digest or hashlib.sha256(site.body).hexdigest()[:8]
    try:
        download(f"{site.url}/a", tmp_path / "a.pth", ("sha256", digest), largest=2 << 20)
    except OSError as error:
        assert reason is not None and reason in str(error)
        assert list(tmp_path.iterdir()) == []
    else:
        assert reason is None and [file.name for file in tmp_path.iterdir()] == ["a.pth"]


# --- archives


@pytest.fixture(scope="module")
def coco() -> ModuleType:
    spec = importlib.util.spec_from_file_location("coco_download", Path(__file__).parents[1] / "datasets" / "download_coco.py")
    assert spec and spec.loader
    sys.modules["coco_download"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_archive_of_endless_members_is_not_unpacked(coco: ModuleType, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as bundle:
        for n in range(1000):
            bundle.writestr(f"val/{n}", b"")
    archive = coco.Archive("a.zip", "", 0, "val", files=10, unpacked=1 << 20)
    assert "holds 1000 members, not 10" in refusal(lambda: coco.unpack(archive, tmp_path / "a.zip", tmp_path))
    assert not (tmp_path / "val").exists()
