"""All checks of a data set, in one pass over its pictures."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from retinanet.checks.boxes import box_faults, box_findings, census_findings
from retinanet.checks.kinds import KINDS
from retinanet.checks.pictures import Pictures, look_at_all
from retinanet.checks.splits import class_findings, name_findings, picture_findings
from retinanet.config import Config
from retinanet.coverage import LARGE, NOT_TRAINED, REACHED, SMALL, Coverage, anchor_coverage
from retinanet.data.annotations import Annotations
from retinanet.data.faults import Fault
from retinanet.data.images import resized_size

REACH = 0.95  # a smaller share of boxes that anchors reach is a finding
SIZES = ("small", "medium", "large")  # COCO's, at the training resolution


@dataclass
class Check:
    """What was found in each split, and what is needed to mend it, to count it and to show it."""

    splits: dict[str, Annotations]
    findings: dict[str, list[Fault]]
    sizes: dict[str, np.ndarray]  # [I, 2] (height, width) of the pictures, as annotated where they cannot be read
    readable: dict[str, np.ndarray]  # [I] bool
    faults: dict[str, dict[str, np.ndarray]]  # of boxes: by kind, [A] bool
    coverage: dict[str, Coverage]

    def count(self, severity: str) -> int:
        return sum(KINDS[finding.kind].severity == severity for found in self.findings.values() for finding in found)

    def rows(self) -> list[dict[str, Any]]:
        """Every finding as a JSON object."""
        return [
            {**KINDS[finding.kind]._asdict(), "split": split, **finding._asdict()}
            for split, found in self.findings.items()
            for finding in found
        ]


def check(splits: dict[str, Annotations], refused: Mapping[str, list[Fault]], config: Config) -> Check:
    """Looks at every picture and every box of `splits`; `refused` is what their readers left out."""
    result = Check(splits, {}, {}, {}, {}, {})
    listed = {data.path(index) for data in splits.values() for index in range(len(data))}
    pictures: dict[str, Pictures] = {}
    for name, data in splits.items():
        pictures[name], findings = look_at_all(data, name)
        readable = pictures[name].sizes[:, 0] > 0
        sizes = np.where(readable[:, None], pictures[name].sizes, data.sizes)
        faults = box_faults(data, sizes, config.input)
        measured = replace(data, sizes=sizes)
        coverage = anchor_coverage(measured, config.model, config.input, config.loss, progress=True)
        result.sizes[name], result.readable[name], result.faults[name] = sizes, readable, faults
        result.coverage[name] = coverage
        known = {finding.file for finding in findings}  # YOLO's reader opens the pictures too
        findings += [fault for fault in refused[name] if fault.kind != "unusable entry" or fault.file not in known]
        findings += [
            *name_findings(data, listed),
            *box_findings(data, sizes, faults),
            *census_findings(data, learnt=not result.findings),
        ]
        if coverage.share(REACHED) < REACH:
            message = f"anchors reach {coverage.share(REACHED):.1%} of the boxes with an IoU of {config.loss.foreground_iou}"
            findings.append(Fault("anchors miss boxes", data.source, None, message))
        result.findings[name] = findings
    for split, finding in (*picture_findings(splits, pictures), *class_findings(splits)):
        result.findings[split].append(finding)
    return result


def statistics(data: Annotations, sizes: np.ndarray, coverage: Coverage, config: Config) -> dict[str, Any]:
    """The data set in numbers; sizes are those of training."""
    area = coverage.areas[coverage.kind != NOT_TRAINED]
    edges = config.input.short_edge, config.input.long_edge, config.input.size_rounding
    known = sizes[(sizes > 0).all(axis=1)]
    resized = np.array([resized_size((height, width), *edges) for height, width in known.tolist()]).reshape(-1, 2)
    return {
        "images": len(data),
        "images_without_boxes": int((~data.has_boxes()).sum()),
        "boxes": int((~data.crowd).sum()),
        "crowds": int(data.crowd.sum()),
        "classes": {c.name: count for c, count in zip(data.categories, data.counts().tolist(), strict=True)},
        "box_sizes": dict(zip(SIZES, np.bincount(np.digitize(area, [SMALL, LARGE]), minlength=3).tolist(), strict=True)),
        "image_sizes": _range(known),
        "image_sizes_in_training": _range(resized),
    }


def _range(sizes: np.ndarray) -> list[list[int]]:
    """The least, the median and the largest (height, width) of `sizes` [I, 2], each side by itself; empty if none is known."""
    return np.quantile(sizes, [0, 0.5, 1], axis=0).round().astype(int).tolist() if len(sizes) else []
