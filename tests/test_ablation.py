"""tools/focal_lab.py ablation: the rows that are there, the runner with a training that obeys, the table and its verdicts."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, Run, mistake

from laboratory import ablation, standings
from laboratory.ablation import Row, plan, read_rows, read_run, run_all
from laboratory.standings import Figure, Standing
from retinanet.anchors import P2_STRIDES, build_anchors
from retinanet.config import differences, load_config
from retinanet.errors import RunError, UserError
from retinanet.interrupts import Interrupts

BASE = REPOSITORY / "configs" / "ablation" / "base.yaml"
ROWS = read_rows()
BY_NAME = {row.name: row for row in ROWS}

# What the paper says, typed from it again: tables 1a to 1c; section 5.1: cross entropy 30.2, gamma 2 with alpha .5 .4 lower.
PAPER = {
    "ce": 30.2,
    **{f"balanced-{alpha}": ap for alpha, ap in ((0.25, 10.8), (0.5, 30.2), (0.75, 31.1), (0.9, 30.8))},
    **{f"focal-{pair}": ap for pair, ap in (("0.5-0.5", 32.9), ("1-0.25", 33.7), ("2-0.25", 34.0), ("5-0.25", 32.2))},
    "focal-2-0.5": 33.6,
    **{f"anchors-{shape}": ap for shape, ap in (("1x1", 30.3), ("1x3", 32.4), ("2x3", 34.2), ("3x3", 34.0))},
}


@pytest.mark.parametrize("row", [row for row in ROWS if row.same_as is None], ids=lambda row: row.name)
def test_overrides_are_settings_and_change_what_the_name_says(row: Row) -> None:
    plain, changed = load_config(BASE), load_config(BASE, row.overrides)
    keys = {text.partition("=")[0] for text in row.overrides}
    assert set(differences(plain, changed)) <= keys
    assert differences(plain, changed) or row.name == "focal-2-0.25"  # which is the default, written out
    assert len(load_config(REPOSITORY / "configs" / "retinanet_r50_1x.yaml", row.overrides).model.anchors.sizes) == 5
    if row.name.startswith(("focal-", "balanced-")):
        *gamma, alpha = row.name.split("-")[1:]
        assert (changed.loss.gamma, changed.loss.alpha) == (float(gamma[0]) if gamma else 0.0, float(alpha))
    if row.name.startswith("anchors-"):
        scales, ratios = map(int, row.name.removeprefix("anchors-").split("x"))
        assert (len(changed.model.anchors.scales), len(changed.model.anchors.ratios)) == (scales, ratios)


def test_cross_entropy_rows_have_no_weights_and_the_prior_is_all_between_them() -> None:
    without, with_prior = (load_config(BASE, BY_NAME[name].overrides) for name in ("ce-no-prior", "ce"))
    assert differences(without, with_prior) == {"model.prior": (0.5, 0.01)}
    assert (with_prior.loss.gamma, with_prior.loss.alpha) == (0.0, None)


def test_rows_carry_the_paper_s_figures_and_no_others() -> None:
    assert {row.name: row.published for row in ROWS if row.published is not None} == PAPER
    assert all(row.where for row in ROWS if row.published is not None)
    assert {row.name for row in ROWS if row.main} == {"ce-no-prior", "ce", "balanced-0.75", "focal-2-0.25", "atss"}
    box_losses = {load_config(BASE, row.overrides).loss.box_loss for row in ROWS if row.group == "box loss"}
    assert len(box_losses) == 9


def test_the_base_has_the_imbalance_that_it_is_for() -> None:
    """128 pixels at strides 4 to 128: 32^2 + 16^2 + 8^2 + 4^2 + 2^2 + 1 = 1365 cells, nine anchors in each."""
    config = load_config(BASE)
    anchors = build_anchors(config.model.anchors)([(128 // stride, 128 // stride) for stride in P2_STRIDES])
    assert config.input.short_edge == config.input.long_edge == 128
    assert len(anchors) == 12_285


def test_seeds_go_to_main_rows_and_the_first_of_all_rows_comes_first(tmp_path: Path) -> None:
    runs = plan(ROWS, [], 3, out=tmp_path, config=BASE)
    assert len(runs) == 24 + 2 * 5  # 27 rows, three of which are the same as another; five main ones
    assert [run.seed for run in runs] == [0] * 24 + [1] * 5 + [2] * 5
    assert len({run.folder for run in runs}) == 34
    assert all(a.folder != b.folder for a, b in pairwise(runs))
    named = plan(ROWS, ["anchors-3x3", "giou"], 2, out=tmp_path, config=BASE)
    assert [(run.row.name, run.seed) for run in named] == [(n, s) for s in (0, 1) for n in ("focal-2-0.25", "giou")]
    with pytest.raises(UserError, match=r"no row 'giuo'\. Did you mean 'giou'"):
        plan(ROWS, ["giuo"], 1, out=tmp_path, config=BASE)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rows: [{name: a, group: g}, {name: a, group: g}]", "two rows have the same name"),
        ("rows: [{name: a, group: g, same_as: b}]", "a: same_as names a row with runs of its own"),
        ("rows: [{name: b, group: g}, {name: a, group: g, same_as: b, overrides: [x=1]}]", "goes without overrides"),
        ("rows: [{name: ../a, group: g}]", "name String should match pattern"),
        ("rows: [{name: a, group: g, puplished: 3}]", "puplished Extra inputs are not permitted"),
        ("groups: []", "'rows'"),
    ],
)
def test_rows_that_are_wrong_are_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "rows.yaml").write_text(text)
    with pytest.raises(UserError) as raised:
        read_rows(tmp_path / "rows.yaml")
    assert said in str(raised.value) and "rows.yaml" in str(raised.value)


STUB = """
import json, signal, sys, time
from pathlib import Path
folder = Path(next(a for a in sys.argv if a.startswith("output_dir=")).partition("=")[2])
here = Path(__file__).parent
with (here / "calls").open("a") as calls:
    calls.write(f"{folder.parent.name} {folder.name} {'--resume' in sys.argv}\\n")
