"""Downloads: over https only, within a size, and under their names only when they are complete and have the right digest."""

import hashlib
import os
import urllib.parse
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

from retinanet.errors import UserError

TIMEOUT = 60  # seconds without a byte
CHUNK = 1 << 20


class _HttpsOnly(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if urllib.parse.urlsplit(newurl).scheme != "https":
            fp.close()
            raise UserError(f"{req.full_url} leads to {newurl}: only https is followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def is_safe(url: str) -> bool:
    """https; or http from this machine itself, where no network lies between."""
    parts = urllib.parse.urlsplit(url)
    return bool(parts.hostname) and (parts.scheme == "https" or (parts.scheme, parts.hostname) == ("http", "127.0.0.1"))


def open_url(url: str, headers: dict[str, str] | None = None) -> Any:
    """The response to a GET. Raises `UserError` for what is not https, also after a redirect; else as urllib does."""
    if not is_safe(url):
        raise UserError(f"{url}: only https addresses are downloaded from")
    opener = urllib.request.build_opener(_HttpsOnly)
    return opener.open(urllib.request.Request(url, headers=headers or {}), timeout=TIMEOUT)


def download(url: str, path: Path, digest: tuple[str, str], largest: int) -> None:
    """Fetches a file of at most `largest` bytes; `digest` is the algorithm, and how the file's hexadecimal one begins.

    Raises `OSError`, `HTTPException` or `UserError`, and then leaves nothing behind.
    """
    from tqdm import tqdm

    algorithm, begin = digest
    partial = path.with_name(f".{path.name}.{os.getpid()}")  # other processes may be at the same
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_url(url) as response, partial.open("wb") as sink, tqdm(unit="B", unit_scale=True, desc=path.name) as bar:
            bar.total = response.length
            while chunk := response.read(CHUNK):
                if sink.tell() + len(chunk) > largest:
                    raise OSError(f"more than {largest >> 20} MB came, which is not this file")
                sink.write(chunk)
                bar.update(len(chunk))
        if not file_digest(partial, algorithm).startswith(begin):
            raise OSError(f"the {algorithm} of what came does not begin with {begin}")
        partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink()


def file_digest(path: Path, algorithm: str) -> str:
    """In hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()
