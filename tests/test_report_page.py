"""The report's page without a browser: what it advises, which pictures it shows, and that nothing in it can come alive."""

import base64
import hashlib
import io
import json
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY, Outcome, Run, draw_coco, mistake
from made_figures import ERRORS, finding, made_figures, one_class
from PIL import Image

from retinanet.config import Config
from retinanet.data.annotations import Annotations
from retinanet.data.coco import load_coco
from retinanet.evaluation.coco import evaluate_rows
from retinanet.report import gallery
from retinanet.report.advice import advise
from retinanet.report.gallery import MOST, build_gallery
from retinanet.report.page import asset, render_page
from retinanet.report.write import write_report
from retinanet.results import to_entries, write_entries

# ---- advice


def error(name: str, gain: float, count: int = 40) -> dict[str, Any]:
    types = [{"name": other, "count": 1, "gain": 0.001} for other in ERRORS if other != name]
    return {
        "AP50": 0.8,
        "types": [*types, {"name": name, "count": count, "gain": gain}],
        "false_positives": 0,
        "false_negatives": 0,
    }


def sizes(small: float, others: float, boxes: int = 100) -> list[dict[str, Any]]:
    names = ("small (< 32²)", "medium (32² to 96²)", "large (> 96²)")
    rows = zip(names, (small, others, others), (boxes, 50, 50), strict=True)
    return [{"name": name, "AP": ar, "AR100": ar, "boxes": number} for name, ar, number in rows]


def crowds(first: float, last: float) -> list[dict[str, Any]]:
    rows = (("1 box", first), ("10+ boxes", last))
    return [{"name": name, "images": 9, "boxes": 90, "AP50": ap50, "AR100": ap50} for name, ap50 in rows]


def summary(ap: float | None, low: float | None, high: float | None, ap50: float | None = 0.97) -> list[dict[str, Any]]:
    numbers = made_figures()["summary"]
    return [{"name": "AP", "value": ap, "low": low, "high": high}, {**numbers[1], "value": ap50}, *numbers[2:]]


def calibration(ece: float | None, over: float) -> dict[str, Any]:
    """The bin from 0.8 weighs 50 x `over`; that from 0.1 only 100 x 0.01, and one is empty."""
    bins = [{"low": 0.8, "high": 0.9, "count": 50, "confidence": 0.85, "precision": 0.85 - over}]
    bins.append({"low": 0.1, "high": 0.2, "count": 100, "confidence": 0.15, "precision": 0.14})
    return {"ece": ece, "bins": [*bins, {"low": 0.9, "high": 1, "count": 0, "confidence": None, "precision": None}]}


def confused(count: int) -> dict[str, Any]:
    """cat taken for hen `count` times and hen for cat once; nothing else."""
    counts = [[50, 0, count, 0], [0, 50, 0, 0], [1, 0, 50, 0], [0, 0, 0, 0]]
    return {"names": ["cat", "dog", "hen"], "counts": counts, "cell": "IoU 0.5"}