act = json.loads((here / "acts.json").read_text()).get(folder.parent.name, "learn")
metrics = {"AP": 0.31, "AP50": 0.62, "loss_cls": 0.1, "loss_box": 0.2}
metrics |= {"idle": {"AP": 0.001, "AP50": 0.009}, "nan": {"loss_cls": None}, "none": {"AP": None, "AP50": None}}.get(act, {})
def save(*_):
    (folder / "saved").touch()
    sys.exit(130)
if act == "wait":
    signal.signal(signal.SIGINT, save)
    (folder / "waiting").touch()
    time.sleep(600)
if act == "explode":
    print("error: 11 steps in a row were not finite, the last with loss_cls nan. Lower train.learning_rate")
    sys.exit(1)
if act in ("break", "mistake"):
    print("step 3 of 4\\rerror: the disk is full" if act == "break" else "error: data.train is not there", end="\\n\\n")
    sys.exit(1 if act == "break" else 2)
(folder / "metrics.json").write_text(json.dumps(metrics))
"""


class Stub:
    """In the place of tools/train.py."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        (folder / "train.py").write_text(STUB)
        monkeypatch.setattr(ablation, "TRAIN", folder / "train.py")
        self.act()

    def act(self, **acts: str) -> None:
        """What the next trainings of a row do; they learn if nothing is said."""
        (self.folder / "acts.json").write_text(json.dumps(acts))

    def calls(self) -> list[str]:
        """The trainings since the last look."""
        file = self.folder / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return lines


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stub:
    return Stub(tmp_path, monkeypatch)


THREE = [Row(name="a", group="g", main=True), Row(name="b", group="g"), Row(name="c", group="g", same_as="a")]


