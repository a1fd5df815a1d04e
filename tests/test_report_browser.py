"""The report's page in a browser: Chromium, the system's or the one that CHROME names; skipped where there is none."""

import os
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_figures import finding, made_figures, one_class
from PIL import Image

from retinanet.data.annotations import Annotations, ImageRow
from retinanet.report.gallery import build_gallery
from retinanet.report.page import render_page
from retinanet.structures import Category

DASH = "\N{EN DASH}"
WIDTHS = {"phone": 375, "desktop": 1280}
HOSTILE = (
    "<script>hit=1</script>",
    '"><img src=x onerror=hit=1>',
    "</script><script>hit=1</script>",
    "\u202egnp.x",
    "ordinary",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright, of requirements-dev.txt")
    names = os.environ.get("CHROME"), "chromium", "chromium-browser", "google-chrome"
    chrome = next((path for path in map(shutil.which, filter(None, names)) if path), None)
    if chrome is None:
        pytest.skip("needs Chromium or Chrome; CHROME may name it")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chrome, args=["--no-sandbox"])
        yield started
        started.close()


Open = Callable[..., Any]


@pytest.fixture
def open_page(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """A function that opens the page of some figures from its file, offline; whatever goes wrong in it fails the test."""
    context, wrong = browser.new_context(offline=True), []

    def start(figures: dict[str, Any], gallery: list[dict[str, Any]], width: int = 1280, scheme: str = "light") -> Any:
        file = tmp_path / "index.html"
        file.write_text(render_page(figures, gallery), encoding="utf-8")
        page = context.new_page()
        page.set_viewport_size({"width": width, "height": 800})
        page.emulate_media(color_scheme=scheme)
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or wrong.append(request.url))
        page.goto(file.as_uri())
        page.wait_for_selector("#precision > *")
        return page

    yield start
    context.close()
    assert wrong == []


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Ten confusions of cat and dog, two misses of a hen and a false alarm without a picture."""
    folder = tmp_path_factory.mktemp("pictures")
    Image.fromarray(np.full((300, 400, 3), 90, np.uint8)).save(folder / "1.png")
    images = [ImageRow(1, "1.png", 300, 400), ImageRow(2, "2.png", 300, 400)]
    annotations = Annotations.pack("made", folder, [Category(1, "cat")], images, [])
    missed = [finding("missed", 1, "hen", None, box=None, score=None, iou=None)] * 2
    return build_gallery(
        [finding()] * 10 + missed + [finding("background", 2, "dog", "dog", truth=None, iou=None)], annotations
    )


def three_classes(**parts: Any) -> dict[str, Any]:
    """Boxes 7, 300, 40; AP none, 0.4, 0.9."""
    rows = [one_class("cat", 7, None), one_class("dog", 300, 0.4), one_class("hen", 40, 0.9)]
    return made_figures(classes=rows, findings=[finding()] * 20, **parts)


def column(page: Any, number: int) -> list[str]:
    """The cells of the table, number 0 being the classes."""
    return [text.split("\n")[0] for text in page.locator(f"#classes tbody tr > :nth-child({number + 1})").all_inner_texts()]


def test_the_table_is_sorted_by_mouse_and_keyboard(open_page: Open) -> None:
    page = open_page(three_classes(), [])
    assert column(page, 0) == ["dog", "hen", "cat"]  # by AP at first, the weakest first; none last
    boxes = page.locator("#classes th", has_text="Boxes")
    boxes.locator("button").click()
    assert (column(page, 0), column(page, 1)) == (["dog", "hen", "cat"], ["300", "40", "7"])
    assert boxes.get_attribute("aria-sort") == "descending"
    page.keyboard.press("Enter")  # the focus stayed
    assert column(page, 1) == ["7", "40", "300"]
    assert boxes.get_attribute("aria-sort") == "ascending"
    page.locator("#classes th button", has_text="Class").click()
    assert column(page, 0) == ["cat", "dog", "hen"]
    page.locator("[data-column=AP]").click()
    assert column(page, 2) == ["90.0", "40.0", DASH]  # what is not known is last in both directions
    page.locator("[data-column=AP]").click()
    assert column(page, 2) == ["40.0", "90.0", DASH]
    assert page.locator("#classes [aria-sort]").count() == 1


def test_the_table_is_filtered_by_name(open_page: Open) -> None:
    page = open_page(three_classes(), [])
    page.fill("#filter", " DO ")
    assert column(page, 0) == ["dog"]
    assert page.inner_text("#filtered") == "1 of 3 shown"
    page.fill("#filter", "zebra")
    assert page.inner_text("#class-table") == "No class has such a name."
    page.fill("#filter", "")
    assert len(column(page, 0)) == 3


def test_a_class_is_chosen_for_curves_and_gallery(open_page: Open, gallery: list[dict[str, Any]]) -> None:
    figures = three_classes()
    figures["curves"]["by_class"]["dog"] = {**figures["curves"]["by_class"]["dog"], "precision": [0.25] * 101}
    page = open_page(figures, gallery)
    assert page.locator("#findings figure").count() == 8 + 2 + 1  # 8 of the ten confusions
    page.locator("#classes tbody button", has_text="dog").click()
    assert page.inner_text("#precision .readout") == "recall 50: dog 25.0, all classes 95.0"  # 1 - 0.1 * 0.5
    assert page.locator("#findings figure[data-kind=missed]").count() == 0
    assert page.locator("#findings figure").count() == 8 + 1  # as truth or as prediction
    assert page.locator("#choice option:checked").inner_text() == "dog"
    page.select_option("#choice select", label="hen")
    assert page.locator("#findings figure").count() == 2
    page.select_option("#choice select", label="cat")  # by the figures it has no truth
    page.locator("tr.chosen td").first.click()  # chosen again is chosen no more
    assert page.locator("#findings figure").count() == 11
    assert page.locator("tr.chosen").count() == 0


def test_a_class_without_boxes_has_words_in_place_of_curves(open_page: Open) -> None:
    figures = three_classes()
    figures["classes"][0]["boxes"] = 0
    page = open_page(figures, [])
    page.select_option("#choice select", label="cat")
    assert page.inner_text("#precision") == "The data has no box of this class, so there is nothing to measure."
    assert page.inner_text("#scores") == page.inner_text("#precision")


def test_findings_are_filtered_by_kind_and_enlarged(open_page: Open, gallery: list[dict[str, Any]]) -> None:
    page = open_page(three_classes(), gallery)
    assert page.locator("#kinds button").all_inner_texts()[:4] == [
        "All (13)",
        "Missed (2)",
        "False alarms (1)",
        "Wrong class (10)",
    ]
    page.click("text=2 more: wrong class")
    assert page.locator("#findings figure").count() == 10
    assert page.locator("#kinds [aria-pressed=true]").all_inner_texts() == ["Wrong class (10)"]
    page.locator("#findings figure button").nth(9).click()
    assert page.locator("#enlarged").is_visible()
    assert page.inner_text("#enlarged-caption").startswith("10 of 10: cat taken for dog")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#enlarged-caption").startswith("1 of 10: ")
    page.click("#previous")
    assert page.inner_text("#enlarged-caption").startswith("10 of 10: ")
    page.keyboard.press("Escape")
    assert page.locator("#enlarged").is_hidden()
    page.locator("#findings figure button").first.click()
    page.click("#close")
    assert page.locator("#enlarged").is_hidden()


def test_boxes_are_drawn_over_the_picture(open_page: Open, gallery: list[dict[str, Any]]) -> None:
    """Boxes of 20 x 16 at (10, 12) and (12, 12): the crop of 96 pixels around (21, 20) begins at the picture's corner."""
    page = open_page(three_classes(), gallery)
    card = page.locator("#findings figure[data-kind=class]").first
    assert card.locator("image").evaluate("image => image.getAttribute('href').slice(0, 23)") == "data:image/jpeg;base64,"
    for kind, x in (("prediction", "10"), ("truth", "12")):
        box = card.locator(f"rect.{kind}:not(.shade)")
        assert [box.get_attribute(name) for name in ("x", "y", "width", "height")] == [x, "12", "20", "16"]
    dashes = [
        card.locator(f"rect.{kind}:not(.shade)").evaluate("box => getComputedStyle(box).strokeDasharray")
        for kind in ("truth", "prediction")
    ]
    assert dashes[0] != "none" and dashes[1] == "none"
    assert card.inner_text().split("\n") == ["cat taken for dog", "score 0.80, IoU 0.80", "1.png"]
    alarm = page.locator("#findings figure[data-kind=background]")
    assert "No picture: no such file" in alarm.inner_text()
    assert "1 pictures could not be read" in page.inner_text("#gallery-note") or "could not be read" in page.inner_text(
        "#gallery-note"
    )