CALLED_FOR: dict[str, tuple[dict[str, Any], str, str, str | None]] = {  # figures that differ, words, section, keys
    "small missed": (  # 100 x 0.6 lost of the small, 2 x 50 x 0.2 of the others
        {"errors": error("missed", 0.1), "by_size": sizes(0.4, 0.8)},
        "Most of what is missed is small (AR100 40.0 against 80.0 of larger objects)",
        "sizes",
        "input.short_edge, model.anchors.sizes",
    ),
    "missed of all sizes": (
        {"errors": error("missed", 0.1), "by_size": sizes(0.75, 0.8)},
        "Objects are missed. Look at the worst of them",
        "gallery",
        "model.anchors, train.epochs",
    ),
    "few small missed": (  # 10 x 0.6 lost of the small, 20 of the others
        {"errors": error("missed", 0.1), "by_size": sizes(0.4, 0.8, boxes=10)},
        "Objects are missed. Look at the worst of them",
        "gallery",
        "model.anchors, train.epochs",
    ),
    "confusion": (
        {"errors": error("class", 0.05, 12), "confusion": confused(11)},
        "most often cat and hen (12 times). Look whether",
        "confusion",
        None,
    ),
    "confusion by chance": (
        {"errors": error("class", 0.05), "confusion": confused(1)},
        "Classes are taken for each other. Look whether",
        "confusion",
        None,
    ),
    "localisation": (
        {"errors": error("localisation", 0.05)},
        "do not fit closely",
        "errors",
        "train.epochs, loss.box_loss, loss.box_loss_weight, loss.matcher",
    ),
    "both": ({"errors": error("both", 0.05)}, "Class and place are both wrong", "errors", "train.epochs, train.init_from"),
    "duplicate": ({"errors": error("duplicate", 0.05)}, "found twice", "errors", "postprocess.nms_threshold"),
    "background": ({"errors": error("background", 0.05)}, "the 20 surest false alarms", "gallery", "data.drop_empty"),
    "crowds": (
        {"by_crowding": crowds(0.9, 0.7)},
        "AP50 is 70.0 in pictures with 10+ boxes, 90.0 with 1 box.",
        "crowding",
        "postprocess.nms, postprocess.nms_threshold, postprocess.max_detections",
    ),
    "few boxes": (
        {"classes": [one_class("cat"), one_class("dog", boxes=29), one_class("hen", boxes=3)]},
        "mostly chance: hen (3), dog (29).",
        "classes",
        "data.repeat_threshold",
    ),
    "weak class": (
        {"classes": [one_class("cat"), one_class("dog", ap=0.5, AP_low=0.4, AP_high=0.6)]},
        "far below the mean of 97.0 for dog (50.0).",
        "classes",
        None,
    ),
    "absent class": (
        {"classes": [one_class("cat"), *(one_class(name, boxes=0, ap=None) for name in "abcd")]},
        "without a box in this data: a, b, c and 1 more.",
        "classes",
        None,
    ),
    "scores too high": (
        {"calibration": calibration(0.2, 0.2)},
        "Scores are no chances: of 50 that are 0.8 to 0.9, 65.0 % are right.",
        "calibration",
        None,
    ),
    "scores too low": ({"calibration": calibration(0.2, -0.1)}, "95.0 % are right", "calibration", None),
    "wide interval": ({"summary": summary(0.97, 0.9, 0.99)}, "AP may as well be 90.0 as 99.0", "head", "data.val"),
    "no boxes": (
        {"about": made_figures()["about"] | {"boxes": 0}},
        "The data has no boxes, so nothing can be measured",
        "head",
        None,
    ),
    "no detections": (
        {"about": made_figures()["about"] | {"detections": 0}},
        "Nothing was found at all",
        "head",
        "postprocess.score_threshold",
    ),
    "nothing special": (
        {"summary": summary(0.6, 0.58, 0.62, ap50=0.8), "classes": [one_class("cat", ap=0.6)]},
        "No single cause stands out",
        "errors",
        "train.epochs, model.backbone",
    ),
}


@pytest.mark.parametrize("case", CALLED_FOR)
def test_each_sentence_comes_when_figures_call_for_it_and_alone(case: str) -> None:
    parts, words, section, keys = CALLED_FOR[case]
    (advice,) = advise(made_figures(**parts))
    assert words in advice.text
    assert (advice.figure, advice.key) == (section, keys)
    assert f'<section id="{section}">' in asset("page.html")


def test_an_ideal_result_says_so() -> None:
    (advice,) = advise(made_figures())
    assert advice.text.startswith("Nothing to mend: AP50 is 97.0")
    assert (advice.figure, advice.key) == ("head", None)


NOT_CALLED_FOR = {
    "cheap errors": {"errors": error("missed", 0.019)},
    "nothing to gain from": {"errors": {"AP50": None, "types": [{"name": "missed", "count": 0, "gain": None}]}},
    "crowds as good": {"by_crowding": crowds(0.9, 0.81)},
    "one group": {"by_crowding": crowds(0.9, 0.1)[1:]},
    "enough boxes": {"classes": [one_class("cat", boxes=30)]},
    "weak perhaps": {"classes": [one_class("cat", ap=0.5, AP_low=0.1, AP_high=0.9)]},
    "fair scores": {"calibration": calibration(0.1, 0.1)},
    "no scores": {"calibration": {"ece": None, "bins": []}},
    "narrow interval": {"summary": summary(0.97, 0.945, 0.99)},
    "no interval": {"summary": summary(0.97, None, None)},
}


