"""torchvision comes without torch's compiler, and works with it as if it had come first."""

import os
import subprocess
import sys
from pathlib import Path


def printed(program: str, **environment: str) -> list[str]:
    """By a fresh Python: this one has both."""
    command, known = [sys.executable, "-c", program], os.environ | environment
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=known)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


START = """
import sys
from retinanet.torchvision_import import import_torchvision
torchvision = import_torchvision()
print("torch._dynamo" in sys.modules, "torch._dynamo.utils" in sys.modules)
kernel = sys.modules["torchvision.ops.roi_align"]
"""


def test_the_compiler_is_imported_when_it_is_used() -> None:
    """torch's own answers: it compiles for the CPU, and not for the meta device."""
    ask = """
print(kernel.is_compile_supported("cpu"), "torch._dynamo" in sys.modules, kernel.is_compile_supported("meta"))
from torch._dynamo.utils import is_compile_supported
print(is_compile_supported("cpu"), is_compile_supported("meta"))
"""
    before, own, *answers = printed(START + ask)
    assert (before, own) == ("False", "False")
    assert answers == ["True", "True", "False", "True", "False"]


def test_what_is_compiled_afterwards_is_right() -> None:
    """Eager backend: tracing is what the compiler's module does; 3 * 2 + 1 = 7."""
    program = """
import torch
print(torch.compile(lambda x: x * 2 + 1, backend="eager")(torch.tensor(3)).item(), type(torch._dynamo.utils).__name__)
"""
    assert printed(START + program)[2:] == ["7", "module"]


def test_the_question_may_stand_in_what_is_compiled() -> None:
    """As in others' models, which hold roi_align: importing would break their graph. 6 + 1, the CPU being compiled for."""
    program = """
import torch
ask = kernel.is_compile_supported
step = torch.compile(lambda x: x + 1 if ask(x.device.type) else x, fullgraph=True, backend="eager")
print(step(torch.tensor(6)).item())
"""
    assert printed(START + program)[2:] == ["7"]


def test_among_several_ranks_the_compiler_comes_before_the_group() -> None:
    """DDP imports it, and imported while a group exists it would keep the group's threads."""
    assert printed(START, WORLD_SIZE="2") == ["True", "True"]


def test_a_torchvision_that_imports_the_compiler_whole(tmp_path: Path) -> None:
    """Another version may take more of it: whatever it asks for is the real one."""
    (tmp_path / "torchvision.py").write_text(
        "import torch._dynamo\nfrom torch._dynamo.utils import counters, is_compile_supported\n"
    )
    program = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from retinanet.torchvision_import import import_torchvision
torchvision = import_torchvision()
import torch._dynamo.utils
print(torchvision.counters is torch._dynamo.utils.counters, torchvision.is_compile_supported("cpu"))
print(type(sys.modules["torch._dynamo.utils"]).__name__, type(torch._dynamo.utils).__name__)
"""
    assert printed(program) == ["True", "True", "module", "module"]


def test_a_compiler_that_is_there_already_stays() -> None:
    program = """
import sys, torch._dynamo
there = sys.modules["torch._dynamo.utils"]
from retinanet.torchvision_import import import_torchvision
import_torchvision()
print(sys.modules["torch._dynamo.utils"] is there, sys.modules["torchvision.ops.roi_align"].is_compile_supported
      is there.is_compile_supported)
"""
    assert printed(program) == ["True", "True"]