def test_charts_are_read_by_mouse_and_keyboard(open_page: Open) -> None:
    page = open_page(made_figures(), [])
    chart = page.locator("#precision svg[tabindex]")
    box = chart.bounding_box()
    chart.hover(position={"x": 46, "y": 50})  # where recall is 0
    assert (
        page.inner_text("#precision .readout") == f"recall 0: IoU 0.50 100.0, IoU 0.75 100.0, mean of IoU 0.50{DASH}0.95 100.0"
    )
    chart.hover(position={"x": box["width"] - 19, "y": 50})
    assert page.inner_text("#precision .readout").startswith("recall 100: IoU 0.50 90.0")
    chart.focus()
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#precision .readout").startswith("recall 99: IoU 0.50 90.1")
    page.locator("#matrix g").nth(5).hover()  # the second row's second
    assert page.inner_text("#matrix .readout") == "dog taken for dog: 97 (100.0 % of the row)"
    page.locator("#reliability rect").nth(7).hover()
    assert page.inner_text("#reliability .readout") == f"score 0.70{DASH}0.80: 32 predictions, mean score 0.75, 72.0 % right"


def test_the_theme_follows_the_system_and_the_switch(open_page: Open) -> None:
    page = open_page(made_figures(), [], scheme="dark")
    brightness = "Number(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])"
    assert page.evaluate(brightness) < 60
    assert page.inner_text("#theme") == "Light theme"
    page.click("#theme")
    assert page.evaluate(brightness) > 200
    assert page.inner_text("#theme") == "Dark theme"


