"""Reports side by side: the same twice, better and worse, of other data, damaged."""

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import Run, mistake
from test_report_figures import Box, data_set, detections

from retinanet.data.annotations import Annotations
from retinanet.evaluation.coco import NAMES, evaluate_rows
from retinanet.report.compare import compare_reports, comparison_page, comparison_text, read_report
from retinanet.report.figures import build_figures, write_figures
from retinanet.report.matches import Seen, find_matches, write_matches
from retinanet.structures import Category

BOX = [10.0, 10, 50, 50]
BOXES: list[Box] = [(image, image % 2, BOX) for image in range(100)]  # classes a and b by turns


def report(folder: Path, truth: Annotations, rows: np.ndarray, *, matches: bool = True) -> Path:
    folder.mkdir(parents=True)
    seen = Seen(rows, truth)
    found, boxes = find_matches(seen)
    write_figures(build_figures(seen, found, boxes, evaluate_rows(rows, truth), title=folder.name, samples=100), folder)
    if matches:
        write_matches(folder / "matches.npz", found)
    return folder


def found_in(images: range) -> np.ndarray:
    return detections(*((image, image % 2, BOX, 0.9) for image in images))


def test_a_run_against_itself_has_not_changed(tmp_path: Path) -> None:
    folder = report(tmp_path / "a", data_set(BOXES, 100, "ab"), found_in(range(0, 100, 3)))
    comparison = compare_reports([read_report(folder)] * 3, samples=20)
    assert comparison["samples"] == 20 and len(comparison["runs"]) == 2
    for run in comparison["runs"]:
        rows = [row for row in [*run["summary"], *run["classes"]] if row["difference"] is not None]
        assert {(row["difference"], row["low"], row["high"], row["moved"]) for row in rows} == {(0, 0, 0, False)}
        assert [row["name"] for row in run["summary"]] == list(NAMES)
    assert "0 of 2 classes moved" in comparison_text(comparison)


def test_the_interval_of_a_difference_is_paired(tmp_path: Path) -> None:
    """Before, 20 of the 50 boxes of each class are found; after, 10 more of b, none lost: AR100 of b rises by 0.2, of both by
    0.1. Paired, only those 10 of 100 images matter: +- 1.96 * sqrt(.1 * .9 / 100) = 0.059, where b's share stays at half."""
    truth = data_set(BOXES, 100, "ab")
    before = report(tmp_path / "before" / "report", truth, found_in(range(40)))
    after = report(tmp_path / "after" / "evaluation", truth, np.concatenate([found_in(range(40)), found_in(range(41, 61, 2))]))
    reports = [read_report(before.parent), read_report(after.parent)]  # runs' folders
    (run,) = compare_reports(reports, samples=2000)["runs"]
    recall = next(row for row in run["summary"] if row["name"] == "AR100")
    assert recall["difference"] == pytest.approx(0.1) and recall["moved"]
    assert [recall["low"], recall["high"]] == pytest.approx([0.041, 0.159], abs=0.01)
    assert [(row["name"], row["moved"]) for row in run["classes"]] == [("a", False), ("b", True)]
    assert run["classes"][0]["difference"] == 0 < run["classes"][1]["low"] < run["classes"][1]["difference"]


def test_without_matches_classes_move_beyond_both_intervals(tmp_path: Path) -> None:
    truth = data_set(BOXES, 100, "ab")
    few = report(tmp_path / "few", truth, found_in(range(20)), matches=False)
    many = report(tmp_path / "many", truth, np.concatenate([found_in(range(20)), found_in(range(21, 100, 2))]))
    comparison = compare_reports([read_report(few), read_report(many)])
    (run,) = comparison["runs"]
    assert comparison["samples"] == 0 and {row["low"] for row in run["summary"]} == {None}
    assert [row["moved"] for row in run["classes"]] == [False, True]
    assert "matches.npz" in comparison_text(comparison).splitlines()[0]


