"""What to do next, in words: each sentence follows from figures of the report, and names them."""

from collections.abc import Iterator
from typing import Any, NamedTuple

WORTH = 0.02  # of AP50: what an error type must cost to be spoken of
APART = 0.10  # of AP or AR: so far below the others a class, a size or a crowd is weak
WIDE = 0.05  # of AP: an interval wider than this does not tell two good models apart
FEW = 30  # boxes: of fewer a class's AP is mostly chance
OFTEN = 3  # times that two classes are taken for each other: fewer are chance
MISTRUST = 0.10  # expected calibration error
IDEAL = 0.95  # AP50
SHOWN = 3  # classes or pairs that a sentence names


class Advice(NamedTuple):
    text: str
    figure: str = "errors"  # the section of the page that it comes from
    key: str | None = None  # of the config; several with commas between


BY_ERROR = {  # those whose advice does not depend on other figures
    "localisation": Advice(
        "Boxes in the right place do not fit closely: train longer, take another box loss or more of it, or let ATSS assign.",
        key="train.epochs, loss.box_loss, loss.box_loss_weight, loss.matcher",
    ),
    "both": Advice("Class and place are both wrong: train longer, or fine-tune.", key="train.epochs, train.init_from"),
    "duplicate": Advice("Objects are found twice: suppress boxes at a lower overlap.", key="postprocess.nms_threshold"),
    "background": Advice(
        "Things are seen where nothing is. Look at the 20 surest false alarms: are labels missing there? If not, train with"
        " more pictures like these without objects.", "gallery", "data.drop_empty"
    ),
}  # fmt: skip


def advise(figures: dict[str, Any]) -> list[Advice]:
    """Sentences, the most costly errors first. `figures` as `build_figures` makes them; there is always one at least."""
    ap, ap50 = figures["summary"][:2]
    if not figures["about"]["boxes"]:
        return [Advice("The data has no boxes, so nothing can be measured: are these the right annotations?", "head")]
    if not figures["about"]["detections"]:
        text = "Nothing was found at all: do weights and classes belong to this data? If so, lower the score threshold."
        return [Advice(text, "head", "postprocess.score_threshold")]
    found = [*_errors(figures), *_crowded(figures["by_crowding"]), *_classes(figures["classes"], ap["value"] or 0.0)]
    found += _scores(figures["calibration"])
    if ap["low"] is not None and ap["high"] - ap["low"] > WIDE:
        text = f"AP may as well be {_points(ap['low'])} as {_points(ap['high'])}: to compare models, validate on more pictures."
        found.append(Advice(f"{text} Four times as many halve the interval.", "head", "data.val"))
    if not found and (ap50["value"] or 0) >= IDEAL:
        found = [Advice(f"Nothing to mend: AP50 is {_points(ap50['value'])}, and no kind of error costs two points.", "head")]
    text = "No single cause stands out: more pictures, longer training or a larger backbone are what is left."
    return found or [Advice(text, key="train.epochs, model.backbone")]


def _errors(figures: dict[str, Any]) -> Iterator[Advice]:
    types = [error for error in figures["errors"]["types"] if (error["gain"] or 0) >= WORTH]
    for error in sorted(types, key=lambda error: -error["gain"]):
        if error["name"] == "missed":
            advice = _missed(figures["by_size"])
        elif error["name"] == "class":
            advice = _confused(**figures["confusion"])
        else:
            advice = BY_ERROR[error["name"]]
        gain = f"These {error['count']:,} errors cost {_points(error['gain'])} points of AP50."
        yield advice._replace(text=f"{advice.text} {gain}")


