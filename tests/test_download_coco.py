"""The COCO download, against an HTTP server on this machine that can be told to misbehave."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import shutil
import stat
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPT = Path(__file__).parents[1] / "datasets" / "download_coco.py"
_spec = importlib.util.spec_from_file_location("download_coco", SCRIPT)
assert _spec and _spec.loader
coco = sys.modules["download_coco"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(coco)

IMAGE = bytes(range(256)) * 40  # 10240 bytes, stored uncompressed: a transfer can break in the middle of them
ANNOTATIONS = b'{"images": []}'


def zipped(members: dict[str | zipfile.ZipInfo, bytes]) -> bytes:
    """A zip archive of these members."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as bundle:
        for member, content in members.items():
            bundle.writestr(member, content)
    return buffer.getvalue()


def entry(path: str, body: bytes, folder: str, unpacked: int = 20_000) -> coco.Archive:
    """The table's entry for an archive with this content: one file in one folder."""
    return coco.Archive(path, hashlib.md5(body).hexdigest(), len(body), folder, files=1, unpacked=unpacked)


@dataclass
class Site:
    """What the server serves, how it misbehaves, and the (path, Range header) of each request it got."""

    files: dict[str, bytes]
    url: str = ""
    break_after: list[int] = field(default_factory=list)  # one transfer is cut after each of these numbers of bytes
    ignore_range: bool = False
    refuse_range: bool = False
    hide_length: bool = False
    status: list[int] = field(default_factory=list)  # each answers one request with this error
    requests: list[tuple[str, str | None]] = field(default_factory=list)

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        wanted = handler.headers.get("Range")
        self.requests.append((handler.path, wanted))
        body = self.files.get(handler.path)
        if self.status or body is None:
            handler.send_error(self.status.pop(0) if self.status else 404)
            return
        if wanted and self.refuse_range:
            handler.send_error(416)
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and not self.ignore_range else 0
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if not self.hide_length:
            handler.send_header("Content-Length", str(len(body) - start))
        handler.end_headers()
        handler.wfile.write(body[start:][: self.break_after.pop(0) if self.break_after else None])


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A running server with a well-formed annotations archive and one of images."""
    site = Site(
        {
            "/annotations/annotations.zip": zipped({"annotations/instances.json": ANNOTATIONS}),
            "/zips/val2017.zip": zipped({"val2017/1.jpg": IMAGE}),
        }
    )

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            site.answer(self)

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield site
    server.shutdown()
    thread.join()
    server.server_close()


@dataclass
class Runner:
    """Runs the command line against the site and keeps the pauses it asked for, in seconds."""

    site: Site
    out: Path
    archives: tuple[coco.Archive, ...]
    pauses: list[float] = field(default_factory=list)

    def __call__(self, *arguments: str, **kwargs: object) -> int:
        argv = ["--out", str(self.out), "--base-url", self.site.url, *arguments]
        return coco.main(argv, self.archives, **{"pause": self.pauses.append, **kwargs})


@pytest.fixture
def run(site: Site, tmp_path: Path) -> Runner:
    """The command line with a table that describes the site's two archives."""
    (annotations, annotations_body), (images, images_body) = site.files.items()
    archives = (
        entry(annotations[1:], annotations_body, "annotations"),
        entry(images[1:], images_body, "val2017"),
    )
    return Runner(site, tmp_path / "coco", archives)


