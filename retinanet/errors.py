"""A user's mistake gets one clear line; a traceback is kept for ours."""

import difflib
import errno
import functools
import os
import re
import sys
from collections.abc import Callable, Iterable

# What the outside of the program does to a file: --out names a file, a folder is read-only, the disk is full.
MENDABLE = {errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT}
MENDABLE |= {errno.ENAMETOOLONG, errno.ELOOP}


CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # the latter: bytes of a file's name that are no UTF-8


class UserError(Exception):
    """Something the user can mend. The message says what, where, and what to do, in one line."""

    exit_code = 2


class RunError(UserError):
    """A run that failed on its way, through no mistake on the command line; it may go on from its checkpoint."""

    exit_code = 1


def printable(text: str) -> str:
    """`text` with its control characters but line ends as `\\x1b`: no file's name may speak to the terminal."""
    return CONTROL.sub(lambda found: found[0] if found[0] == "\n" else repr(found[0])[1:-1], text)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x' or 'y'?"` for the known names nearest to `name`; empty when none is near."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def command_line(main: Callable[[], int | None]) -> Callable[[], None]:
    """Runs a tool's `main`: a `UserError` becomes one line and its exit code, Ctrl-C exit code 130."""

    @functools.wraps(main)
    def run() -> None:
        try:
            code = main() or 0
            sys.stdout.flush()  # here a reader that went away is still caught
            sys.exit(code)
        except UserError as error:
            message = str(error).rsplit("UserError: ", 1)[-1].strip()  # from a loading process it comes with a traceback
            print(f"error: {printable(message)}".replace("\n", "\\n"), file=sys.stderr)
            sys.exit(error.exit_code)
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
