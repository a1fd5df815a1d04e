"""Find objects in pictures: draws them and writes detections.json.

examples:
  python tools/predict.py street.jpg                                    with a trained detector from the zoo
  python tools/predict.py street.jpg --weights runs/demo/best.pt
  python tools/predict.py photos/ 'more/*.png' --weights runs/demo/best.pt --score 0.3 --out found
"""

import argparse
import glob
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from retinanet.errors import UserError, command_line

if TYPE_CHECKING:
    import numpy as np

    from retinanet.predictor import Predictor
    from retinanet.structures import Detections

SHEET = 12  # pictures on the page that --sheet writes
SHEET_NAME = "sheet.jpg"


@command_line
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="an image, a folder of images, or a glob")
    parser.add_argument("--weights", help="a checkpoint, or a name of the zoo; default: the zoo's, for COCO's 80 classes")
    parser.add_argument("--out", type=Path, help="default: predictions/ beside the checkpoint, or in runs/<name in the zoo>/")
    parser.add_argument("--score", type=float, help="least score shown; default: the best found for each class, else 0.5")
    parser.add_argument("--sheet", action="store_true", help="also sheet.jpg: some of the pictures on one page")
    parser.add_argument("--batch-size", type=int, default=8, help="images in a forward (default: 8)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ...; default: cuda where there is one")
    args = parser.parse_args()

    import numpy as np
    from tqdm import tqdm

    from retinanet.predictor import Predictor
    from retinanet.weights.zoo import DEFAULT, ZOO

    files = find_images(args.inputs)
    weights = args.weights or DEFAULT
    if args.weights is None:
        print(f"no --weights given: {DEFAULT} of the zoo, AP {ZOO[DEFAULT].ap} on COCO as {ZOO[DEFAULT].source} says")
    predictor = Predictor.load(weights, device=args.device, score_threshold=args.score)
    out = args.out or (Path("runs", weights) if weights in ZOO else Path(weights).parent) / "predictions"
    out.mkdir(parents=True, exist_ok=True)
    reader = Reader(files)
    results, shown = [], list[np.ndarray]()
    taken = {(out / SHEET_NAME).resolve(), *(file.resolve() for file in files)}  # --out may be the inputs' own folder
    for detections in tqdm(predictor.stream(reader, args.batch_size), total=len(files), desc="predict", unit="image"):
        number, file, image = reader.waiting.popleft()
        picture = save_picture(image, detections, out, file, taken)
        if args.sheet and len(shown) < SHEET and len(detections):
            shown.append(picture)
        results.append((number, file, detections))
    write_results(results, out, predictor)
    if shown:
        save_sheet(shown, out)
    found = sum(len(detections) for *_, detections in results)
    print(f"{found} objects in {len(results)} images; pictures and detections.json in {out}")
    if reader.unreadable:
        print(f"{reader.unreadable} of {len(files)} inputs could not be read, named above")
    return 1 if reader.unreadable else 0


def find_images(inputs: list[str]) -> list[Path]:
    """The images that the arguments name, each once. Raises `UserError` for an argument without any."""
    from retinanet.data.images import EXTENSIONS

    files: dict[Path, None] = {}
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in EXTENSIONS)
        else:
            found = [path] if path.exists() else sorted(map(Path, glob.glob(text, recursive=True)))  # noqa: PTH207
        if not found:
            raise UserError(f"{text}: no such image, and no folder or glob with images")
        files |= dict.fromkeys(found)
    return list(files)


class Reader:
    """Reads files one after the other; each image waits here until its detections come. Unreadable ones are named."""

    def __init__(self, files: list[Path]) -> None:
        self.files, self.unreadable = files, 0
        self.waiting: deque[tuple[int, Path, np.ndarray]] = deque()

    def __iter__(self) -> "Iterator[np.ndarray]":
        from retinanet.data.images import UnreadableImageError, read_image

        for number, file in enumerate(self.files, start=1):
            try:
                image = read_image(file)
            except UnreadableImageError as error:
                self.unreadable += 1
                print(f"warning: left out: {error}", flush=True)
                continue
            self.waiting.append((number, file, image))
            yield image


def save_picture(image: "np.ndarray", detections: "Detections", out: Path, file: Path, taken: set[Path]) -> "np.ndarray":
    """Writes the picture under its own name, numbered where `taken` has that already, and returns it."""
    from PIL import Image

    from retinanet.visualize import draw_detections

    name, n = f"{file.stem}.jpg", 2
    while (out / name).resolve() in taken:
        name, n = f"{file.stem}_{n}.jpg", n + 1
    taken.add((out / name).resolve())
    picture = draw_detections(image, detections)
    Image.fromarray(picture).save(out / name, quality=92)
    return picture


def save_sheet(pictures: "list[np.ndarray]", out: Path) -> None:
    from PIL import Image

    from retinanet.visualize import contact_sheet

    Image.fromarray(contact_sheet(pictures)).save(out / SHEET_NAME, quality=90)


def write_results(results: "list[tuple[int, Path, Detections]]", out: Path, predictor: "Predictor") -> None:
    import numpy as np

    from retinanet.results import COLUMNS, to_rows, write_detections

    rows = np.concatenate([np.empty((0, COLUMNS)), *(to_rows(n, detections) for n, _, detections in results)])
    file_names = {n: str(file) for n, file, _ in results}
    write_detections(out / "detections.json", rows, file_names, {c.id: c.name for c in predictor.categories})


if __name__ == "__main__":
    main()
