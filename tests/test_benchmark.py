"""tools/benchmark.py: how times become ratios, what the floor is, what counts as equal, and that each measure runs.

No test looks at how long anything takes.
"""

import json
import math
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import inference, machine, startup, time_to_ap
from benchmarks.machine import count_flop, floor_seconds
from benchmarks.peer import draw_picture, image_size, matched, peer_detections, peer_detector
from benchmarks.report import finite, seconds_text, table
from benchmarks.time_to_ap import Run
from benchmarks.timing import Case, Options, Row, build, interleaved, resident_peak, summarize
from retinanet.errors import UserError
from retinanet.structures import Detections

TOOL = Path(__file__).parent.parent / "tools" / "benchmark.py"
PEAKS = {"matmul_fp32": 100.0, "conv_fp32": 50.0, "matmul_bf16": 200.0, "conv_bf16": 400.0, "copy": 10.0}
ROW = set(Row.__dataclass_fields__)


@pytest.fixture(autouse=True)
def known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its peaks are given, not measured: numbers to calculate with, and seconds saved."""
    monkeypatch.setattr(machine, "peaks", lambda device: PEAKS)


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Runs the tool with these arguments and one round; the rows of its JSON, whose form is checked."""

    def run(*arguments: object) -> list[dict[str, Any]]:
        file = tmp_path / "benchmark.json"
        chart = tmp_path / "benchmark.png"
        monkeypatch.setattr(
            sys, "argv", [str(TOOL), *map(str, arguments), "--rounds", "1", "--json", str(file), "--chart", str(chart)]
        )
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(TOOL), run_name="__main__")
        assert ended.value.code == 0
        content = json.loads(file.read_text())
        assert chart.read_bytes().startswith(b"\x89PNG")
        assert {"command", "processor", "cores", "threads", "versions", "peaks", "load_average"} <= set(content["header"])
        assert content["header"]["versions"]["torch"] == torch.__version__.partition("+")[0]
        assert content["rows"] and all(set(row) == ROW for row in content["rows"])
        return content["rows"]

    return run


def test_each_round_calls_each_variant_once_and_begins_with_another() -> None:
    calls: list[str] = []

    def named(name: str) -> Callable[[], int]:
        return lambda: calls.append(name) or len(calls)  # type: ignore[func-returns-value]

    times, first = interleaved({"a": named("a"), "b": named("b")}, rounds=3, warmup=1)
    # One round of warm-up, number -1, and the rounds 0, 1, 2: an odd one begins with b.
    assert "".join(calls) == "ba" + "ab" + "ba" + "ab"
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}  # the warm-up is not counted
    assert first == {"b": 1, "a": 2}  # what the warm-up returned


def test_without_warm_up_the_first_round_gives_the_results() -> None:
    times, first = interleaved({"a": lambda: "x"}, rounds=1, warmup=0)
    assert first == {"a": "x"} and len(times["a"]) == 1


def test_what_cannot_be_built_of_ours_is_left_out_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    def missing() -> Callable[[], int]:
        raise UserError("not installed")

    functions = build(Case("c", {"peer": lambda: int, "ours": missing, "other": lambda: float}, lambda a, b: {}))
    assert functions == {"peer": int, "other": float}
    assert capsys.readouterr().out == "ours: skipped: not installed\n"
    with pytest.raises(UserError, match="not installed"):  # without the peer there is nothing to compare with
        build(Case("c", {"peer": missing, "ours": lambda: int}, lambda a, b: {}))


def test_ratio_is_the_median_of_the_rounds_ratios() -> None:
    row = summarize(Row("m", "c", "peer", "ours"), [2.0, 4.0, 9.0], [1.0, 1.0, 3.0])
    assert (row.peer_seconds, row.seconds) == (4.0, 1.0)
    # Ratios 2, 4, 3: median 3, not 4 as of the medians; quartiles halfway to the neighbours.
    assert (row.ratio_low, row.ratio, row.ratio_high) == (2.5, 3.0, 3.5)


def test_floor_is_arithmetic_or_memory_whichever_takes_longer() -> None:
    assert floor_seconds(1000.0, 0.0, "fp32", "cpu") == 10.0  # at 100, the better of 100 and 50
    assert floor_seconds(1000.0, 0.0, "bf16", "cpu") == 2.5  # at 400
    assert floor_seconds(1000.0, 200.0, "fp32", "cpu") == 20.0  # 200 bytes at 10
    assert floor_seconds(0.0, 0.0, "fp32", "cpu") is None  # nothing is known about the work
    assert floor_seconds(1000.0, 0.0, "int8", "cpu") is None  # nor about the machine's peak


