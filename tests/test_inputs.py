"""What the arguments of prediction name: images, folders, globs, videos and cameras, read one picture at a time."""

import struct
import threading
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from retinanet.errors import UserError
from retinanet.inputs import DEFAULT_FPS, Frame, Reader, Source, find_inputs, read_ahead, read_video

WIDE, HIGH = 96, 64


def write_video(path: Path, frames: int = 7, fps: float = 12.5, size: tuple[int, int] = (HIGH, WIDE)) -> Path:
    """Frame n is of brightness 30 * n, and its upper left corner is white."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), fps, size[::-1])
    for n in range(frames):
        picture = np.full((*size, 3), 30 * n, np.uint8)
        picture[:16, :16] = 255
        writer.write(picture)
    writer.release()
    return path


def turn(path: Path) -> None:
    """Writes "turn by 90 degrees clockwise for display" into the track's header, as telephones do."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40  # of the matrix, in version 0 of the box
    assert struct.unpack(">9i", data[start : start + 36])[0] == 65536  # was upright
    data[start : start + 36] = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def brightness(image: np.ndarray) -> int:
    """Which frame of `write_video` it is."""
    return round(float(image[24:, 24:].mean()) / 30)


def frames_of(reader: Reader) -> list[Frame]:
    return [frame for batch in reader for frame in batch]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("b.png", "a.jpg", "sub/c.PNG", "sub/deep/d.jpg", "notes.txt", "clip.mp4"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"")
    Path("folder.jpg").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "recursive", "names"),
    [
        (["a.jpg"], False, ["a.jpg"]),
        (["./a.jpg", "a.jpg", "*.jpg"], False, ["a.jpg"]),  # each once
        (["."], False, ["a.jpg", "b.png", "clip.mp4"]),
        (["."], True, ["a.jpg", "b.png", "clip.mp4", "sub/c.PNG", "sub/deep/d.jpg"]),
        (["sub", "a.jpg"], False, ["sub/c.PNG", "a.jpg"]),  # in the arguments' order
        (["**/*.jpg"], False, ["a.jpg", "sub/deep/d.jpg"]),
        (["notes.txt"], False, ["notes.txt"]),  # asked for by name: it will be named as unreadable
    ],
)
def test_which_files(tree: Path, arguments: list[str], recursive: bool, names: list[str]) -> None:
    assert [source.name for source in find_inputs(arguments, recursive=recursive)] == names


def test_cameras_have_numbers(tree: Path) -> None:
    assert find_inputs(["0", "webcam:2"]) == [Source("webcam:0", 0), Source("webcam:2", 2)]
    (tree / "7").write_bytes(b"")
    assert find_inputs(["7"]) == [Source("7")]  # a file of this name is meant
    for wrong in ("webcam:", "webcam:front", "-1"):
        with pytest.raises(UserError, match="no such image, and no folder or glob with images or videos"):
            find_inputs([wrong])


def test_an_empty_folder(tree: Path) -> None:
    with pytest.raises(UserError, match=r"^folder\.jpg: no such image"):
        find_inputs(["a.jpg", "folder.jpg"])


def test_a_video_gives_every_frame_its_number_and_time(tmp_path: Path) -> None:
    source = Source(str(write_video(tmp_path / "clip.mp4")))
    reader = Reader([source])
    assert reader.total() == 7
    frames = frames_of(reader)
    assert [frame.number for frame in frames] == [brightness(frame.image) for frame in frames] == list(range(7))
    assert [frame.image_id for frame in frames] == list(range(1, 8))
    np.testing.assert_allclose([frame.time for frame in frames], [0, 0.08, 0.16, 0.24, 0.32, 0.4, 0.48], atol=1e-6)  # 1 / 12.5
    assert {frame.fps for frame in frames} == {12.5}
    assert frames[0].image.shape == (HIGH, WIDE, 3) and not reader.live


