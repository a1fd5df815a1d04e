"""Find what is wrong with a data set before training on it: files, pictures, boxes, classes, splits, and what anchors reach.

examples:
  python tools/check_dataset.py configs/finetune.yaml                       the splits of a config, at its resolution
  python tools/check_dataset.py datasets/mine/data.yaml input.short_edge=640     a data set in any format that is read
  python tools/check_dataset.py photos/ data.train.annotations=instances.json    one whose annotations lie elsewhere
  python tools/check_dataset.py configs/finetune.yaml --show look --json findings.json
  python tools/check_dataset.py configs/finetune.yaml --fix clip --out mended    writes COCO files without the faults

Exit code 0: fit to train; 1: there are errors; 2: a mistake on the command line, or a file that cannot be read at all.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retinanet.errors import UserError, command_line

if TYPE_CHECKING:
    from retinanet.checks.check import Check
    from retinanet.config import Config

PICTURES, SHEET = 100, 12  # the worst, of which --show draws so many, and puts so many on one page


@command_line
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="CONFIG|PATH", help="a config's YAML file; or a data set's folder or file")
    parser.add_argument("settings", nargs="*", metavar="key.sub=value", help="settings, as in training")
    parser.add_argument("--fix", choices=["clip", "drop"], help="write a mended copy: clip boxes at the border, or drop them")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where --fix writes; must be empty or not exist")
    parser.add_argument("--show", type=Path, metavar="DIR", help="pictures, worst first: green boxes have an anchor, red none")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all findings and numbers")
    parser.add_argument("--named", type=int, default=5, metavar="N", help="findings named of each kind (default: 5)")
    args = parser.parse_intermixed_args()
    if (args.fix is None) != (args.out is None):
        raise UserError("--fix clip|drop and --out DIR go together: the data set itself is never changed")
    for folder in filter(None, (args.out, args.show)):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} exists and is not an empty folder: name another, nothing is overwritten")

    from retinanet.checks.check import check, statistics
    from retinanet.checks.report import report, verdict
    from retinanet.results import write_json

    splits, refused, config = load(args.source, args.settings)
    result = check(splits, refused, config)
    numbers = {name: statistics(data, result.sizes[name], result.coverage[name], config) for name, data in splits.items()}
    print(report(result, numbers, args.named))
    if args.json:
        write_json(args.json, {"fit": not result.count("error"), "findings": result.rows(), "statistics": numbers})
        print(f"written: {args.json}")
    if args.show:
        show(result, args.show)
    if args.fix:
        fix(result, args.fix, args.out)
    print(verdict(result))
    return 1 if result.count("error") else 0


def load(source: str, settings: list[str]) -> tuple[dict[str, Any], dict[str, Any], "Config"]:
    """The splits by name, what their readers refused, and the settings of training."""
    from retinanet.config import load_config
    from retinanet.data.files import YAML, read_yaml
    from retinanet.data.formats import find_dataset, load_dataset
    from retinanet.data.yolo import PARTS

    path = Path(source)
    raw = read_yaml(path) if path.suffix in YAML and path.exists() else {}
    if path.suffix in YAML and "names" not in raw:  # a config; YOLO's data.yaml has the classes' names
        config = load_config(path, settings)
        parts = {name: getattr(config.data, name) for name in PARTS}
    else:
        config = load_config(None, [f"data.train.path={source}", *settings])
        assert config.data.train is not None
        parts = {"data": config.data.train}
        *_, file = find_dataset(config.data.train)
        if file is not None and file.suffix in YAML:
            raw = read_yaml(file)
            parts = {name: config.data.train.model_copy(update={"part": name}) for name in PARTS if raw.get(name)}
    parts = {name: part for name, part in parts.items() if part is not None}
    if not parts:
        raise UserError(f"{source} names no data: it needs data.train.path=...")
    refused: dict[str, Any] = {name: [] for name in parts}
    return {name: load_dataset(part, refused[name]) for name, part in parts.items()}, refused, config


def show(result: "Check", folder: Path) -> None:
    """Draws the worst pictures, and a page of the very worst."""
    from PIL import Image
    from tqdm import tqdm

    from retinanet.checks.report import draw, worst_pictures
    from retinanet.visualize import contact_sheet

    folder.mkdir(parents=True, exist_ok=True)
    chosen = worst_pictures(result)[:PICTURES]
    sheet: list[Any] = []
    for number, (split, index) in enumerate(tqdm(chosen, "drawing", unit="image"), start=1):
        picture = draw(result, split, index)
        Image.fromarray(picture).save(folder / f"{number:03}_{split}_{result.splits[split].path(index).stem}.jpg", quality=90)
        if len(sheet) < SHEET:
            sheet.append(picture)
    if sheet:
        Image.fromarray(contact_sheet(sheet)).save(folder / "sheet.jpg", quality=90)
    print(f"the {len(chosen)} worst pictures and sheet.jpg are in {folder}")


def fix(result: "Check", way: Any, folder: Path) -> None:
    from retinanet.checks.mend import mend
    from retinanet.data.writers import write_coco

    for name, data in result.splits.items():
        mended, done = mend(result, name, way)
        write_coco({name: mended}, folder)
        changes = ", ".join(f"{count} {kind}" for kind, count in sorted(done.items())) or "nothing"
        print(
            f"{name}: mended {changes}; {len(mended)} of {len(data)} images, {len(mended.labels)} of {len(data.labels)} boxes"
        )
        part = "train" if name == "data" else name
        print(f"  use it: data.{part}.path={data.image_dir} data.{part}.annotations={folder / f'{name}.json'}")
    print("these files are COCO JSON with boxes and classes only; other things that the originals hold are not in them")


if __name__ == "__main__":
    main()