def runs_in(folder: Path, *settings: str, rows: list[Row] = THREE, seeds: int = 2) -> list[ablation.Run]:
    return plan(rows, [], seeds, out=folder / "out", config=BASE, settings=settings)


def test_finished_runs_are_not_repeated_and_failed_ones_are(stub: Stub, tmp_path: Path, capsys: Any) -> None:
    stub.act(b="break")
    shown: list[int] = []
    with pytest.raises(RunError, match=r"1 runs failed: .*out/b/seed0 \(the disk is full\); the same command"):
        run_all(runs_in(tmp_path), lambda: shown.append(len(list((tmp_path / "out").rglob("metrics.json")))))
    assert stub.calls() == ["a seed0 True", "b seed0 True", "a seed1 True"]  # the others went on; all with --resume
    assert shown == [1, 1, 2]
    out = capsys.readouterr().out
    assert "a, seed 0: finished, AP 31.0, AP50 62.0" in out and "b, seed 0: failed, the disk is full" in out
    stub.act()
    run_all(runs_in(tmp_path))
    assert stub.calls() == ["b seed0 True"]
    run_all(runs_in(tmp_path))
    assert stub.calls() == []
    run_all(runs_in(tmp_path, seeds=3))
    assert stub.calls() == ["a seed2 True"]
    assert read_run(tmp_path / "out" / "a" / "seed2")["AP50"] == 0.62


@pytest.mark.parametrize(
    ("act", "note"),
    [("explode", "not finite"), ("nan", "not finite"), ("idle", "nothing learned"), ("none", "nothing learned")],
)
def test_a_run_that_diverged_is_over_and_said(stub: Stub, tmp_path: Path, act: str, note: str) -> None:
    stub.act(b=act)
    run_all(runs_in(tmp_path))
    result = read_run(tmp_path / "out" / "b" / "seed0")
    assert result["status"] == "diverged" and note in result["note"]
    stub.calls()
    run_all(runs_in(tmp_path))
    assert stub.calls() == []
    lines = standings.standings(THREE, tmp_path / "out")
    assert [(line.runs, line.diverged) for line in lines] == [(2, 0), (1, 1), (2, 0)]  # c is the same as a
    assert "| g | b | diverged | diverged | 1, of which 1 diverged |" in standings.table(lines)


def test_a_mistake_stops_at_once(stub: Stub, tmp_path: Path) -> None:
    stub.act(a="mistake")
    with pytest.raises(UserError, match=r"a: data\.train is not there") as raised:
        run_all(runs_in(tmp_path))
    assert raised.value.exit_code == 2
    assert stub.calls() == ["a seed0 True"]


def test_a_folder_of_other_settings_is_refused(stub: Stub, tmp_path: Path) -> None:
    run_all(runs_in(tmp_path))
    stub.calls()
    with pytest.raises(UserError, match=r"other settings \(train.max_steps was 300, is 9\): name another --out"):
        run_all(runs_in(tmp_path, "train.max_steps=9"))
    changed = [THREE[0].model_copy(update={"overrides": ["loss.gamma=1"]})]
    with pytest.raises(UserError, match=r"loss.gamma was 2.0, is 1.0"):
        run_all(runs_in(tmp_path, rows=changed))
    with pytest.raises(UserError, match=r"unknown key 'loss\.gama'"):  # before anything has run
        run_all(runs_in(tmp_path, "loss.gama=1"))
    (tmp_path / "out").rename(tmp_path / "elsewhere")  # moved: nothing else has changed
    run_all(plan(THREE, [], 2, out=tmp_path / "elsewhere", config=BASE))
    assert stub.calls() == []
    for damaged in ("{", "[1]"):
        (tmp_path / "elsewhere" / "a" / "seed0" / "run.json").write_text(damaged)
        with pytest.raises(UserError, match="cannot be read"):
            read_run(tmp_path / "elsewhere" / "a" / "seed0")


