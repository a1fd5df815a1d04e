"""Fetch, check and unpack COCO 2017 (detection images and annotations) into one folder."""

from __future__ import annotations

import argparse
import hashlib
import http.client
import shutil
import stat
import sys
import time
import urllib.error
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from retinanet.download import is_safe, open_url
from retinanet.errors import UserError

# The bucket behind images.cocodataset.org, by the name that the host's certificate carries. What arrives is trusted for
# its checksum.
BASE_URL = "https://s3.amazonaws.com/images.cocodataset.org"
DEFAULT_OUT = Path("datasets/coco")
NEXT_COMMAND = "python tools/train.py configs/retinanet_r50_1x.yaml"
TRIES = 5
CHUNK_BYTES = 1 << 20
EXAMPLES = """examples:
  python datasets/download_coco.py                      everything: about 20 GB to fetch, 41 GB of disk on the way
  python datasets/download_coco.py --splits val2017     enough to evaluate: about 1 GB to fetch
  python datasets/download_coco.py --annotations-only   about 0.25 GB to fetch

A run that was stopped goes on where it was: give the same command again."""


class DownloadError(UserError):
    """What went wrong, where, and what to do: one line, for the user."""


@dataclass(frozen=True)
class Archive:
    """One zip archive: its path under the base URL, MD5, size in bytes, and what it unpacks to.

    All members lie in `folder`, which holds `files` files once unpacked; `unpacked` bounds their total size in bytes.
    """

    path: str
    md5: str
    size: int
    folder: str
    files: int
    unpacked: int

    @property
    def name(self) -> str:
        """File name of the archive."""
        return PurePosixPath(self.path).name


ARCHIVES = (
    Archive("annotations/annotations_trainval2017.zip", "f4bbac642086de4f52a3fdda2de5fa2c", 252_907_541,
            "annotations", files=6, unpacked=900_000_000),
    Archive("zips/val2017.zip", "442b8da7639aecaf257c1dceb8ba8c80", 815_585_330,
            "val2017", files=5_000, unpacked=900_000_000),
    Archive("zips/train2017.zip", "cced6f7f71b7629ddf16f17bbcfab6b2", 19_336_861_798,
            "train2017", files=118_287, unpacked=20_000_000_000),
)  # fmt: skip


def size_of(path: Path) -> int:
    """Size of a file in bytes, 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def part_of(path: Path) -> Path:
    """Where an archive lies while it is being fetched."""
    return path.with_name(path.name + ".part")


def is_done(archive: Archive, out: Path) -> bool:
    """Whether the archive's folder is there; a folder with files missing raises DownloadError."""
    folder = out / archive.folder
    if not folder.exists():
        return False
    found = sum(1 for _ in folder.iterdir())
    if found < archive.files:
        raise DownloadError(f"{folder} holds {found} of {archive.files} files; move it away and run again")
    return True


def peak_bytes(archives: Sequence[Archive], out: Path, keep: bool) -> int:
    """Most disk space (bytes) that the work will take at any moment, on top of what lies in `out` now."""
    used = peak = 0
    for archive in archives:
        path = out / archive.name
        used += max(archive.size - (size_of(path) or size_of(part_of(path))), 0)
        peak = max(peak, used + archive.unpacked)
        used += archive.unpacked - (0 if keep else archive.size)
    return peak


def transfer(url: str, part: Path, size: int) -> None:
    """Append to `part` what it lacks of the `size` bytes at `url`; may end short, as the connection does.

    Errors of urllib and http.client pass through; DownloadError if the server announces another size.
    """
    from tqdm import tqdm  # here, so that --help answers at once

    offset = size_of(part)
    with open_url(url, {"Range": f"bytes={offset}-"} if offset else {}) as response:
        if offset and not response.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
            print(f"{part.stem}: the server ignores Range requests, so the download starts again from zero", flush=True)
            offset = 0
        if response.length is not None and offset + response.length != size:
            raise DownloadError(f"{url}: {offset + response.length} bytes long, expected {size}; check --base-url")
        bar = tqdm(total=size, initial=offset, unit="B", unit_scale=True, desc=part.stem, disable=None)
        with bar, part.open("ab" if offset else "wb") as sink:
            # Asking for no more than is missing ends the loop at `size`, however much the server sends.
            while chunk := response.read(min(CHUNK_BYTES, size - sink.tell())):
                sink.write(chunk)
                bar.update(len(chunk))


def try_once(url: str, part: Path, size: int) -> str:
    """Transfer what `part` lacks and return why that broke off, "" if complete; DownloadError if no retry can help."""
    try:
        if size_of(part) < size:
            transfer(url, part, size)
    except urllib.error.HTTPError as error:
        reason = f"HTTP {error.code} {error.reason}"
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            part.unlink(missing_ok=True)
            return f"{reason}, so the download starts again from zero"
        if error.code < 500:
            raise DownloadError(f"{url}: {reason}; check --base-url") from error
        return reason
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
        return str(getattr(error, "reason", error)) or type(error).__name__
    return "" if size_of(part) == size else "the connection closed early"


