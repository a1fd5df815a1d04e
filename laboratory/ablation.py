"""Trainings that differ in one thing, one after another, each by `tools/train.py` in a process and a folder of its own.

A folder says in run.json what became of it: finished runs are not repeated, others go on where they stopped.
"""

import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tqdm import tqdm

from retinanet.config import Config, differences, load_config, parse_config
from retinanet.data.files import read_yaml
from retinanet.errors import RunError, UserError, did_you_mean
from retinanet.results import write_json

TRAIN = Path(__file__).parent.parent / "tools" / "train.py"
ROWS = Path(__file__).parent.parent / "configs" / "ablation" / "rows.yaml"
LEARNED = 0.01  # AP50; a run that ends below has learned nothing, and counts as diverged
MISTAKE = 2  # the exit code of what the user can mend: all other rows would end the same
OVER = ("finished", "diverged")


class Row(BaseModel):
    """A row of the table: what it changes, and what the paper says of it."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    group: str
    overrides: list[str] = []  # key.sub=value
    same_as: str | None = None  # another row, whose runs are this one's too
    published: float | None = None  # the paper's AP, on COCO
    where: str = ""  # ... in its table or section
    main: bool = False  # run with several seeds

    @property
    def runs_of(self) -> str:
        return self.same_as or self.name

    @property
    def paper(self) -> float | None:
        """What it stands by in the paper's order: nothing is below a training that diverged there."""
        return 0.0 if self.where.startswith("diverges") else self.published