@pytest.mark.parametrize("case", NOT_CALLED_FOR)
def test_no_sentence_comes_without_need(case: str) -> None:
    (advice,) = advise(made_figures(**NOT_CALLED_FOR[case]))  # type: ignore[arg-type]
    assert advice.text.startswith("Nothing to mend")


def test_the_most_costly_error_comes_first_with_what_it_costs() -> None:
    types = [{"name": "background", "count": 1200, "gain": 0.03}, {"name": "duplicate", "count": 7, "gain": 0.2}]
    first, second = advise(made_figures(errors={"AP50": 0.5, "types": types}))
    assert first.text.endswith("These 7 errors cost 20.0 points of AP50.")
    assert second.text.endswith("These 1,200 errors cost 3.0 points of AP50.")


def test_the_keys_that_are_named_are_in_the_schema() -> None:
    named = {key for _, _, _, keys in CALLED_FOR.values() if keys for key in keys.split(", ")}
    assert len(named) > 10
    for key in named:
        part: Any = Config
        for name in key.split("."):
            assert name in part.model_fields, key
            part = part.model_fields[name].annotation


# ---- pictures


@pytest.fixture
def annotations(tmp_path: Path) -> Annotations:
    """Pictures 10 to 15, of 64 x 96 and 96 x 64."""
    data = draw_coco(tmp_path, n=6)
    return load_coco(data["annotations"], data["path"])


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))))


def test_a_crop_shows_the_finding_where_it_is(annotations: Annotations, tmp_path: Path) -> None:
    picture = np.full((1000, 1500, 3), 40, np.uint8)
    picture[600:700, 900:1100] = (250, 250, 0)
    Image.fromarray(picture).save(annotations.path(0))
    thing = finding(image_id=10, truth=[900.0, 600.0, 200.0, 100.0], box=[900.0, 600.0, 100.0, 100.0])
    (shown,) = build_gallery([thing], annotations)
    # 2.4 x 200 = 480 wide around (1000, 650): from (760, 410), at full size
    assert shown["size"] == (480, 480)
    assert shown["truth"] == [140, 190, 200, 100]
    assert shown["box"] == [140, 190, 100, 100]
    crop = np.asarray(decoded(shown["picture"]))
    assert crop.shape == (480, 480, 3)
    assert crop[200:280, 150:330, 0].min() > 200
    assert crop[:170].max() < 80


def test_a_large_finding_is_scaled_down_with_its_boxes(annotations: Annotations) -> None:
    Image.new("RGB", (2000, 1000)).save(annotations.path(0))
    (shown,) = build_gallery([finding(image_id=10, truth=[0.0, 0.0, 2000.0, 1000.0], box=None)], annotations)
    assert shown["size"] == decoded(shown["picture"]).size == (480, 240)
    assert shown["truth"] == [0, 0, 480, 240]
    assert shown["box"] is None


@pytest.mark.parametrize(
    "box", [[-50.0, -50.0, 10.0, 10.0], [5000.0, 9000.0, 10.0, 10.0], [3.0, 3.0, 0.0, 0.0], [0.0, 0.0, 9e9, 1.0]]
)
def test_a_box_may_lie_anywhere(annotations: Annotations, box: list[float]) -> None:
    (shown,) = build_gallery([finding(image_id=10, box=box, truth=None)], annotations)
    assert decoded(shown["picture"]).size == tuple(shown["size"])
    assert min(shown["size"]) >= 1


