"""How the tests of docs/security.md look at a hostile file: it is refused in one line, within little memory and time."""

import resource
import signal
import sys
import warnings
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from retinanet.errors import UserError


def refusal(action: Callable[[], object]) -> str:
    """The one line with which a `UserError` ends `action`."""
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000
    return message


def within(action: Callable[[], object], megabytes: int = 300, seconds: int = 20) -> str:
    """`refusal`, of an action that may take so much memory and time: in a process of its own, which is ended otherwise."""

    def limited(pipe: Any) -> None:
        signal.alarm(seconds)
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + (megabytes << 20),) * 2)
        try:
            pipe.send(refusal(action))
        except BaseException as error:
            pipe.send(f"not refused: {type(error).__name__}")

    receiving, sending = get_context("fork").Pipe(duplex=False)
    with warnings.catch_warnings(action="ignore"):  # newer Pythons warn of threads; the child needs none
        process = get_context("fork").Process(target=limited, args=(sending,))
        process.start()
    sending.close()
    try:
        return receiving.recv()
    except EOFError:
        process.join()
        return f"not refused: ended by signal {-(process.exitcode or 0)}"
    finally:
        process.join()


needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="the limits are Linux's")