def test_ctrl_c_waits_until_the_training_has_saved_and_the_next_call_goes_on(stub: Stub, tmp_path: Path) -> None:
    stub.act(b="wait")
    folder = tmp_path / "out" / "b" / "seed0"

    def press() -> None:
        while not (folder / "waiting").exists():  # however long a loaded machine takes to start the training
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    with Interrupts() as asked, pytest.raises(KeyboardInterrupt):
        run_all(runs_in(tmp_path))
    assert asked.exit_code == 130
    assert (folder / "saved").exists()
    assert read_run(folder)["status"] == "stopped"
    assert stub.calls() == ["a seed0 True", "b seed0 True"]
    minutes = read_run(folder)["minutes"]
    stub.act()
    run_all(runs_in(tmp_path))
    assert stub.calls() == ["b seed0 True", "a seed1 True"]
    assert read_run(folder)["status"] == "finished" and read_run(folder)["minutes"] > minutes > 0


def line(
    name: str, published: float | None, *values: float, diverged: int = 0, main: bool = True, group: str = "g"
) -> Standing:
    figure = Figure(sum(values) / len(values), min(values), max(values)) if values else None
    row = Row(name=name, group=group, published=published, main=main)
    return Standing(row, len(values) + diverged, diverged, figure, figure)


def test_verdicts() -> None:
    low, high, reverse = line("low", 30, 0.1, 0.12, 0.11), line("high", 34, 0.2, 0.21, 0.13), line("top", 36, 0.05, 0.06, 0.07)
    overlapping, few = line("mid", 32, 0.1, 0.3, 0.2), line("few", 33, 0.3, 0.3)

    def said(*lines: Standing) -> list[str]:
        return [verdict for verdict in standings.verdicts(lines) if not verdict.startswith("g:")]

    assert said(low, high) == said(high, low) == ["high above low: found"]
    assert said(low, reverse) == ["top above low: not found, the other way round"]
    assert said(low, overlapping) == ["mid above low: undecided, ranges overlap"]
    assert said(low, few) == ["few above low: undecided, fewer than 3 seeds"]
    assert said(low, line("new", 31)) == ["new above low: not run yet"]
    assert said(low, line("nan", 20, diverged=3)) == ["low above nan: found"]  # AP 0
    assert said(low, line("part", 20, 0.01, 0.01, diverged=1)) == ["low above part: undecided, some runs diverged"]
    assert said(low, line("same", 30, 0.5, 0.5, 0.5)) == []  # the paper has them equal
    assert said(low, line("minor", 35, 0.5, 0.5, 0.5, main=False)) == []


def test_a_training_that_diverged_in_the_paper_is_below_all_of_its_order() -> None:
    row = Row(name="wild", group="g", where="diverges, section 5.1", main=True)
    wild, low = Standing(row, 3, 3, None, None), line("low", 30, 0.1, 0.12, 0.11)
    expected = ["low above wild: found", "g: 1 of 1 pairs of rows stand in the paper's order, by their means"]
    assert standings.verdicts([low, wild]) == expected
    names = {(row.name, row.paper) for row in read_rows() if row.where.startswith("diverges")}
    assert names == {("ce-no-prior", 0.0)}


def test_a_group_is_compared_pair_by_pair() -> None:
    """Published 1 < 2 < 3, and one without; here 0.1, 0.3, 0.2 by the means: (1, 2) and (1, 3) agree, (2, 3) does not."""
    lines = [line(n, p, v, main=False) for n, p, v in (("x", 1, 0.1), ("y", 2, 0.3), ("z", 3, 0.2), ("w", None, 0.9))]
    assert standings.verdicts(lines) == ["g: 2 of 3 pairs of rows stand in the paper's order, by their means"]
    assert standings.verdicts(lines[:1]) == []


