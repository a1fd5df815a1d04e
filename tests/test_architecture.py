"""The house's order, read from its sources: who may import whom, how large a room may be, and what stays unloaded."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import retinanet

REPOSITORY = Path(__file__).parent.parent
PACKAGE = REPOSITORY / "retinanet"
FLOORS = [
    {"errors", "torchvision_import", "config", "structures", "boxes", "bounded", "download", "distributed", "precision"},
    {"anchors", "matcher", "losses", "backbone", "fpn", "head", "optimizer"},
    {"model", "criterion", "postprocess", "data"},
    {
        "checkpoint",
        "anchor_search",
        "coverage",
        "weights",
        "onnx",
        "inference",
        "visualize",
        "results",
        "inputs",
        "outputs",
        "tiling",
        "test_time",
    },
    {"evaluation", "predictor", "adapters", "surgery", "checks", "report"},
    {"run_setup", "run_state", "telemetry", "validation", "interrupts", "failures", "learner", "bad_steps"},
    {"training"},
]  # a package, such as data, is on one floor with all of its modules


def name_of(file: Path) -> str:
    """retinanet/data/coco.py -> data.coco; a package's __init__.py -> the package."""
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py")) if file != PACKAGE / "__init__.py"}
TOOLS = sorted((REPOSITORY / "tools").glob("*.py"))


def floor_of(module: str) -> int:
    room = module.partition(".")[0]
    floors = [number for number, rooms in enumerate(FLOORS) if room in rooms]
    assert floors, f"retinanet/{module} has no floor yet: give it one in {Path(__file__).name}"
    return floors[0]


def imports_of(file: Path) -> Iterator[tuple[str, int]]:
    """The project's modules that `file` imports, anywhere in it, and the line."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: write imports in full, from retinanet..."
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "retinanet":
                known = (".".join(parts[1:end]) for end in range(len(parts), 1, -1))
                yield next((module for module in known if module in FILES), "__init__"), node.lineno


def counted_lines(file: Path) -> int:
    """Lines that are neither blank nor only a comment."""
    lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    return sum(bool(line) and not line.startswith("#") for line in lines)


def loaded_by(program: str, *modules: str) -> list[str]:
    """Those of `modules` that a fresh Python has loaded after `program`."""
    program += f"\nimport sys\nprint(*sorted({set(modules)!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_every_module_has_a_floor_and_every_floor_its_rooms() -> None:
    rooms = {module.split(".")[0] for module in FILES}
    assert {room for floor in FLOORS for room in floor} == rooms
    assert sum(map(len, FLOORS)) == len(rooms)  # none is on two


@pytest.mark.parametrize("module", FILES)
def test_imports_go_down(module: str) -> None:
    """To the same floor or a lower one. `from retinanet import X` would go through the front door, above all floors."""
    for other, line in imports_of(FILES[module]):
        assert other != "__init__", f"{FILES[module]}:{line} imports the package itself"
        assert floor_of(other) <= floor_of(module), f"{FILES[module]}:{line} imports {other} from a floor above"


def test_no_import_goes_in_a_circle() -> None:
    needs = {module: {other for other, _ in imports_of(file)} for module, file in FILES.items()}
    done: set[str] = set()
    while len(done) < len(needs):
        ready = {module for module in needs if module not in done and needs[module] <= done}
        assert ready, f"these import each other: {sorted(set(needs) - done)}"
        done |= ready


def test_the_reading_of_imports_sees_what_is_there() -> None:
    """Or all of the above would pass on nothing."""
    found = {other for other, _ in imports_of(FILES["predictor"])}
    assert {"checkpoint", "data.images", "structures"} <= found
    assert "criterion" in {other for other, _ in imports_of(FILES["inference"])}
    assert len(FILES) > 25 and floor_of("data.coco") == 2


def test_no_room_for_odds_and_ends() -> None:
    for file in [*FILES.values(), *TOOLS]:
        assert not {"utils", "util", "misc", "helpers", "common"} & set(file.relative_to(REPOSITORY).with_suffix("").parts)


def test_sizes() -> None:
    for file in FILES.values():
        lines = len(file.read_text(encoding="utf-8").splitlines())
        assert lines <= 400, f"{file} has {lines} lines"
    assert sum(map(counted_lines, [*FILES.values(), PACKAGE / "__init__.py"])) <= 9440
    for file in TOOLS:
        assert counted_lines(file) < 120, f"{file} has {counted_lines(file)} lines that are neither blank nor comment"


def test_packages_are_installed_as_they_are_on_disk() -> None:
    """setuptools finds a folder only if it is a package: modules beside no `__init__.py` would be missing."""
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    assert settings["tool"]["setuptools"]["packages"]["find"] == {"include": ["retinanet*"]}
    assert all((file.parent / "__init__.py").exists() for file in PACKAGE.rglob("*.py"))


def test_the_public_names() -> None:
    names = ["Detections", "Predictor", "RetinaNet", "load_config"]
    assert sorted(dir(retinanet)) == sorted(retinanet.__all__) == names
    for name, home in zip(names, ("structures", "predictor", "model", "config.load"), strict=True):
        assert getattr(retinanet, name).__module__ == f"retinanet.{home}"
    with pytest.raises(AttributeError, match="module 'retinanet' has no attribute 'Retinanet'"):
        _ = retinanet.Retinanet
    assert not hasattr(retinanet, "anything_else")


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = ("torch", "torchvision", "numpy", "PIL", "pydantic", "yaml", "cv2")
    assert loaded_by("import retinanet", *heavy) == []
    assert loaded_by("import retinanet\nretinanet.load_config", "torch", "torchvision", "numpy", "PIL") == []
    assert loaded_by("import retinanet\nretinanet.Detections", "torch", "torchvision") == ["torch"]


def test_prediction_loads_neither_augmentation_nor_training_nor_evaluation() -> None:
    """Someone who only predicts waits for none of these, and needs none of them installed."""
    unneeded = ("albumentations", "tensorboard", "torch.utils.tensorboard", "matplotlib", "scipy", "pycocotools")
    program = "import retinanet.predictor, retinanet.visualize, retinanet.results\nfrom retinanet import Predictor, RetinaNet"
    ours = ("retinanet.training", "retinanet.evaluation.coco", "retinanet.data.transforms")
    assert loaded_by(program, *unneeded, *ours, "retinanet.predictor") == ["retinanet.predictor"]