def _missed(by_size: list[dict[str, Any]]) -> Advice:
    """Size is the matter where most of what is not found is small, and larger objects are found better."""
    sizes = [size for size in by_size if size["AR100"] is not None]
    lost = [size["boxes"] * (1 - size["AR100"]) for size in sizes]
    if len(sizes) > 1 and sizes[0]["name"].startswith("small") and lost[0] >= sum(lost) / 2:
        small, best = sizes[0]["AR100"], max(size["AR100"] for size in sizes[1:])
        if small <= best - APART:
            text = f"Most of what is missed is small (AR100 {_points(small)} against {_points(best)} of larger objects):"
            return Advice(f"{text} take a larger input, or add level P2.", "sizes", "input.short_edge, model.anchors.sizes")
    text = "Objects are missed. Look at the worst of them; see with tools/suggest_anchors.py whether anchors reach them, and"
    return Advice(f"{text} train longer, with more pictures of their kind.", "gallery", "model.anchors, train.epochs")


def _confused(names: list[str], counts: list[list[int]], **_: Any) -> Advice:
    pairs = [(counts[a][b] + counts[b][a], names[b], names[a]) for a in range(len(names)) for b in range(a)]
    worst = [f"{a} and {b} ({n} times)" for n, a, b in sorted(pairs, key=lambda pair: -pair[0])[:SHOWN] if n >= OFTEN]
    text = f"Classes are taken for each other{', most often ' if worst else ''}{', '.join(worst)}."
    return Advice(f"{text} Look whether they are labelled alike everywhere, add pictures of both, or join them.", "confusion")


def _crowded(by_crowding: list[dict[str, Any]]) -> Iterator[Advice]:
    groups = [group for group in by_crowding if group["AP50"] is not None]
    if len(groups) > 1 and groups[-1]["AP50"] <= groups[0]["AP50"] - APART:
        first, last = groups[0], groups[-1]
        text = (
            f"AP50 is {_points(last['AP50'])} in pictures with {last['name']}, {_points(first['AP50'])} with {first['name']}."
        )
        keys = "postprocess.nms, postprocess.nms_threshold, postprocess.max_detections"
        yield Advice(f"{text} Neighbours may suppress each other: try soft NMS, or a higher overlap.", "crowding", keys)


def _classes(classes: list[dict[str, Any]], ap: float) -> Iterator[Advice]:
    few = [f"{c['name']} ({c['boxes']})" for c in sorted(classes, key=lambda c: c["boxes"]) if 0 < c["boxes"] < FEW]
    if few:
        text = f"Fewer than {FEW} boxes make figures that are mostly chance: {_named(few)}."
        yield Advice(f"{text} Label more of them; in training, repeat their pictures.", "classes", "data.repeat_threshold")
    known = sorted((c for c in classes if c["boxes"] >= FEW and c["AP"] is not None), key=lambda c: c["AP"])
    at_best = [c["AP"] if c["AP_high"] is None else c["AP_high"] for c in known]
    weak = [f"{c['name']} ({_points(c['AP'])})" for c, best in zip(known, at_best) if best <= ap - APART]
    if weak:
        yield Advice(f"AP lies far below the mean of {_points(ap)} for {_named(weak)}. More pictures of them help.", "classes")
    absent = [c["name"] for c in classes if not c["boxes"]]
    if absent:
        yield Advice(f"Nothing is known of classes without a box in this data: {_named(absent)}.", "classes")


def _scores(calibration: dict[str, Any]) -> Iterator[Advice]:
    if (calibration["ece"] or 0) > MISTRUST:
        bins = [b for b in calibration["bins"] if b["count"]]
        worst = max(bins, key=lambda b: b["count"] * abs(b["confidence"] - b["precision"]))
        text = f"Scores are no chances: of {worst['count']:,} that are {worst['low']:.1f} to {worst['high']:.1f},"
        text += f" {_points(worst['precision'])} % are right. Use each class's best score; tools/evaluate.py --save-thresholds"
        yield Advice(f"{text} keeps them.", "calibration")


def _points(value: float) -> str:
    """As everywhere in the project's tables: 0..1 as 0..100."""
    return f"{100 * value:.1f}"


def _named(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