def test_cells_of_the_table() -> None:
    lines = [
        line("many", 34, 0.3, 0.32, 0.34),
        line("one", None, 0.3),
        line("none", 30.25),
        line("part", 1, 0.2, 0.2, diverged=1),
    ]
    rows = standings.table(lines).splitlines()[2:]
    assert rows[0] == "| g | many | 32.0 (30.0 .. 34.0) | 32.0 (30.0 .. 34.0) | 3 | 34.0 |"
    assert rows[1] == "| g | one | 30.0 | 30.0 | 1 | - |"
    assert rows[2].startswith("| g | none | not run yet | not run yet | 0 |")
    assert "| 20.0 | 20.0 | 3, of which 1 diverged |" in rows[3]


def test_table_only_runs_nothing_and_shows_what_there_is(run_tool: Run, stub: Stub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_all(plan(ROWS, ["ce", "focal-2-0.25"], 1, out=out, config=BASE))
    stub.calls()
    done = run_tool("focal_lab", "ablation", "--table-only", "--out", out)
    assert done.code == 0 and stub.calls() == []
    assert "| cross entropy | ce | 31.0 | 62.0 | 1 | 30.2, section 5.1 |" in done.out
    assert "focal-2-0.25 above ce: undecided, fewer than 3 seeds" in done.out
    assert "| matcher | atss | not run yet |" in (out / "table.md").read_text()
    content = {row["name"]: row for row in json.loads((out / "table.json").read_text())["rows"]}
    assert content["l1"]["AP"] == {"mean": 0.31, "low": 0.31, "high": 0.31} and content["atss"]["AP"] is None
    assert content["ce-no-prior"]["where"] == "diverges, section 5.1"
    assert (out / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_has_run_yet(run_tool: Run, tmp_path: Path) -> None:
    done = run_tool("focal_lab", "ablation", "--table-only", "--out", "new")
    assert done.code == 0 and done.out.count("| not run yet | not run yet | 0 |") == len(ROWS)
    assert "no row 'cee'" in mistake(run_tool("focal_lab", "ablation", "--rows", "cee"))
    assert (tmp_path / "new" / "chart.png").exists()


def test_settings_may_stand_behind_the_rows(run_tool: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one writes them, although argparse takes all that follows `--rows` for names."""
    planned = list[tuple[list[str], list[str]]]()

    def note(rows: object, names: list[str], seeds: int, *, settings: list[str], **_: object) -> list[ablation.Run]:
        planned.append((names, settings))
        return []

    monkeypatch.setattr("laboratory.ablation.plan", note)
    command = ["ablation", "train.batch_size=4", "--out", "new", "--rows", "ce", "atss", "train.max_steps=2"]
    assert run_tool("focal_lab", *command).code == 0
    assert planned == [(["ce", "atss"], ["train.batch_size=4", "train.max_steps=2"])]
    line = mistake(run_tool("focal_lab", "ablation", "--rows", "train.max_steps=2"))
    assert line == "error: --rows needs the name of a row before train.max_steps=2"


@pytest.mark.slow
def test_two_real_steps(run_tool: Run, tmp_path: Path, make_coco: Callable[..., dict[str, str]]) -> None:
    data = [f"data.{part}.{key}={value}" for part in ("train", "val") for key, value in make_coco(part).items()]
    settings = [*data, "data.workers=0", "train.max_steps=2", "train.batch_size=2", "model.fpn_channels=32"]
    arguments = ["ablation", "--config", BASE, "--out", "out", "--seeds", "1", "--rows", "ce-no-prior", *settings]
    done = run_tool("focal_lab", *arguments)
    assert done.code == 0, (done, (tmp_path / "out" / "ce-no-prior" / "seed0" / "train.log").read_text()[-2000:])
    result = read_run(tmp_path / "out" / "ce-no-prior" / "seed0")
    assert result["status"] == "diverged" and result["config"]["train"]["max_steps"] == 2  # two steps teach nothing
    assert result["config"]["model"]["prior"] == 0.5
    assert torch.load(tmp_path / "out" / "ce-no-prior" / "seed0" / "last.pt", weights_only=True)["training"]["step"] == 2