def test_every_third_frame(tmp_path: Path) -> None:
    reader = Reader([Source(str(write_video(tmp_path / "clip.mp4")))], every=3)
    assert reader.total() == 3
    frames = frames_of(reader)
    assert [frame.number for frame in frames] == [brightness(frame.image) for frame in frames] == [0, 3, 6]
    np.testing.assert_allclose([frame.time for frame in frames], [0, 0.24, 0.48], atol=1e-6)
    assert frames[0].fps == pytest.approx(12.5 / 3)
    with pytest.raises(UserError, match="not every 0"):
        Reader([], every=0)
    with pytest.raises(UserError, match="the batch size must be at least 1, got 0"):
        Reader([], 0)


def test_colours_are_rgb(tmp_path: Path) -> None:
    writer = cv2.VideoWriter(str(tmp_path / "red.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10, (WIDE, HIGH))
    writer.write(np.full((HIGH, WIDE, 3), (20, 20, 230), np.uint8))  # OpenCV's order is BGR
    writer.release()
    image = next(read_video(Source(str(tmp_path / "red.mp4")))).image
    np.testing.assert_allclose(image.mean(axis=(0, 1)), [230, 20, 20], atol=6)


def test_a_video_that_is_turned(tmp_path: Path) -> None:
    """Turned clockwise, the white corner comes from the upper left to the upper right."""
    turn(write_video(tmp_path / "clip.mp4"))
    image = next(read_video(Source(str(tmp_path / "clip.mp4")))).image
    assert image.shape == (WIDE, HIGH, 3)
    assert image[:12, -12:].mean() > 240 and image[:12, :12].mean() < 20


def test_pictures_and_videos_share_the_numbering(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"torn")
    write_video(tmp_path / "c.mp4", frames=2)
    Image.new("RGB", (32, 32)).save(tmp_path / "d.png")
    reader = Reader(find_inputs([str(tmp_path)]))
    assert reader.total() == 5
    frames = frames_of(reader)
    assert [(Path(f.source.name).name, f.image_id, f.number) for f in frames] == [
        ("a.png", 1, None),
        ("c.mp4", 3, 0),  # the unreadable b.png has 2
        ("c.mp4", 4, 1),
        ("d.png", 5, None),
    ]
    assert reader.unreadable == 1


def torn(path: Path) -> None:
    path.write_bytes(write_video(path).read_bytes()[:-200])  # the index stands at the end


@pytest.mark.parametrize("make", [lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"no video" * 99), torn])
def test_a_broken_video_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str], make: Any) -> None:
    make(tmp_path / "clip.mp4")
    reader = Reader([Source(str(tmp_path / "clip.mp4"))])
    reader.total()
    assert frames_of(reader) == [] and reader.unreadable == 1
    said = capfd.readouterr()  # also what the decoder prints by itself
    assert said.out == f"warning: left out: {tmp_path / 'clip.mp4'}: no video that can be read\n"
    assert said.err == ""


class Camera:
    """What `cv2.VideoCapture` is for a camera of `frames` pictures; one that tells neither rate nor length."""

    opened: Any = None
    frames = 4

    def __init__(self, index: Any) -> None:
        type(self).opened, self.left, self.released = index, self.frames, False
        type(self).last = self

    def read(self) -> tuple[bool, np.ndarray | None]:
        self.left -= 1
        return (True, np.zeros((HIGH, WIDE, 3), np.uint8)) if self.left >= 0 else (False, None)

    def get(self, key: int) -> float:
        return -1.0 if key == cv2.CAP_PROP_FRAME_COUNT else 0.0

    def release(self) -> None:
        self.released = True


