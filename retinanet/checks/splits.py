"""What is wrong between pictures and between the splits of a data set: what comes twice, and classes that do not agree."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from retinanet.checks.pictures import Pictures
from retinanet.data.annotations import Annotations
from retinanet.data.faults import Fault
from retinanet.data.files import exists
from retinanet.data.images import EXTENSIONS
from retinanet.data.yolo import CLASS_FILES, label_file

BITS = 6  # of the 64 of a difference hash that may differ
GREYS = 4.0  # mean difference of thumbnails, brightness apart
AT_ONCE = 128  # pictures compared with all others: for 100,000 of these, 50 MB


def repeated_pictures(pictures: Pictures, split_of: np.ndarray) -> list[tuple[int, int, bool]]:
    """Pictures that come twice, as (first, later, identical), each later one once; `split_of` [I] numbers their splits.

    Identical files have the same bytes. Near-identical pictures have difference hashes (is a grey of the thumbnail darker
    than its neighbour?) and thumbnails that hardly differ: another size or compression, the next frame of a film.
    """
    readable = np.flatnonzero(pictures.sizes[:, 0] > 0)
    _, first, inverse = np.unique(pictures.digests[readable], return_index=True, return_inverse=True)
    first_of = readable[first[inverse.reshape(-1)]]
    found = {later: (one, True) for one, later in zip(first_of.tolist(), readable.tolist(), strict=True) if one != later}

    rows = readable[first_of == readable]
    greys = pictures.thumbnails[rows].astype(np.int16)  # [N, 8, 9]
    signs = np.where(greys[:, :, 1:] > greys[:, :, :-1], 1, -1).reshape(-1, 64).astype(np.float32)
    for start in range(0, len(rows), AT_ONCE):
        alike = signs[start : start + AT_ONCE] @ signs.T >= 64 - 2 * BITS  # a bit that differs takes 2 from the product
        for b, others in enumerate(alike, start=start):
            a = np.flatnonzero(others[:b])
            difference = greys[a] - greys[b]
            difference = np.abs(difference - difference.mean(axis=(1, 2), keepdims=True)).mean(axis=(1, 2))
            a = rows[a[difference <= GREYS]]
            across = a[split_of[a] != split_of[rows[b]]]
            if len(a):
                found[int(rows[b])] = int(across[0] if len(across) else a[0]), False
    return [(one, later, identical) for later, (one, identical) in sorted(found.items())]


def picture_findings(splits: Mapping[str, Annotations], pictures: Mapping[str, Pictures]) -> Iterator[tuple[str, Fault]]:
    """Pictures that come twice, in a split or in two, each with the split of the later one."""
    everything = Pictures(*(np.concatenate([getattr(p, f) for p in pictures.values()]) for f in Pictures.__annotations__))
    places = [(name, index) for name, data in splits.items() for index in range(len(data))]
    split_of = np.repeat(np.arange(len(splits)), [len(data) for data in splits.values()])
    for one, later, identical in repeated_pictures(everything, split_of):
        (first, first_index), (name, index) = places[one], places[later]
        kind = f"{'' if identical else 'near-'}identical images{'' if name == first else ' across splits'}"
        message = f"{'is' if identical else 'looks like'} {splits[first].path(first_index)} of {first}"
        yield name, Fault(kind, str(splits[name].path(index)), None, message)


def name_findings(data: Annotations, listed: set[Path]) -> Iterator[Fault]:
    """Pictures that are named twice, or lie in the folder and are not in `listed`; and YOLO's labels without a picture.

    What is found is added to `listed`, so that it is found once.
    """
    seen: dict[Path, int] = {}
    for index, number in enumerate(data.image_ids.tolist()):
        path = data.path(index)
        if seen.setdefault(path, number) != number:
            yield Fault("duplicate file name", str(path), None, f"image ids {seen[path]} and {number}")
    for path in sorted(data.image_dir.rglob("*")):
        if path.suffix.lower() in EXTENSIONS and path not in listed:
            listed.add(path)
            yield Fault("unlisted image", str(path), None, f"not in {data.source}, nor in another split's")
    labels = {file for path in listed if exists(file := label_file(path))}
    for path in sorted({file for folder in {label.parent for label in labels} for file in folder.glob("*.txt")} - labels):
        if path.name not in map(os.path.basename, CLASS_FILES):
            listed.add(path)
            yield Fault("label file without image", str(path), None, "no picture has its name")


def class_findings(splits: Mapping[str, Annotations]) -> Iterator[tuple[str, Fault]]:
    """Classes that only some splits list, or have boxes of; each against the first split."""
    counts = {
        name: dict(zip([category.name for category in data.categories], data.counts().tolist(), strict=True))
        for name, data in splits.items()
    }
    first, *others = splits
    for name in others:
        for one, other in ((first, name), (name, first)):
            for category, count in counts[one].items():
                if category not in counts[other]:
                    message = f"class {category} is listed in {one}, not in {other}"
                    yield name, Fault("classes differ", splits[other].source, None, message)
                elif count and not counts[other][category]:
                    message = f"class {category} has {count} boxes in {one}, none in {other}"
                    yield name, Fault("class missing in a split", splits[other].source, None, message)
