"""A user's mistake gets one clear line; a traceback is kept for ours."""

import difflib
import functools
import sys
from collections.abc import Callable, Iterable


class UserError(Exception):
    """Something the user can mend. The message says what, where, and what to do, in one line."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x' or 'y'?"` for the known names nearest to `name`; empty when none is near."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def command_line(main: Callable[[], int | None]) -> Callable[[], None]:
    """Runs a tool's `main`: a `UserError` becomes one line and exit code 2, Ctrl-C exit code 130."""

    @functools.wraps(main)
    def run() -> None:
        try:
            sys.exit(main() or 0)
        except UserError as error:
            message = str(error).rsplit("UserError: ", 1)[-1]  # from a loading process it comes with a traceback
            print(f"error: {message}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            sys.exit(130)
        except BrokenPipeError:  # the reader (`| head`) went away
            sys.stderr.close()
            sys.exit(0)

    return run
