"""A user's mistake gets one clear line; a traceback is kept for ours."""

import difflib
import errno
import functools
import os
import sys
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import Any

# What the outside of the program does to a file: --out names a file, a folder is read-only, the disk is full.
MENDABLE = {errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT}


class UserError(Exception):
    """Something the user can mend. The message says what, where, and what to do, in one line."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x' or 'y'?"` for the known names nearest to `name`; empty when none is near."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def import_torchvision() -> Any:
    """torchvision. Raises `UserError` with the versions and the cure when it was built for another torch."""
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error):  # operator torchvision::nms does not exist
            raise
        versions = " and ".join(f"{name} {metadata.version(name)}" for name in ("torch", "torchvision"))
        raise UserError(
            f"{versions} are not built for each other ({error}); mend it with: pip install --upgrade torch torchvision"
        ) from None
    return torchvision


def command_line(main: Callable[[], int | None]) -> Callable[[], None]:
    """Runs a tool's `main`: a `UserError` becomes one line and exit code 2, Ctrl-C exit code 130."""

    @functools.wraps(main)
    def run() -> None:
        try:
            code = main() or 0
            sys.stdout.flush()  # here a reader that went away is still caught
            sys.exit(code)
        except UserError as error:
            message = str(error).rsplit("UserError: ", 1)[-1].strip()  # from a loading process it comes with a traceback
            print(f"error: {message}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            sys.exit(130)
        except BrokenPipeError:  # the reader (`| head`) went away
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains when it flushes at exit
            sys.exit(0)
        except OSError as error:
            if error.errno not in MENDABLE:
                raise
            print(f"error: {error.filename or 'output'}: {error.strerror}", file=sys.stderr)
            sys.exit(2)

    return run