def test_flop_of_a_convolution_forward_and_backward() -> None:
    image, weight = torch.zeros(2, 3, 8, 8), torch.zeros(5, 3, 3, 3, requires_grad=True)
    once = 2 * (2 * 8 * 8) * 5 * (3 * 3 * 3)  # a multiply-add is two; images x pixels, channels out, channels in x window
    assert count_flop(lambda: torch.conv2d(image, weight, padding=1)) == once
    # Backward to the weight alone costs the same once more: the image needs no gradient.
    assert count_flop(lambda: torch.conv2d(image, weight, padding=1).sum().backward()) == 2 * once
    with torch.inference_mode():
        assert count_flop(lambda: torch.conv2d(image, weight, padding=1)) == once


def found(*rows: tuple[list[float], float, int]) -> Detections:
    boxes, scores, labels = zip(*rows) if rows else ((), (), ())
    return Detections(torch.tensor(boxes).reshape(-1, 4), torch.tensor(scores), torch.tensor(labels, dtype=torch.int64))


def test_detections_match_by_label_box_and_score_each_once() -> None:
    square, near, far = [0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 9.5], [0.0, 0.0, 10.0, 5.0]  # IoU 0.95 and 0.5
    peer = found((square, 0.5, 1))
    assert matched(peer, found((near, 0.52, 1))) == {"matched": 1, "of": 1, "score differs by": pytest.approx(0.02)}
    for other in ((square, 0.5, 2), (far, 0.5, 1), (square, 0.56, 1)):  # label, box, score
        assert matched(peer, found(other))["matched"] == 0
    twice = found((square, 0.5, 1), (square, 0.5, 1))
    assert matched(twice, peer) == {"matched": 1, "of": 2, "score differs by": 0.0}
    assert matched(peer, twice) == {"matched": 1, "of": 2, "score differs by": 0.0}
    assert matched(found(), found()) == {"matched": 0, "of": 0, "score differs by": 0.0}
    assert matched(found(), peer)["of"] == 1


def test_boxes_without_area_match_by_their_corners() -> None:
    empty = found(([4.0, 0.0, 4.0, 9.0], 0.5, 1))
    assert matched(empty, empty)["matched"] == 1
    assert matched(empty, found(([4.1, 0.0, 4.1, 9.0], 0.5, 1)))["matched"] == 0


def test_peak_memory_sees_what_was_freed_again() -> None:
    def call() -> None:
        np.ones(2**23)  # 64 MiB, freed at once

    peak = resident_peak(call)
    if peak is None:
        pytest.skip("this system does not tell a process's peak")
    assert 60 < peak < 80
    assert (resident_peak(lambda: None) or 0.0) < 5


def test_table_and_its_units() -> None:
    assert [seconds_text(s) for s in (None, 0.0000123, 0.0123, 1.5, 75.0)] == ["", "12.3 us", "12.3 ms", "1.5 s", "75 s"]
    row = summarize(Row("loss", "800 px", "theirs", "ours"), [4.0], [2.0])
    row.peer_mib, row.mib, row.floor_seconds, row.differences = 100.0, 8.4, 0.5, {"gradients": 1e-9}
    head, rule, line = table([row]).splitlines()
    assert line == "| loss: 800 px | theirs 4 s | ours 2 s | 2.00 (2.00 .. 2.00) | 100 -> 8 | 500 ms, 25 % | gradients 1e-09 |"
    assert head.count("|") == rule.count("|") == line.count("|")
    row.images, row.is_bound = 8, True
    cells = table([row]).splitlines()[2].split(" | ")
    assert cells[1:4] == ["theirs 4 s (2 images/s)", "ours 2 s (4 images/s)", "at least 2.00"]
    unmeasured = table([Row("memory", "c", "theirs", "ours")]).splitlines()[2]
    assert unmeasured == "| memory: c | theirs | ours | - | - | - | - |"


def test_json_has_no_nan() -> None:
    assert finite({"a": [math.nan, 1.0], "b": {"c": math.inf}, "d": 2}) == {"a": [None, 1.0], "b": {"c": None}, "d": 2}