def test_a_camera(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    clock = iter(range(100, 200, 2))
    monkeypatch.setattr("retinanet.inputs.time.monotonic", lambda: next(clock))
    reader = Reader([Source("webcam:1", 1)])
    assert reader.total() is None
    frames = frames_of(reader)
    assert Camera.opened == 1 and Camera.last.released and reader.live
    assert [(frame.number, frame.time, frame.fps) for frame in frames] == [(n, 2 + 2 * n, DEFAULT_FPS) for n in range(4)]


def test_a_camera_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    monkeypatch.setattr(Camera, "frames", 0)
    assert frames_of(Reader([Source("webcam:1", 1)])) == []
    assert capsys.readouterr().out == "warning: left out: webcam:1: no camera that can be read\n"


def test_a_video_that_ends_early_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    monkeypatch.setattr(Camera, "get", lambda self, key: 9.0 if key == cv2.CAP_PROP_FRAME_COUNT else 10.0)
    assert len(list(read_video(Source("clip.mp4")))) == 4
    assert capsys.readouterr().out == "warning: clip.mp4 ends after 4 of 9 frames: it may be damaged\n"


def test_frames_are_read_when_their_turn_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long video must not be in memory; one that is given up must be closed."""
    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    monkeypatch.setattr(Camera, "frames", 10**6)
    stream = iter(Reader([Source("clip.mp4")], 2))
    for _ in range(3):
        next(stream)
    assert 10**6 - 6 - 2 <= Camera.last.left <= 10**6 - 6  # at most a batch ahead
    stream.close()  # type: ignore[attr-defined]
    assert Camera.last.released


def test_reading_ahead_keeps_the_order_and_stays_near() -> None:
    """The first job takes longest. Only what two threads and the order allow is begun: the caller's own and three more."""
    begun, first = list[int](), threading.Event()

    def job(n: int) -> int:
        begun.append(n)
        if n == 0:
            first.wait(60)
        elif n == 3:
            first.set()  # would never come if the next ones were not done meanwhile
        return n

    results = read_ahead((partial(job, n) for n in range(100)), 3, threads=2)
    taken = []
    for _ in range(5):
        taken.append(next(results).result())
        assert max(begun) <= len(taken) - 1 + 3
    assert taken == [0, 1, 2, 3, 4]
    results.close()  # type: ignore[attr-defined]
    assert max(begun) <= 7
    assert [future.result() for future in read_ahead([], 3)] == []


def test_an_error_comes_in_its_turn_and_the_rest_goes_on() -> None:
    def job(n: int) -> int:
        return 6 // n

    errors = []
    results = []
    for future in read_ahead((partial(job, n) for n in (1, 2, 0, 3)), 8):
        errors.append(type(future.exception()))
        results += [] if future.exception() else [future.result()]
    assert errors == [type(None), type(None), ZeroDivisionError, type(None)]
    assert results == [6, 3, 2]


@pytest.fixture
def eleven(tmp_path: Path) -> list[Source]:
    """Pictures n pixels wide, n = 1..11, of which the fifth cannot be read."""
    for n in range(1, 12):
        Image.new("RGB", (n, 3)).save(tmp_path / f"{n:02}.png")
    (tmp_path / "05.png").write_bytes(b"torn")
    return find_inputs([str(tmp_path)])


def numbers(batches: Iterable[list[Frame]]) -> list[list[int]]:
    frames = [frame for batch in batches for frame in batch]
    assert all(frame.image.shape == (3, frame.image_id, 3) for frame in frames)  # each has its own number
    return [[frame.image_id for frame in batch] for batch in batches]


def test_batches_in_order_with_a_gap_for_what_cannot_be_read(eleven: list[Source], capsys: pytest.CaptureFixture[str]) -> None:
    assert numbers(list(Reader(eleven, 3))) == [[1, 2, 3], [4, 6], [7, 8, 9], [10, 11]]
    assert capsys.readouterr().out.count("warning: left out: ") == 1
    assert numbers(list(Reader(eleven, 1))) == [[n] for n in range(1, 12) if n != 5]
    assert list(Reader([])) == []


def test_ranks_take_turns_batch_by_batch(eleven: list[Source], monkeypatch: pytest.MonkeyPatch) -> None:
    shares, left_out, totals = [], [], []
    for rank in range(3):
        monkeypatch.setattr("retinanet.inputs.rank", lambda rank=rank: rank)
        monkeypatch.setattr("retinanet.inputs.world_size", lambda: 3)
        reader = Reader(eleven, 3)
        shares.append(numbers(list(reader)))
        left_out.append(reader.unreadable)
        totals.append(reader.total())
    assert shares == [[[1, 2, 3], [10, 11]], [[4, 6]], [[7, 8, 9]]]
    assert left_out == [0, 1, 0] and totals == [5, 3, 3]
    with pytest.raises(UserError, match=r"clip\.mp4: several processes share pictures, not videos or cameras"):
        Reader([*eleven, Source("clip.mp4")])