def test_a_picture_that_cannot_be_read_is_named(annotations: Annotations) -> None:
    annotations.path(0).write_bytes(b"no picture")
    annotations.path(1).unlink()
    first, second, third = build_gallery([finding(image_id=n) for n in (10, 11, 12)], annotations)
    assert (first["problem"], "picture" in first) == ("not an image, or one of unknown format", False)
    assert (second["problem"], "picture" in second) == ("no such file", False)
    assert "problem" not in third and third["picture"].startswith("data:image/jpeg;base64,")


def test_findings_are_chosen_in_turns_of_kinds_the_worst_of_each_first(annotations: Annotations) -> None:
    many = [finding("class", 10, score=1 - n / 1000) for n in range(200)]
    few = [finding("missed", 11, name=str(n), predicted=None, box=None) for n in range(5)]
    shown = build_gallery(many + few, annotations)
    assert [entry["kind"] for entry in shown] == ["class"] * (MOST - 5) + ["missed"] * 5
    assert [entry["score"] for entry in shown[: MOST - 5]] == [1 - n / 1000 for n in range(MOST - 5)]
    assert [entry["class"] for entry in shown[MOST - 5 :]] == ["0", "1", "2", "3", "4"]


def test_only_pictures_that_are_shown_are_read_and_each_once(annotations: Annotations, monkeypatch: pytest.MonkeyPatch) -> None:
    read, real = [], gallery.read_image
    monkeypatch.setattr(gallery, "read_image", lambda path: read.append(path.name) or real(path))
    findings = [finding("class", 10 + n % 2) for n in range(MOST)] + [finding("class", 12)]
    build_gallery(findings, annotations)
    assert sorted(read) == ["0.png", "1.png"]


def test_pictures_of_noise_stay_within_the_budget(annotations: Annotations) -> None:
    """Noise at quality 75 takes some 250 KB for 480 x 480 pixels: 96 of them would be 24 MB."""
    noise = np.random.default_rng(0).integers(0, 256, (480, 480, 3), dtype=np.uint8)
    Image.fromarray(noise).save(annotations.path(0))
    findings = [finding(image_id=10, box=[40.0, 40.0, 400.0, 400.0], truth=None)] * MOST
    shown = build_gallery(findings, annotations)
    assert len(shown) == MOST
    assert sum(len(entry["picture"]) for entry in shown) <= gallery.LARGEST


# ---- the page