def serve_images(run: Runner, body: bytes, unpacked: int = 20_000) -> None:
    """Let the site serve this archive of images, and let the table describe it truly."""
    run.site.files["/zips/val2017.zip"] = body
    run.archives = (run.archives[0], entry("zips/val2017.zip", body, "val2017", unpacked))


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr, without its newline."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def names(folder: Path) -> set[str]:
    """All files below a folder, by their path in it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_everything_is_fetched_and_unpacked(run: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    # Nothing else may be left: no archive, no .part, no half-unpacked folder.
    assert names(run.out) == {"annotations/instances.json", "val2017/1.jpg"}
    assert {path.name for path in run.out.iterdir()} == {"annotations", "val2017"}
    assert (run.out / "val2017/1.jpg").read_bytes() == IMAGE
    assert (run.out / "annotations/instances.json").read_bytes() == ANNOTATIONS
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "next: python tools/train.py configs/retinanet_r50_1x.yaml"


def test_a_second_run_asks_the_server_for_nothing(run: Runner) -> None:
    assert run() == 0
    run.site.requests.clear()
    assert run() == 0
    assert run.site.requests == []


def test_annotations_only_fetches_no_images_and_says_what_is_missing(run: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--annotations-only") == 0
    assert run.site.requests == [("/annotations/annotations.zip", None)]
    assert capsys.readouterr().out.splitlines()[-1] == "still missing for training: val2017"


def test_archives_are_kept_on_request_and_then_not_fetched_again(run: Runner) -> None:
    assert run("--keep-archives") == 0
    assert {"annotations.zip", "val2017.zip"} <= names(run.out)
    shutil.rmtree(run.out / "val2017")
    run.site.requests.clear()
    assert run() == 0
    assert run.site.requests == []
    assert (run.out / "val2017/1.jpg").read_bytes() == IMAGE


def test_a_broken_transfer_goes_on_where_it_broke(run: Runner) -> None:
    run.archives = run.archives[1:]
    run.site.break_after = [4000, 3000]
    assert run() == 0
    # 4000 bytes came, then 3000 more: the third request starts at byte 7000.
    assert [wanted for _, wanted in run.site.requests] == [None, "bytes=4000-", "bytes=7000-"]
    assert (run.out / "val2017/1.jpg").read_bytes() == IMAGE
    assert run.pauses == [2, 4]


def test_a_transfer_that_always_breaks_is_given_up_and_the_next_run_goes_on(
    run: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    run.archives = run.archives[1:]
    run.site.break_after = [100] * coco.TRIES
    assert run() == 1
    message = one_error(capsys)
    assert f"closed early; gave up after 5 tries with 500 of {run.archives[0].size} bytes" in message  # 5 times 100
    assert "run the same command again" in message
    assert run.pauses == [2, 4, 8, 16]  # none after the last try
    run.site.requests.clear()
    assert run() == 0
    assert run.site.requests == [("/zips/val2017.zip", "bytes=500-")]
    assert (run.out / "val2017/1.jpg").read_bytes() == IMAGE


def test_a_server_error_is_tried_again(run: Runner) -> None:
    run.site.status = [503]
    assert run() == 0
    assert run.pauses == [2]


def test_a_complete_part_is_not_fetched_again(run: Runner) -> None:
    run.out.mkdir()
    (run.out / "val2017.zip.part").write_bytes(run.site.files["/zips/val2017.zip"])
    assert run() == 0
    assert run.site.requests == [("/annotations/annotations.zip", None)]


def test_a_part_longer_than_the_archive_starts_again(run: Runner) -> None:
    run.out.mkdir()
    (run.out / "val2017.zip.part").write_bytes(b"x" * (run.archives[1].size + 1))
    assert run() == 0
    assert run.site.requests[-1] == ("/zips/val2017.zip", None)


@pytest.mark.parametrize(("switch", "requests"), [("ignore_range", 1), ("refuse_range", 2)])
def test_without_ranges_the_download_starts_from_zero_and_says_so(
    run: Runner, capsys: pytest.CaptureFixture[str], switch: str, requests: int
) -> None:
    """A server that ignores Range sends all at once; one that answers 416 has to be asked again, without it."""
    run.archives = run.archives[1:]
    run.out.mkdir()
    (run.out / "val2017.zip.part").write_bytes(b"stale bytes")  # 11 of them, and not the archive's
    setattr(run.site, switch, True)
    assert run() == 0
    assert [wanted for _, wanted in run.site.requests] == ["bytes=11-", None][:requests]
    assert "starts again from zero" in capsys.readouterr().out
    assert (run.out / "val2017/1.jpg").read_bytes() == IMAGE


def test_a_wrong_checksum_is_told_and_the_file_moved_aside(run: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = bytes(run.archives[1].size)  # as long as the archive, so that only the checksum can tell
    run.site.files["/zips/val2017.zip"] = wrong
    assert run() == 1
    message = one_error(capsys)
    assert f"expected {run.archives[1].md5}, got {hashlib.md5(wrong).hexdigest()}" in message
    assert str(run.out / "val2017.zip.bad") in message
    assert not (run.out / "val2017").exists()
    serve_images(run, zipped({"val2017/1.jpg": IMAGE}))
    assert run() == 0, "the bad file must not stand in the way of the next run"


def test_a_file_of_another_length_is_refused_before_it_is_fetched(run: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    run.site.files["/zips/val2017.zip"] = b"<html>log in first</html>"  # 25 bytes
    assert run() == 1
    assert f"25 bytes long, expected {run.archives[1].size}" in one_error(capsys)
    assert names(run.out) == {"annotations/instances.json"}


def test_a_server_that_sends_on_and_on_cannot_fill_the_disk(run: Runner) -> None:
    run.site.files["/zips/val2017.zip"] += b"more"
    run.site.hide_length = True
    assert run("--keep-archives") == 0
    assert (run.out / "val2017.zip").stat().st_size == run.archives[1].size


def test_a_missing_file_is_told_at_once(run: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    del run.site.files["/zips/val2017.zip"]
    assert run() == 1
    assert one_error(capsys) == f"error: {run.site.url}/zips/val2017.zip: HTTP 404 Not Found; check --base-url"
    assert run.pauses == []  # trying again would not help


def test_an_unreachable_server_is_told(run: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    # Port 1 (tcpmux) has no listener on any machine that runs tests; the last --base-url counts.
    assert run("--base-url", "http://127.0.0.1:1") == 1
    assert "refused; gave up after 5 tries with 0 of" in one_error(capsys)


@pytest.mark.parametrize(("spare", "status"), [(0, 0), (-1, 1)])
def test_the_disk_must_hold_archive_and_unpacked_files_at_once(
    run: Runner, capsys: pytest.CaptureFixture[str], spare: int, status: int
) -> None:
    annotations, images = run.archives
    # The annotations' archive is gone by the time the images' archive lies beside what it unpacks to.
    peak = annotations.unpacked + images.size + images.unpacked
    assert run(disk_usage=lambda path: SimpleNamespace(free=peak + spare)) == status
    if status:
        assert run.site.requests == []
        assert "GB of disk space needed" in one_error(capsys)


def test_bytes_fetched_and_archives_kept_count_for_the_disk(run: Runner) -> None:
    annotations, images = run.archives
    run.out.mkdir()
    (run.out / "val2017.zip.part").write_bytes(bytes(1000))
    # Kept archives add up; 1000 bytes of the second lie on the disk already.
    expected = annotations.size + annotations.unpacked + images.size - 1000 + images.unpacked
    assert coco.peak_bytes(run.archives, run.out, keep=True) == expected


def link(name: str) -> zipfile.ZipInfo:
    """A member that is a symbolic link."""
    info = zipfile.ZipInfo(name)
    info.create_system = 3  # Unix: the upper half of external_attr is the file's mode
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.parametrize(
    ("member", "complaint"),
    [
        ("../escaped.jpg", "lies outside"),
        ("val2017/../../escaped.jpg", "lies outside"),
        ("/escaped.jpg", "lies outside"),
        ("annotations/instances.json", "lies outside"),  # one archive must not write into another's folder
        (link("val2017/2.jpg"), "is a link or device"),
    ],
)
def test_a_member_that_could_write_elsewhere_is_refused(
    run: Runner, capsys: pytest.CaptureFixture[str], member: str | zipfile.ZipInfo, complaint: str
) -> None:
    serve_images(run, zipped({"val2017/1.jpg": IMAGE, member: b"/etc/passwd"}))
    assert run() == 1
    assert complaint in one_error(capsys)
    # Nothing of the archive is unpacked, not even its well-formed first member.
    assert names(run.out.parent) == {"coco/annotations/instances.json", "coco/val2017.zip"}


def test_a_bomb_is_refused(run: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    serve_images(run, zipped({"val2017/1.jpg": IMAGE, "val2017/2.jpg": b"12"}), unpacked=10_241)
    assert run() == 1
    assert "would take 10242 bytes of 10241 allowed" in one_error(capsys)  # 10240 of the first and 2 of the second
    assert not (run.out / "val2017").exists()


def test_a_folder_with_files_missing_is_not_taken_for_the_data(run: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    (run.out / "val2017").mkdir(parents=True)
    assert run() == 1
    assert f"{run.out / 'val2017'} holds 0 of 1 files; move it away" in one_error(capsys)
    assert run.site.requests == []


def test_an_unpacking_that_was_stopped_is_done_anew(run: Runner) -> None:
    left = run.out / ".val2017.unpacking" / "val2017"
    left.mkdir(parents=True)
    (left / "half.jpg").write_bytes(b"half")
    assert run() == 0
    assert names(run.out) == {"annotations/instances.json", "val2017/1.jpg"}


def test_an_interrupt_keeps_the_part_and_says_how_to_go_on(run: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    run.archives = run.archives[1:]
    run.site.break_after = [4000]
    assert run(pause=interrupt) == 130  # 128 + SIGINT, as shells have it
    assert "run the same command again to go on" in capsys.readouterr().err
    assert (run.out / "val2017.zip.part").stat().st_size == 4000


def test_an_output_that_is_a_file_is_told(run: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    run.out.write_bytes(b"")
    assert run() == 1
    assert one_error(capsys).startswith(f"error: {run.out}: ")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--base-url", "images.cocodataset.org"], "is not an https address such as https://"),
        (["--splits", "test2017"], "invalid choice: 'test2017'"),
        (["--splits", "val2017", "--annotations-only"], "not allowed with argument"),
    ],
)
def test_a_bad_command_line_exits_with_status_2(arguments: list[str], complaint: str) -> None:
    done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert complaint in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_help_shows_examples() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True)
    assert "python datasets/download_coco.py --splits val2017" in done.stdout


def test_the_table_lists_what_coco_publishes() -> None:
    """Sizes and sums as several independent projects give them; image counts as on cocodataset.org."""
    assert {a.path: (a.md5, a.size, a.folder, a.files) for a in coco.ARCHIVES} == {
        "zips/train2017.zip": ("cced6f7f71b7629ddf16f17bbcfab6b2", 19336861798, "train2017", 118287),
        "zips/val2017.zip": ("442b8da7639aecaf257c1dceb8ba8c80", 815585330, "val2017", 5000),
        # captions, instances and person_keypoints, each for train2017 and val2017
        "annotations/annotations_trainval2017.zip": ("f4bbac642086de4f52a3fdda2de5fa2c", 252907541, "annotations", 6),
    }
