"""What the arguments of prediction name, as pictures one after the other: images, folders, globs, videos, cameras."""

import glob
import os
import re
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, islice, repeat, takewhile
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from retinanet.data.images import EXTENSIONS, UnreadableImageError, read_image
from retinanet.distributed import rank, say, world_size
from retinanet.errors import UserError, printable

Result = TypeVar("Result")
VIDEOS = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".mts"}
DEFAULT_FPS = 30.0  # where a video or camera does not tell
# Its own complaints would stand beside our one line. It is read once, before OpenCV's first video.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
# By its content a file of any name may be a list of others, on this machine or in the network: such are not followed.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,avi,matroska,webm,mpeg,mpegvideo,mpegts,asf,flv"
os.environ.setdefault("OPENCV_FFMPEG_CAPTURE_OPTIONS", f"protocol_whitelist;file|format_whitelist;{CONTAINERS}")


class Source(NamedTuple):
    name: str  # the path of an image or a video, or webcam:0
    camera: int | None = None

    @property
    def is_video(self) -> bool:
        return self.camera is not None or Path(self.name).suffix.lower() in VIDEOS


@dataclass(frozen=True)
class Frame:
    """A picture to find objects in. One of a video has its frame's number, from 0, its time in seconds, and `fps`, how many
    frames of a second are looked at."""

    source: Source
    image: np.ndarray  # uint8 [H, W, 3]
    image_id: int = 0  # a running number, from 1
    number: int | None = None
    time: float = 0.0
    fps: float = 0.0


def find_inputs(arguments: Sequence[str], *, recursive: bool = False) -> list[Source]:
    """The images, videos and cameras that the arguments name, each once. Raises `UserError` for an argument without any."""
    found: dict[Source, None] = {}
    for text in arguments:
        path, camera = Path(text), re.fullmatch(r"(?:webcam:)?(\d+)", text)
        if path.is_dir():
            files = sorted(path.rglob("*") if recursive else path.iterdir())
            sources = [Source(str(f)) for f in files if f.suffix.lower() in EXTENSIONS | VIDEOS and f.is_file()]
        elif camera and not path.exists():
            sources = [Source(f"webcam:{camera[1]}", int(camera[1]))]
        else:
            names = [path] if path.exists() else sorted(map(Path, glob.glob(text, recursive=True)))  # noqa: PTH207
            sources = [Source(str(name)) for name in names if name.is_file()]
        if not sources:
            inside = " (--recursive looks into the folders in it)" if path.is_dir() and not recursive else ""
            raise UserError(f"{text}: no such image, and no folder or glob with images or videos{inside}")
        found |= dict.fromkeys(sources)
    return list(found)


def read_ahead(jobs: Iterable[Callable[[], Result]], ahead: int, threads: int = 4) -> Generator[Future[Result], None, None]:
    """`jobs` in order, each begun and maybe done. While the caller works with one, threads do the next `ahead` of them."""
    rest = iter(jobs)
    # Warnings are silenced once for all: threads that each do it, as `read_image` would, undo each other's.
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor(threads) as pool:
        try:
            begun = deque(pool.submit(job) for job in islice(rest, ahead))
            while begun:
                begun.extend(pool.submit(job) for job in islice(rest, 1))
                yield begun.popleft()
        finally:
            pool.shutdown(cancel_futures=True)  # and waits for what is being done


class Reader:
    """Reads the sources in batches of `size` pictures; the next batch is read while the caller works on one.

    What cannot be read is named, counted, and missing in its batch. Of videos every `every`-th frame is taken; they are
    never held whole. The ranks take turns batch by batch: together they give the batches that one process gives.
    """

    def __init__(self, sources: Sequence[Source], size: int = 8, *, every: int = 1) -> None:
        if size < 1:
            raise UserError(f"the batch size must be at least 1, got {size}")
        if every < 1:
            raise UserError(f"every 1st, 2nd, 3rd ... frame can be taken, not every {every}")
        if world_size() > 1 and (videos := [source.name for source in sources if source.is_video]):
            raise UserError(f"{videos[0]}: several processes share pictures, not videos or cameras: start one without torchrun")
        self.sources, self.size, self.every = sources, size, every
        self.count, self.unreadable = 0, 0
        self.live = False  # a camera is being read, which only Ctrl-C ends

    def __iter__(self) -> Iterator[list[Frame]]:
        pictures = self._numbered()
        while batch := list(islice(pictures, self.size)):
            if frames := [frame for frame in batch if frame is not None]:
                yield frames

    def _numbered(self) -> Iterator[Frame | None]:
        for picture in self._pictures():
            self.count += 1
            try:
                frame = picture.result()
            except UnreadableImageError as error:
                frame = None
                self.unreadable += 1
                print(f"warning: left out: {printable(str(error))}", flush=True)  # whichever rank it is
            yield frame and replace(frame, image_id=self.count)

    def _pictures(self) -> Iterator[Future[Frame | None]]:
        """None stands for another rank's."""
        for is_video, sources in groupby(self.sources, lambda source: source.is_video):
            if not is_video:
                stills = (partial(self._still, n, source) for n, source in enumerate(sources))
                yield from read_ahead(stills, self.size * world_size())
                continue
            for source in sources:
                self.live = source.camera is not None
                with closing(read_video(source, self.every)) as frames:
                    jobs = repeat(partial(next, frames, None))
                    with closing(read_ahead(jobs, self.size, threads=1)) as pictures:  # closed first: its thread reads frames
                        yield from takewhile(lambda picture: picture.exception() or picture.result(), pictures)

    def _still(self, n: int, source: Source) -> Frame | None:
        return Frame(source, read_image(source.name)) if self._is_mine(n) else None

    def _is_mine(self, n: int) -> bool:
        return n // self.size % world_size() == rank()

    def total(self) -> int | None:
        """How many pictures will come; None with a camera, or a video that does not tell."""
        mine = [source for n, source in enumerate(self.sources) if self._is_mine(n)]
        lengths = [video_length(source) if source.is_video else 1 for source in mine]
        return sum(-(-length // self.every) for length in lengths) if all(lengths) else None


def read_video(source: Source, every: int = 1) -> Generator[Frame, None, None]:
    """Frames 0, `every`, 2 * `every`, ..., turned as the video's metadata say. Raises `UnreadableImageError` for none."""
    import cv2

    capture, n, start = _capture(source), 0, time.monotonic()
    fps, length = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
    fps = fps if 0 < fps < 1000 else DEFAULT_FPS  # NaN is neither
    try:
        while (picture := capture.read()[1]) is not None:
            if n % every == 0:
                told = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000 or n / fps  # 0 where the format has no times
                seconds = told if source.camera is None else time.monotonic() - start
                yield Frame(source, cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), 0, n, seconds, fps / every)
            n += 1
    finally:
        capture.release()
    if n == 0:
        raise UnreadableImageError(f"{source.name}: no {'video' if source.camera is None else 'camera'} that can be read")
    if source.camera is None and n < 0.9 * length:  # some headers only estimate
        say(f"warning: {source.name} ends after {n} of {length:.0f} frames: it may be damaged")


def video_length(source: Source) -> int:
    """Frames, as the header says; 0 where it does not, and for a camera."""
    import cv2

    return 0 if source.camera is not None else max(0, int(_capture(source).get(cv2.CAP_PROP_FRAME_COUNT)))


def _capture(source: Source) -> Any:
    import cv2

    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    return cv2.VideoCapture(source.name if source.camera is None else source.camera)