def test_loss(benchmark: Callable[..., list[dict[str, Any]]]) -> None:
    (row,) = benchmark("loss", "--size", 64, "--no-memory")
    assert row["variant"] == "ours" and row["mib"] is None and len(row["times"]["ours"]) == 1
    # 64 x 85 pixels, padded to 64 x 96: 8 x 12, 4 x 6, 2 x 3, 1 x 2 and 1 x 1 cells; 2 images x 9 anchors x (80 + 4) floats,
    # read once and written once, at 10 bytes a second.
    assert row["floor_seconds"] == pytest.approx((96 + 24 + 6 + 2 + 1) * 2 * 9 * 84 * 4 * 2 / 10)
    differences = row["differences"]
    assert max(differences["loss_cls"], differences["loss_box"]) < 1e-5
    assert differences["gradients"] < 1e-5 * differences["of at most"]


@pytest.mark.slow
def test_peak_memory_of_a_process_of_its_own(benchmark: Callable[..., list[dict[str, Any]]]) -> None:
    (row,) = benchmark("loss", "--size", 256)
    # 256 x 352 pixels: the gradients of 32 x 44, 16 x 22, 8 x 11, 4 x 6 and 2 x 3 cells, 2 images x 9 anchors x 84 floats.
    gradients = (1408 + 352 + 88 + 24 + 6) * 2 * 9 * 84 * 4 / 2**20
    assert gradients - 1 < row["mib"] < 6 * gradients and gradients < row["peer_mib"]


def test_postprocess(benchmark: Callable[..., list[dict[str, Any]]]) -> None:
    rows = benchmark("postprocess", "--size", 64, "--no-memory")
    assert [row["case"] for row in rows] == [f"64 px, {n} candidates" for n in (300, 1000, 20000)]
    for row in rows:
        assert row["differences"]["matched"] == row["differences"]["of"] > 100


def test_data(benchmark: Callable[..., list[dict[str, Any]]]) -> None:
    threads = torch.get_num_threads()
    rows = benchmark("data", "--size", 100, "--no-memory")
    assert torch.get_num_threads() == threads
    assert [row["variant"] for row in rows] == ["ours, uint8", "ours, normalised here"]
    for row in rows:
        assert row["differences"]["grey levels on average"] < 0.5  # rounding to whole ones costs 0.25 on average
        assert row["differences"]["boxes"] < 1e-3


def test_evaluation(benchmark: Callable[..., list[dict[str, Any]]]) -> None:
    rows = benchmark("evaluation", "--size", 20, "--no-memory")
    assert rows[0]["case"] == "20 images, 2000 detections" and rows[0]["variant"] == "ours, pycocotools"
    for row in rows:  # a second one where faster-coco-eval is installed
        assert row["differences"]["largest of the twelve numbers"] <= 1e-12 and row["differences"]["AP"] > 0