def test_the_tool_prints_and_writes(run_tool: Run, tmp_path: Path) -> None:
    truth = data_set(BOXES, 100, "ab")
    report(tmp_path / "a", truth, found_in(range(20)))
    report(tmp_path / "b", truth, found_in(range(100)))
    result = run_tool("compare_runs", "a", "b", "--samples", 50, "--out", "out")
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0].startswith("100 images, 100 boxes; paired bootstrap, 50 resamples")
    assert lines[2] == "b against a, in points"
    ap = next(line.split() for line in lines if line.startswith("AP50"))
    assert ap[1:4] == ["20.8", "100.0", "+79.2"] and ap[-1] == "*"  # 21 of 101 levels: recall 0 .. 0.20
    assert next(line for line in lines if line.startswith("APs")).split() == ["APs", "-", "-", "-", "-"]
    assert "2 of 2 classes moved" in result.out
    written = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert written["runs"][0]["name"] == "b" and written["samples"] == 50
    assert (tmp_path / "out" / "comparison.txt").read_text().splitlines() == lines[:-1]
    assert "<table>" in (tmp_path / "out" / "comparison.html").read_text()


def test_one_line_for_what_cannot_be_compared(run_tool: Run, tmp_path: Path) -> None:
    truth, rows = data_set(BOXES, 100, "ab"), found_in(range(9))
    report(tmp_path / "a", truth, rows)
    report(tmp_path / "fewer", data_set(BOXES[:99], 100, "ab"), rows)
    report(tmp_path / "other", data_set([(i, k, [11.0, 10, 50, 50]) for i, k, _ in BOXES], 100, "ab"), rows)
    report(tmp_path / "named", data_set(BOXES, 100, "ac"), rows)
    assert "fewer is of other data than a: 99 boxes, not 100" in mistake(run_tool("compare_runs", "a", "fewer"))
    assert "other is of other data than a: other images or boxes" in mistake(run_tool("compare_runs", "a", "other"))
    assert "named is of other data than a: other classes" in mistake(run_tool("compare_runs", "a", "named"))
    assert "nowhere: no figures.json there" in mistake(run_tool("compare_runs", "a", "nowhere"))
    assert "two reports at least" in mistake(run_tool("compare_runs", "a"))
    assert "--samples 1" in mistake(run_tool("compare_runs", "a", "a", "--samples", 1))
    report(tmp_path / "half", data_set(BOXES[:50], 50, "ab"), rows)
    (tmp_path / "fewer" / "matches.npz").write_bytes((tmp_path / "half" / "matches.npz").read_bytes())
    assert "matches.npz beside it is of another report" in mistake(run_tool("compare_runs", "a", "fewer"))
    for content in ("", "[]", "{}", '{"summary": [], "classes": [], "about": {}}', "[" * 100_000):
        (tmp_path / "fewer" / "figures.json").write_text(content)
        assert "not the figures of a report" in mistake(run_tool("compare_runs", "a", "fewer"))


def test_names_do_nothing_in_the_page(tmp_path: Path) -> None:
    truth = data_set(BOXES, 100, "ab")
    truth.categories = (Category(4, "<script>alert(1)</script>"), Category(5, "\u202e'\"&"))
    folder = report(tmp_path / "<b>", truth, found_in(range(30)))
    tags: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.append(tag)  # type: ignore[method-assign]
    parser.feed(page := comparison_page(compare_reports([read_report(folder)] * 2, samples=5)))
    assert not {"script", "b", "img"} & set(tags) and "\u202e" not in page
    assert "&lt;script&gt;alert(1)" in page


@pytest.mark.parametrize("rows", [np.empty((0, 7)), found_in(range(5))])
def test_nothing_to_measure(tmp_path: Path, rows: np.ndarray) -> None:
    folder = report(tmp_path / "a", data_set([], 10, "ab"), rows)
    comparison = compare_reports([read_report(folder)] * 2, samples=5)
    json.dumps(comparison, allow_nan=False)
    assert "0 of 0 classes moved" in comparison_text(comparison) and "<table>" in comparison_page(comparison)
