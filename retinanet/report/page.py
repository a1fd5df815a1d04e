"""The report as one HTML file that needs nothing else: no network, no server."""

import base64
import hashlib
import html
import json
import re
from importlib.resources import files
from string import Template
from typing import Any

import numpy as np

from retinanet.report.advice import advise

CLASSES = 1000  # shown in the table, those with the most boxes
CONFUSED = 20  # classes in the confusion matrix, those that are most confused
CURVES = 100  # classes that have curves of their own, those with the most boxes
LONGEST = 200  # characters of a name that are shown
BIDI = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")  # they turn the text around that follows


def render_page(figures: dict[str, Any], gallery: list[dict[str, Any]]) -> str:
    """The page of `build_figures`'s figures and `build_gallery`'s pictures. Under 10 MB whatever they hold."""
    content = _content(figures, gallery)
    title = f"{content['about']['title']}: evaluation"
    style, script = asset("page.css"), asset("page.js")
    return Template(asset("page.html")).substitute(
        title=html.escape(BIDI.sub("", title)),
        policy=f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'",
        style=style,
        script=script,
        data=embedded(content),
    )


def asset(name: str) -> str:
    return files("retinanet.report").joinpath("assets", name).read_text(encoding="utf-8")


def embedded(content: Any) -> str:
    """JSON that may stand in a script element: no name in it can end the element, or turn the text around it."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = BIDI.sub(lambda found: f"\\\\u{ord(found[0]):04x}", text)  # shown as \u202e
    return text.encode(errors="replace").decode().replace("<", "\\u003c")


def _digest(source: str) -> str:
    """What the page's policy lets run: this and nothing else, whatever else may get into the page."""
    return f"sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}"


def _content(figures: dict[str, Any], gallery: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures as page.js reads them: classes by number, numbers rounded, long lists cut (`classes_left_out`)."""
    every, curves = figures["classes"], figures["curves"] | {"by_class": None}
    order = sorted(range(len(every)), key=lambda k: -every[k]["boxes"])  # stable
    kept, own = sorted(order[:CLASSES]), set(order[:CURVES])
    by_class = [figures["curves"]["by_class"][every[k]["name"]] if k in own else None for k in kept]
    parts = ("about", "summary", "errors", "calibration", "by_size", "by_crowding")
    short = _short({part: figures[part] for part in parts} | {
        "classes": every,
        "confusion": _most_confused(figures["confusion"]),
        "curves": curves,
        "class_curves": by_class,
        "findings": len(figures["findings"]),
        "gallery": gallery,
    })  # fmt: skip
    rows = short["classes"]
    advice = [advice._asdict() for advice in advise(short)]
    return short | {"advice": advice, "classes": [rows[k] for k in kept], "classes_left_out": len(every) - len(kept)}


def _most_confused(confusion: dict[str, Any]) -> dict[str, Any]:
    """The part with the classes that take part in most confusions, and the background."""
    counts, names = np.array(confusion["counts"], np.int64), confusion["names"]
    between = counts[:-1, :-1] - np.diag(np.diag(counts)[:-1])
    chosen = sorted(np.argsort(-(between.sum(0) + between.sum(1)), kind="stable")[:CONFUSED].tolist())
    kept = [*chosen, len(names)]
    part = {"names": [names[k] for k in chosen], "counts": counts[np.ix_(kept, kept)].tolist()}
    return confusion | part | {"left_out": len(names) - len(chosen), "totals": counts.sum(1)[kept].tolist()}


def _short(value: Any) -> Any:
    """The same with floats of 4 digits and strings of at most `LONGEST` characters, pictures apart."""
    if isinstance(value, dict):
        return {key: entry if key == "picture" else _short(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_short(entry) for entry in value]
    if isinstance(value, str) and len(value) > LONGEST:
        return f"{value[:LONGEST]}…"
    return round(value, 4) if isinstance(value, float) else value