@pytest.mark.slow
def test_inference(
    benchmark: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def quantised(*_: object) -> Path:
        raise UserError("not here")

    monkeypatch.setattr(inference, "quantised", quantised)  # it takes a minute
    row = benchmark("inference", "--size", 64, "--backbone", "resnet18", "--no-memory")[0]
    assert "ours int8: skipped: not here" in capsys.readouterr().out
    assert row["variant"] == "ours fp32" and row["images"] == 1 and row["gflop"] > 0.5
    assert row["differences"]["matched"] == row["differences"]["of"] > 5
    assert row["differences"]["score differs by"] < 1e-4


@pytest.mark.slow
def test_the_fast_peer_finds_the_same() -> None:
    image = torch.from_numpy(draw_picture(image_size(64))).permute(2, 0, 1).float() / 255
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"):  # compiling takes a minute
        plain, fast = (
            peer_detections(peer_detector("resnet18", 64, "cpu", fast=flag).eval()([image])[0]) for flag in (False, True)
        )
    result = matched(plain, fast)
    assert 0 < result["score differs by"] < 0.05 and result["of"] > 5  # it does compute in bf16
    assert result["matched"] >= 0.8 * result["of"]


@pytest.mark.slow
def test_training(benchmark: Callable[..., list[dict[str, Any]]]) -> None:
    (row,) = benchmark("training", "--size", 64, "--backbone", "resnet18", "--no-memory")
    assert row["case"] == "resnet18 64 px, batch 2" and row["images"] == 2 and row["gflop"] > 1
    assert row["differences"]["its relative difference"] < 0.02  # bf16 has 8 bits


@pytest.mark.slow
def test_startup(benchmark: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "predict.py").symlink_to(TOOL.parent / "predict.py")
    monkeypatch.setattr(startup, "TOOLS", tmp_path)  # one tool of all
    rows = benchmark("startup", "--size", 64)
    assert [row["case"] for row in rows] == ["predict.py --help", "predict.py, one image, resnet18 64 px"]
    for row in rows:
        assert row["differences"]["seconds beyond it"] == pytest.approx(row["seconds"] - row["peer_seconds"])


@pytest.mark.slow
def test_memory(benchmark: Callable[..., list[dict[str, Any]]]) -> None:
    (row,) = benchmark("memory", "--size", 200)
    assert row["ratio"] is None and row["peer_mib"] > 100 and row["mib"] > 100  # Python and torch alone are more


@pytest.fixture
def tiny_config(make_coco: Callable[..., dict[str, str]], tmp_path: Path) -> Path:
    """Two steps, a validation after each."""
    data = make_coco(n=4)
    config = tmp_path / "tiny.yaml"
    config.write_text(
        "model: {backbone: resnet18, backbone_weights: none, norm: batch, fpn_channels: 64}\n"
        "input: {short_edge: 64, long_edge: 96}\n"
        f"data: {{train: {json.dumps(data)}, val: {json.dumps(data)}, workers: 0}}\n"
        "train: {batch_size: 2, max_steps: 2, validate_every_steps: 1, precision: fp32, ema_decay: 0.9}\n"
    )
    return config


@pytest.mark.slow
def test_time_to_ap(benchmark: Callable[..., list[dict[str, Any]]], tiny_config: Path) -> None:
    (row,) = benchmark("time_to_ap", tiny_config, "seed=1", "--target", 1)
    assert row["ratio"] is None and not row["is_bound"]  # two steps do not get there
    assert row["differences"]["at step"] == row["differences"]["its step"] == 2


@pytest.mark.parametrize(
    ("ap50", "limit", "step", "bound"),
    [
        (0.9, 1e9, 1, False),  # at its first validation
        (0.7, 1e9, 2, True),  # its run ends
        (0.7, 1.0, 1, True),  # a first step takes more than a microsecond
    ],
)
def test_the_peer_is_stopped(
    ap50: float,
    limit: float,
    step: int,
    bound: bool,
    tiny_config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(time_to_ap, "run_ours", lambda options: Run(True, 1e-6, 0.85, 40))
    monkeypatch.setattr(time_to_ap, "evaluate_peer", lambda *_: {"AP50": ap50})
    (row,) = time_to_ap.measure(Options(config=str(tiny_config), limit=limit))
    assert (row.differences["its step"], row.differences["the peer's AP50"], row.is_bound) == (step, ap50, bound)
    assert row.ratio == pytest.approx((row.peer_seconds or 0) / 1e-6)
    assert ("the peer has not reached AP50 0.85 within" in capsys.readouterr().out) == bound


@pytest.mark.slow
def test_accuracy(
    benchmark: Callable[..., list[dict[str, Any]]], tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = benchmark("accuracy", tiny_config)
    names = [f"{whose} {name}" for whose in ("our", "the peer's") for name in ("AP", "AP50", "AP75")]
    assert list(row["differences"]) == names and row["case"] == "tiny, seed 0"
    assert f"our AP: {row['differences']['our AP']:.1f}, deviation 0.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["loss", "configs/demo.yaml"], "time_to_ap and accuracy need a CONFIG, and no other measure takes one"),
        (["time_to_ap"], "time_to_ap and accuracy need a CONFIG"),
        (["time_to_ap", "a.yaml", "b.yaml"], "expected CONFIG, then key.sub=value"),
        (["all", "--size", "64"], "run them one by one"),
        (["loss", "--size", "16"], "--size must be at least 32, got 16"),
        (["loss", "--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["training", "--backbone", "resnet19"], "--backbone resnet19: expected one of resnet18, resnet34"),
        (["time_to_ap", "a.yaml", "--target", "nan"], "--target is an AP50 above 0 and at most 1, got nan"),
        (["time_to_ap", "a.yaml", "--limit", "0.5"], "--limit is at least 1, the time that we take, got 0.5"),
        (["accuracy", "no.yaml"], "no.yaml"),
        (["loss", "--device", "abacus"], "--device abacus: expected cpu, cuda"),
        (["loss", "--chart", "a.txt"], "the name of a chart ends in .png"),
    ],
)
def test_mistakes(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(TOOL), *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(TOOL), run_name="__main__")
    error = capsys.readouterr().err.strip()
    assert ended.value.code == 2 and message in error and error.startswith("error: ") and "\n" not in error