class Page(HTMLParser):
    """The elements, and what stands in the scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.current = ""
        self.attributes: list[tuple[str, str | None]] = []
        self.inside: dict[str, list[str]] = {"script": [], "style": [], "title": [], "h1": []}
        self.feed(text)
        self.data = json.loads(self.inside["script"][0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.current = tag
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        if self.current in self.inside:
            self.inside[self.current].append(data)

    def handle_endtag(self, tag: str) -> None:
        self.current = ""


HOSTILE = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\"'`${alert(1)}",
    "<!--<script>",
    "two\nlines",
    "\u202egnp.exe",
    "$style",
    "]]>&lt;\u2028\x00",
)


def hostile_figures() -> dict[str, Any]:
    figures = made_figures(HOSTILE)
    figures["about"] |= {"title": HOSTILE[0] + HOSTILE[5], "data": HOSTILE[1]}
    figures["classes"][0]["boxes"] = 3  # so that advice names it
    figures["findings"] = [finding("class", 1, name, HOSTILE[0], file_name=name) for name in HOSTILE]
    return figures


def test_names_cannot_leave_their_place() -> None:
    figures = hostile_figures()
    page = Page(render_page(figures, [entry | {"problem": HOSTILE[0]} for entry in figures["findings"]]))
    plain = Page(render_page(made_figures(), []))
    assert page.tags == plain.tags  # no name has become an element
    assert page.attributes == plain.attributes
    names = [row["name"] for row in page.data["classes"]]
    assert names[:5] == list(HOSTILE[:5])  # as they are
    assert names[5] == r"\u202egnp.exe"  # in letters, or it would turn the text after it
    assert [entry["file_name"] for entry in page.data["gallery"]][6:] == list(HOSTILE[6:])
    assert HOSTILE[0] in page.data["advice"][0]["text"]
    assert page.inside["title"] == page.inside["h1"] == ["</script><script>alert(1)</script>gnp.exe: evaluation"]


def test_the_policy_lets_this_script_run_and_nothing_else() -> None:
    page = Page(render_page(made_figures(), []))
    (policy,) = (value for name, value in page.attributes if name == "content" and "default-src" in str(value))
    for kind in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(page.inside[kind][-1].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in str(policy)
    assert str(policy).startswith("default-src 'none'; img-src data:; ")
    assert "unsafe" not in str(policy)


def test_the_page_needs_nothing_from_elsewhere() -> None:
    text = render_page(made_figures(), [])
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.search(r"\b(fetch|XMLHttpRequest|import|eval|innerHTML|document\.write)\b\s*\(?", asset("page.js"))
    assert not {"link", "iframe", "object", "embed"} & set(Page(text).tags)


def test_it_stays_under_10_mb_whatever_comes() -> None:
    """3,000 classes with names of 5,000 letters, full pictures, curves and confusions for all."""
    names = tuple(f"{n:04d}" + "ß" * 5000 for n in range(3000))
    figures = made_figures(names)
    ragged = np.random.default_rng(0).random(101).tolist()
    figures["curves"]["by_class"] = dict.fromkeys(names, dict.fromkeys(("precision", "score", "f1", "p", "r"), ragged))
    figures["confusion"]["counts"] = np.full((3001, 3001), 10**6).tolist()
    pictures = [
        finding(name=names[n], predicted=names[n], file_name="ü" * 1000, picture="x" * 62_500, size=(9, 9)) for n in range(96)
    ]
    text = render_page(figures, pictures)
    assert len(text.encode()) < 10_000_000
    data = Page(text).data
    assert (len(data["classes"]), data["classes_left_out"]) == (1000, 2000)
    assert (len(data["confusion"]["counts"]), data["confusion"]["left_out"]) == (21, 2980)
    assert len(data["gallery"][0]["picture"]) == 62_500


def test_many_classes_keep_the_frequent_and_the_confused() -> None:
    names = tuple(f"c{n}" for n in range(1200))
    figures = made_figures(names)
    for n, row in enumerate(figures["classes"]):
        row["boxes"] = n + 50
    counts = np.array(figures["confusion"]["counts"])
    counts[30, 1100] = 9
    counts[30, -1] = 5
    figures["confusion"]["counts"] = counts.tolist()
    data = Page(render_page(figures, [])).data
    assert [row["name"] for row in data["classes"]] == list(names[200:])  # in their order
    assert [curve is not None for curve in data["class_curves"]] == [False] * 900 + [True] * 100
    shown = data["confusion"]["names"]
    assert len(shown) == 20 and {"c30", "c1100"} <= set(shown)
    row = data["confusion"]["counts"][shown.index("c30")]
    assert (row[shown.index("c30")], row[shown.index("c1100")], row[-1]) == (97, 9, 5)
    assert data["confusion"]["totals"][shown.index("c30")] == 97 + 9 + 5


def test_the_assets_are_installed_with_the_package() -> None:
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    assert settings["tool"]["setuptools"]["package-data"]["retinanet.report"] == ["assets/*"]
    assert {file.name for file in (REPOSITORY / "retinanet/report/assets").iterdir()} == {"page.html", "page.css", "page.js"}


# ---- the whole report, and the tool


def rows_of(annotations: Annotations, shift: float = 1.0) -> np.ndarray:
    """Every box found but the first, each moved a little."""
    images = annotations.image_ids[annotations.image_of][1:]
    ids = np.array([category.id for category in annotations.categories])[annotations.labels][1:]
    boxes = annotations.coco_boxes[1:] + np.array([shift, 0, 0, 0])
    return np.column_stack([images, boxes, np.linspace(0.9, 0.3, len(images)), ids])


def content_of(folder: Path) -> Any:
    return Page((folder / "index.html").read_text(encoding="utf-8")).data


def test_a_report_of_real_figures(annotations: Annotations, tmp_path: Path) -> None:
    rows = rows_of(annotations)
    metrics = evaluate_rows(rows, annotations)
    write_report(rows, annotations, metrics, tmp_path / "report", "shapes")
    data = content_of(tmp_path / "report")
    assert data["summary"][0]["value"] == pytest.approx(metrics["AP"], abs=1e-4)
    assert data["about"]["title"] == "shapes"
    (missed,) = data["gallery"]  # the first box; all others overlap by more than a half
    assert missed["kind"] == "missed" and missed["picture"].startswith("data:")
    assert {file.name for file in (tmp_path / "report").iterdir()} >= {
        "index.html",
        "figures.json",
        "classes.csv",
        "matches.npz",
    }


@pytest.mark.parametrize("case", ["no detections", "no truth", "neither"])
def test_a_report_of_nothing(case: str, annotations: Annotations, tmp_path: Path) -> None:
    rows = rows_of(annotations)
    if case != "no detections":
        annotations = annotations.select(np.arange(len(annotations)), np.zeros(len(annotations.labels), bool))
    if case != "no truth":
        rows = rows[:0]
    write_report(rows, annotations, evaluate_rows(rows, annotations), tmp_path, case)
    (advice,) = content_of(tmp_path)["advice"]
    assert advice["text"].startswith("Nothing was found" if case == "no detections" else "The data has no boxes")


def evaluate(run: Run, annotations: Annotations, folder: Path, *options: object) -> Outcome:
    names = {int(i): annotations.file_names[n] for n, i in enumerate(annotations.image_ids)}
    rows = rows_of(annotations)
    write_entries(folder / "found.json", to_entries(rows, names, {c.id: c.name for c in annotations.categories}))
    return run("evaluate", "--detections", "found.json", "--annotations", annotations.source, "--report", "report", *options)


def test_the_tool_writes_it_for_results_of_any_detector(run_tool: Run, annotations: Annotations, tmp_path: Path) -> None:
    outcome = evaluate(run_tool, annotations, tmp_path)
    assert outcome.code == 0, outcome.err
    assert f"the pictures of 1 of 1 findings could not be read from {tmp_path}" in outcome.out
    assert "written: report/index.html" in outcome.out
    (missed,) = content_of(tmp_path / "report")["gallery"]
    assert missed["problem"] == "no such file"
    outcome = evaluate(run_tool, annotations, tmp_path, "--images", annotations.image_dir)
    assert "could not be read" not in outcome.out
    assert content_of(tmp_path / "report")["gallery"][0]["picture"]
    (tmp_path / "report").rename(tmp_path / "before")
    (tmp_path / "report").touch()
    outcome = evaluate(run_tool, annotations, tmp_path)
    assert "report: File exists" in mistake(outcome)
    assert "AP" not in outcome.out  # found before anything is measured
    assert "--images goes with --detections" in mistake(run_tool("evaluate", "--weights", "a.pt", "--images", "b"))


# ---- TensorBoard


def test_validation_shows_its_precision_and_recall(annotations: Annotations, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    from retinanet.telemetry import Telemetry
    from retinanet.validation import Validation

    rows = rows_of(annotations)[:4]
    rows[:, 5] = 0.9, 0.8, 0.7, 0.2
    rows[2, 1] += 500  # finds nothing
    telemetry = Telemetry(tmp_path / "run", enabled=True, start_step=0, total_steps=1, batch_size=1)
    Validation(Config(), annotations, annotations.categories, tmp_path)._show_curve(rows, 1, telemetry)
    telemetry.close()
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    (event,) = events.Tensors("val/precision_recall")
    hits, wrong, _, missed, precision, recall = make_ndarray(event.tensor_proto)  # [6, 101], thresholds 0, 0.01 .. 1
    assert (hits[0], wrong[0], missed[0]) == (3, 1, 12 - 3)
    assert (hits[50], wrong[50], missed[50]) == (2, 1, 12 - 2)
    assert precision[50] == pytest.approx(2 / 3)
    assert recall[50] == pytest.approx(2 / 12)
    assert (hits[95], wrong[95], precision[95]) == (0, 0, 0)