def download(archive: Archive, url: str, part: Path, pause: Callable) -> None:
    """Fetch `url` into `part`, resuming after each broken transfer; DownloadError after TRIES of them."""
    if size_of(part) > archive.size:
        part.unlink()
    for tried in range(1, TRIES + 1):
        reason = try_once(url, part, archive.size)
        if not reason:
            return
        if tried < TRIES:
            print(f"{archive.name}: {reason}; try {tried + 1} of {TRIES}", flush=True)
            pause(2**tried)
    raise DownloadError(
        f"{url}: {reason}; gave up after {TRIES} tries with {size_of(part)} of {archive.size} bytes,"
        " run the same command again to go on"
    )


def verify(archive: Archive, path: Path) -> None:
    """Raise DownloadError and move the file aside (`.bad`) unless it has the archive's checksum."""
    print(f"{archive.name}: checking", flush=True)
    with path.open("rb") as file:
        # MD5 is the sum that is published; it guards well against a substituted file, which would need a preimage.
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != archive.md5:
        bad = path.replace(path.with_name(path.name + ".bad"))
        raise DownloadError(f"{bad}: wrong checksum, expected {archive.md5}, got {found}; delete it and run again")


def check_members(archive: Archive, members: Sequence[zipfile.ZipInfo]) -> None:
    """Raise DownloadError if a member lies outside the archive's folder or is special, or if all are too large."""
    for member in members:
        parts = PurePosixPath(member.filename).parts
        if parts[:1] != (archive.folder,) or ".." in parts:
            raise DownloadError(f"{archive.name}: not unpacked, {member.filename!r} lies outside {archive.folder}/")
        if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise DownloadError(f"{archive.name}: not unpacked, {member.filename!r} is a link or device")
    # A declared size is a bound: zipfile reads no member beyond it.
    total = sum(member.file_size for member in members)
    if total > archive.unpacked:
        raise DownloadError(f"{archive.name}: not unpacked, would take {total} bytes of {archive.unpacked} allowed")
    if len(members) > archive.files + 1:  # the folder may be a member
        raise DownloadError(f"{archive.name}: not unpacked, holds {len(members)} members, not {archive.files}")


def unpack(archive: Archive, path: Path, out: Path) -> None:
    """Unpack into `out`; the archive's folder appears there only when it is complete."""
    from tqdm import tqdm

    staging = out / f".{archive.folder}.unpacking"
    shutil.rmtree(staging, ignore_errors=True)
    with zipfile.ZipFile(path) as bundle:
        members = bundle.infolist()
        check_members(archive, members)
        for member in tqdm(members, unit="file", desc=f"unpacking {archive.name}", disable=None):
            bundle.extract(member, staging)
    (staging / archive.folder).rename(out / archive.folder)
    staging.rmdir()


def parse_args(argv: Sequence[str] | None, archives: Sequence[Archive]) -> argparse.Namespace:
    """Read the command line; a bad one exits with status 2."""

    def base_url(text: str) -> str:
        if not is_safe(text):
            raise argparse.ArgumentTypeError(f"{text!r} is not an https address such as {BASE_URL}")
        return text.rstrip("/")

    splits = [archive.folder for archive in archives if archive.folder != "annotations"]
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder to fill (default: %(default)s)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--splits", nargs="+", choices=splits, default=splits, help="images to fetch (default: all)")
    which.add_argument("--annotations-only", action="store_true", help="fetch no images")
    parser.add_argument("--keep-archives", action="store_true", help="keep the zip files after unpacking")
    parser.add_argument("--base-url", type=base_url, default=BASE_URL, help="mirror to use (default: %(default)s)")
    return parser.parse_args(argv)


def fetch_all(args: argparse.Namespace, archives: Sequence[Archive], disk_usage: Callable, pause: Callable) -> None:
    """Bring every wanted archive that is not there yet into `args.out`; DownloadError on what the user must mend."""
    args.out.mkdir(parents=True, exist_ok=True)
    wanted = {"annotations", *([] if args.annotations_only else args.splits)}
    pending = [archive for archive in archives if archive.folder in wanted and not is_done(archive, args.out)]
    needed, free = peak_bytes(pending, args.out, args.keep_archives), disk_usage(args.out).free
    if needed > free:
        raise DownloadError(
            f"{args.out}: {needed / 1e9:.1f} GB of disk space needed, {free / 1e9:.1f} GB free;"
            " make room or choose another --out"
        )
    for archive in pending:
        path = args.out / archive.name
        if not path.exists():
            download(archive, f"{args.base_url}/{archive.path}", part_of(path), pause)
            part_of(path).rename(path)
        verify(archive, path)
        unpack(archive, path, args.out)
        if not args.keep_archives:
            path.unlink()
    missing = [archive.folder for archive in archives if not (args.out / archive.folder).exists()]
    print(f"{args.out}: {', '.join(sorted(wanted))} ready")
    print(f"still missing for training: {', '.join(missing)}" if missing else f"next: {NEXT_COMMAND}")


def main(
    argv: Sequence[str] | None = None,
    archives: Sequence[Archive] = ARCHIVES,
    disk_usage: Callable = shutil.disk_usage,
    pause: Callable = time.sleep,
) -> int:
    """Run the command line and return its exit status: 0 done, 1 failed, 130 interrupted."""
    args = parse_args(argv, archives)
    try:
        fetch_all(args, archives, disk_usage, pause)
    except KeyboardInterrupt:
        print(f"\nstopped; {args.out} keeps what was fetched, run the same command again to go on", file=sys.stderr)
        return 130
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename or args.out}: {error.strerror or error}; see to it, run again", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
