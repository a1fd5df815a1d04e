"""Files that others wrote, looked at before they are believed: no more is read or unpacked than they may hold."""

import os
import stat
import zipfile
from pathlib import Path

from retinanet.errors import UserError

LARGEST_JSON = 8 << 30  # bytes: twice what the largest published data sets have


def read_bounded(file: Path, largest: int) -> bytes:
    """The content of a file of at most `largest` bytes; a larger one is refused unread. Raises `UserError`, `OSError`."""
    with open(file, "rb", opener=_opened_at_once) as stream:
        status = os.fstat(stream.fileno())
        if stat.S_ISFIFO(status.st_mode):
            raise UserError(f"{file}: is a pipe, not a file")
        most = min(status.st_size, largest) if stat.S_ISREG(status.st_mode) else largest  # a device tells no size
        content = stream.read(most + 1) if status.st_size <= largest else b""  # as much is reserved at once
    if status.st_size > largest or len(content) > largest:
        raise UserError(f"{file}: larger than {largest >> 20} MB, which no file of this kind is")
    return content


def _opened_at_once(name: str, flags: int) -> int:
    return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))  # without it a pipe is waited for, without end


def check_unfolding(archive: zipfile.ZipFile, file: Path) -> None:
    """Raises `BadZipFile` for a bomb: torch.save compresses nothing, and no archive of its holds more than the file."""
    if sum(member.file_size for member in archive.infolist()) > file.stat().st_size:
        raise zipfile.BadZipFile("it would unfold to more than the file holds")
