"""An evaluation's report on disk: the page, and the figures that it shows for other programs."""

from pathlib import Path
from typing import Any

import numpy as np

from retinanet.data.annotations import Annotations
from retinanet.distributed import say
from retinanet.report.figures import build_figures, write_figures
from retinanet.report.gallery import build_gallery
from retinanet.report.matches import Seen, find_matches, write_matches
from retinanet.report.page import render_page


def write_report(rows: np.ndarray, annotations: Annotations, metrics: dict[str, Any], folder: Path, title: str) -> None:
    """Writes index.html, the files of `write_figures`, and matches.npz, which `tools/compare_runs.py` reads, into `folder`.

    `rows` are detections [D, 7] (see `retinanet.results`), `metrics` what `evaluate_rows` said of them.
    """
    strange = int(((rows[:, 5] < 0) | (rows[:, 5] > 1)).sum())
    if strange:
        say(f"note: {strange} of {len(rows)} scores lie outside 0..1: calibration and what is drawn over the score mean little")
    seen = Seen(rows, annotations)
    matches, boxes = find_matches(seen)
    figures = build_figures(seen, matches, boxes, metrics, title=title)
    folder.mkdir(parents=True, exist_ok=True)
    write_figures(figures, folder)
    write_matches(folder / "matches.npz", matches)
    gallery = build_gallery(figures["findings"], annotations)
    (folder / "index.html").write_text(render_page(figures, gallery), encoding="utf-8", errors="replace")
    lost = sum("problem" in finding for finding in gallery)
    if lost:
        say(f"note: the pictures of {lost} of {len(gallery)} findings could not be read from {annotations.image_dir}")
    say(f"written: {folder / 'index.html'}")