CUT = """() => [...document.querySelectorAll('h1,h2,h3,p,li,dt,dd,td,th,figcaption,button,label,output,strong')]
  .filter((e) => e.clientWidth && e.scrollWidth > e.clientWidth + 1).map((e) => e.outerHTML.slice(0, 200))"""
OUTSIDE = """() => [...document.querySelectorAll('.chart svg text')].filter((e) => {
  const text = e.getBoundingClientRect(), whole = e.closest('svg').getBoundingClientRect();
  const outside = [whole.left - text.left, text.right - whole.right, whole.top - text.top, text.bottom - whole.bottom];
  return Math.max(...outside) > 1;
}).map((e) => e.textContent)"""
FAINT = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const linear = (v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const ground = (e) => {
    const color = rgb(getComputedStyle(e).backgroundColor);
    return color[3] === 0 ? ground(e.parentElement) : color;
  };
  const contrast = (e) => {
    const [bright, dark] = [light(rgb(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y - x);
    return (bright + 0.05) / (dark + 0.05);
  };
  const speaks = (e) => e.offsetParent && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
  const all = [...document.querySelectorAll("body *")];
  return all.filter((e) => speaks(e) && contrast(e) < 4.5).map((e) => e.outerHTML.slice(0, 120));
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", WIDTHS)
def test_nothing_is_cut_or_faint(device: str, scheme: str, open_page: Open, gallery: list[dict[str, Any]]) -> None:
    """Also with long names; contrast by WCAG's AA, 4.5."""
    names = ("cat", "W" * 60, "a class with a rather long name", *(f"c{n}" for n in range(22)))
    figures = made_figures(names, findings=[finding()] * 20)
    figures["about"] |= {"title": "a" * 90, "data": "/data/" + "very_long_name" * 12}
    figures["classes"][1]["boxes"] = 1_000_000
    long = [*gallery, finding("class", 1, names[1], names[1], file_name="b" * 120 + ".jpg", problem="no such file")]
    page = open_page(figures, long, width=WIDTHS[device], scheme=scheme)
    root = "document.scrollingElement"
    assert page.evaluate(f"{root}.scrollWidth <= {root}.clientWidth")
    assert page.evaluate(CUT) == []
    assert page.evaluate(OUTSIDE) == []
    assert page.evaluate(FAINT) == []


def test_charts_fit_again_when_the_window_changes(open_page: Open) -> None:
    page = open_page(made_figures(), [], width=1280)
    page.set_viewport_size({"width": 375, "height": 800})
    width = "document.querySelector('#precision svg[tabindex]').getAttribute('width') - 0"
    for _ in range(100):  # `wait_for_function` would evaluate text in the page, which its policy forbids
        if page.evaluate(width) < 375:
            break
        page.wait_for_timeout(100)
    assert page.evaluate(width) < 375
    assert page.evaluate(OUTSIDE) == []


def test_names_of_strangers_do_nothing(open_page: Open) -> None:
    figures = made_figures(HOSTILE, findings=[finding()])
    figures["about"] |= {"title": HOSTILE[2], "data": HOSTILE[1]}
    figures["classes"][0]["boxes"] = 2
    page = open_page(figures, [finding("class", 1, name, name, file_name=name, problem=name) for name in HOSTILE])
    for number, name in enumerate(HOSTILE):
        page.select_option("#choice select", index=number + 1)
        assert page.locator("#findings figure").count() == 1
        assert name.replace("\u202e", "\\u202e") in page.inner_text("#findings figcaption")
    assert page.evaluate("typeof hit") == "undefined"
    assert page.locator("img, script").count() == 2  # the data and the program
    assert page.inner_text("h1") == f"{HOSTILE[2]}: evaluation"


def test_what_got_into_the_page_would_not_run(browser: Any, tmp_path: Path) -> None:
    """Were the escaping wrong, the policy would still stand."""
    file = tmp_path / "index.html"
    file.write_text(
        render_page(made_figures(), []).replace("</main>", "<script>hit=1</script><img src=x onerror='hit=1'></main>")
    )
    page = browser.new_page()
    page.goto(file.as_uri())
    page.wait_for_selector("#precision > *")
    assert page.evaluate("typeof hit") == "undefined"
    page.close()


@pytest.mark.parametrize("case", ["no detections", "no truth"])
def test_nothing_to_show_is_said(case: str, open_page: Open) -> None:
    figures = made_figures(("cat",), by_size=[], by_crowding=[], calibration={"ece": None, "bins": []})
    figures["about"] |= {"detections": 0} | ({"boxes": 0} if case == "no truth" else {})
    figures["classes"] = [one_class("cat", 9 if case == "no detections" else 0, None)]
    figures["summary"] = [{**row, "value": None, "low": None, "high": None} for row in figures["summary"]]
    figures["errors"] = {"AP50": None, "types": [{"name": "missed", "count": 0, "gain": None}]}
    figures["confusion"] |= {"counts": [[0, 0], [0, 0]]}
    page = open_page(figures, [])
    assert page.locator("#main-numbers strong").all_inner_texts() == [DASH] * 3
    for chart in page.locator(".chart").all():
        assert chart.locator("svg").count() == 0
        assert len(chart.inner_text()) > 20
    wanted = "Nothing was found, so there is no curve to draw." if case == "no detections" else "The data has no boxes"
    assert wanted in page.inner_text("#precision")
    assert page.inner_text("#findings") == "There is no such error."


def test_it_is_fit_for_screen_readers(open_page: Open, gallery: list[dict[str, Any]]) -> None:
    page = open_page(three_classes(), gallery)
    levels = [int(tag[1]) for tag in page.evaluate("[...document.querySelectorAll('h1,h2,h3')].map((e) => e.tagName)")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert page.locator("thead th[scope=col]").count() == 9
    assert page.locator("tbody th[scope=row]").count() == 3
    unnamed = "[...document.querySelectorAll('svg:not([aria-hidden])')].filter((e) => !e.getAttribute('aria-label')).length"
    assert page.evaluate(unnamed) == 0
    fields = "[...document.querySelectorAll('input, select')].filter((e) => !e.labels.length).length"
    assert page.evaluate(fields) == 0
    assert page.evaluate("[...document.querySelectorAll('nav a')].every((e) => document.querySelector(e.getAttribute('href')))")
    page.locator("#filter").focus()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