def read_rows(path: Path = ROWS) -> list[Row]:
    """Raises `UserError` naming the row."""
    try:
        rows = [Row.model_validate(entry) for entry in read_yaml(path)["rows"]]
    except (ValidationError, TypeError, KeyError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    own = {row.name for row in rows if row.same_as is None}
    if len({row.name for row in rows}) < len(rows):
        raise UserError(f"{path}: two rows have the same name")
    for row in rows:
        if row.same_as is not None and (row.same_as not in own or row.overrides):
            raise UserError(f"{path}: {row.name}: same_as names a row with runs of its own, and goes without overrides")
    return rows


@dataclass(frozen=True)
class Run:
    """One training: a row with a seed."""

    row: Row
    seed: int
    folder: Path
    arguments: list[str]  # of tools/train.py: a config and settings

    def check(self) -> Config:
        """Its config. Raises `UserError` if it is none, or if the folder holds a run of another one."""
        config, before = load_config(self.arguments[0], self.arguments[1:]), read_run(self.folder)
        changes = differences(parse_config(before["config"], where=str(self.folder / "run.json")), config) if before else {}
        story = ", ".join(f"{key} was {old}, is {new}" for key, (old, new) in changes.items() if key != "output_dir")
        if story:
            raise UserError(f"{self.folder} holds a run with other settings ({story}): name another --out, or delete it")
        return config


def read_run(folder: Path) -> dict[str, Any]:
    """What run.json says; empty before the first start."""
    try:
        return dict(json.loads((folder / "run.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder / 'run.json'} cannot be read ({error}): delete {folder} to run it again") from None


def plan(rows: list[Row], chosen: list[str], seeds: int, *, out: Path, config: Path, settings: Sequence[str] = ()) -> list[Run]:
    """The runs of the rows `chosen`, or of all: `seeds` each of main rows and of those chosen by name, one of the others.
    The first seed of every row comes before the second of any; a row's own settings win over `settings`."""
    names = [row.name for row in rows]
    for name in set(chosen) - set(names):
        raise UserError(f"there is no row '{name}'.{did_you_mean(name, names)} Rows: {', '.join(names)}")
    wanted = [row for row in rows if not chosen or row.name in chosen]
    many = {row.runs_of for row in wanted if row.main or chosen}
    own = [row for row in rows if row.name in {row.runs_of for row in wanted}]
    pairs = [(seed, row) for seed in range(seeds) for row in own if seed == 0 or row.name in many]
    runs = []
    for seed, row in pairs:
        folder = out / row.name / f"seed{seed}"
        runs.append(Run(row, seed, folder, [str(config), *settings, *row.overrides, f"seed={seed}", f"output_dir={folder}"]))
    return runs


def run_all(runs: Sequence[Run], after_each: Callable[[], None] = lambda: None) -> None:
    """Runs what is not over yet, and calls `after_each`. Raises `UserError` at once for a mistake in settings or data,
    `RunError` at the end if runs failed otherwise, `KeyboardInterrupt` when the training at hand has saved its state."""
    checked = [(run, run.check()) for run in runs]
    left = [(run, config) for run, config in checked if read_run(run.folder).get("status") not in OVER]
    failed = []
    with tqdm(total=len(runs), initial=len(runs) - len(left), desc="runs", unit="run") as progress:
        for run, config in left:
            progress.set_postfix_str(f"{run.row.name}, seed {run.seed}")
            result = perform(run, config)
            if result["status"] == "failed":
                failed.append(f"{run.folder} ({result['note']})")
            figures = [f"{name} {100 * result[name]:.1f}" for name in ("AP", "AP50") if name in result]
            story = ", ".join(filter(None, (result["status"], *figures, result["note"], f"{result['minutes']:.1f} min")))
            progress.write(f"{run.row.name}, seed {run.seed}: {story}")
            progress.update()
            after_each()
    if failed:
        raise RunError(f"{len(failed)} runs failed: {'; '.join(failed)}; the same command tries them again")


def perform(run: Run, config: Config) -> dict[str, Any]:
    """Trains, from where an earlier attempt stopped, and writes run.json."""
    before, started = read_run(run.folder), time.monotonic()
    run.folder.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "status": "stopped",
        "minutes": before.get("minutes", 0.0),
        "config": config.model_dump(mode="json"),
    }
    try:
        write_json(run.folder / "run.json", result)
        code = train([*run.arguments, "--resume"], run.folder / "train.log")
        result |= outcome(run.folder, code)
    finally:
        result["minutes"] += (time.monotonic() - started) / 60
        write_json(run.folder / "run.json", result)
    if code == MISTAKE:
        raise UserError(f"{run.row.name}: {result['note']}")
    return result


def train(arguments: list[str], log: Path) -> int:
    """The exit code of `tools/train.py`. It has a session of its own, so that Ctrl-C reaches this process alone, which
    passes it on once and waits until the training has saved its state."""
    with log.open("ab") as output:
        command = [sys.executable, str(TRAIN), *arguments]
        process = Popen(command, stdin=DEVNULL, stdout=output, stderr=STDOUT, start_new_session=True)
        try:
            return process.wait()
        except BaseException:
            print("\nstopping when the training has saved its state ...", file=sys.stderr, flush=True)
            process.send_signal(signal.SIGINT)
            process.wait()
            raise


def outcome(folder: Path, code: int) -> dict[str, Any]:
    """What became of a training, by its exit code, the last line of its log (its error, if it has one) and its metrics.json."""
    log = (folder / "train.log").read_bytes()[-10_000:].decode(errors="replace").replace("\r", "\n")
    last = ([line.strip() for line in log.split("\n") if line.strip()] or [f"exit code {code}"])[-1].removeprefix("error: ")
    diverged: dict[str, Any] = {"status": "diverged", "AP": 0.0, "AP50": 0.0}
    if code == 1 and "steps in a row were not finite" in last:
        return diverged | {"note": "steps that are not finite"}
    if code != 0:
        return {"status": "failed", "note": last}
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))  # of the last step
    except (OSError, ValueError) as error:  # training goes on where it cannot be written
        return {"status": "failed", "note": f"metrics.json: {error}"}
    if metrics["loss_cls"] is None or metrics["loss_box"] is None:  # how metrics.json writes NaN and infinity
        return diverged | {"note": "the validation loss is not finite"}
    if (metrics["AP50"] or 0.0) < LEARNED:
        return diverged | {"note": "nothing learned"}
    return {"status": "finished", "note": "", "AP": metrics["AP"], "AP50": metrics["AP50"]}
