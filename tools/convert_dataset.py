"""Turn a data set of COCO, Pascal VOC, YOLO or CSV form into any of the others, and split it.

examples:
  python tools/convert_dataset.py annotations.json --to yolo --out mine_yolo
  python tools/convert_dataset.py VOC2007 --to coco --out mine_coco --split 0.8,0.1,0.1
  python tools/convert_dataset.py photos --annotations boxes.json --to csv --out mine_csv --images none
  python tools/convert_dataset.py labelled --classes names.txt --to voc --out mine_voc

SRC is a folder, or its JSON, CSV or data.yaml file, or a list of images; of a data.yaml all parts are taken together.
docs/data.md shows the formats and what each cannot hold.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from retinanet.errors import command_line

if TYPE_CHECKING:
    from retinanet.data.annotations import Annotations

FORMATS = ("coco", "voc", "yolo", "csv")
PARTS = ("train", "val", "test")


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SRC", help="the data set")
    parser.add_argument("--to", choices=FORMATS, required=True, help="what to write")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="where; a new or empty folder")
    parser.add_argument("--from", dest="origin", choices=FORMATS, help="what SRC is; default: told by its files")
    parser.add_argument("--annotations", metavar="FILE", help="the JSON, CSV or list of images that goes with SRC, a folder")
    parser.add_argument("--classes", metavar="FILE", help="yolo, csv: the names of the classes")
    parser.add_argument("--one-based", action="store_true", help="voc: coordinates count from 1; xmin and ymin get 1 less")
    parser.add_argument(
        "--split", type=read_shares, metavar="A,B[,C]", help="shares of train, val and test, e.g. 0.8,0.1,0.1, by class"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split (default: %(default)s)")
    parser.add_argument(
        "--images",
        choices=("link", "copy", "none"),
        default="link",
        help="hard-link the images, which takes no space (default; copies between disks), copy them, or write labels only",
    )
    convert(parser.parse_args())


def read_shares(text: str) -> dict[str, float]:
    """`0.8,0.1,0.1` -> the shares by part."""
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    if not (2 <= len(shares) <= len(PARTS) and min(shares) > 0 and abs(sum(shares) - 1) < 1e-6):  # nor is NaN
        raise argparse.ArgumentTypeError(f"expected two or three shares that sum to 1, e.g. 0.8,0.1,0.1, got {text!r}")
    return dict(zip(PARTS, shares, strict=False))


def convert(args: argparse.Namespace) -> None:
    from retinanet.data.formats import load_path
    from retinanet.data.splits import split_images
    from retinanet.data.writers import write_dataset

    data = load_path(
        args.source, args.annotations, format=args.origin or "auto", classes=args.classes, one_based=args.one_based
    )
    parts = {"": data}
    if args.split:
        parts = {name: data.select(images) for name, images in split_images(data, args.split, args.seed).items()}
        print(split_table(parts))
    lost = write_dataset(parts, args.to, args.out, args.images)
    print(f"{args.out}: {len(data)} images with {len(data.labels)} annotations of {len(data.categories)} classes, {args.to}")
    for what, times in lost.items():
        print(f"  {args.to} cannot hold: {what} ({times})")


def split_table(parts: "Mapping[str, Annotations]") -> str:
    """Images, and objects of each class, in each part, with the part's share."""
    names = [category.name for category in next(iter(parts.values())).categories]
    rows = zip(*([len(data), *data.counts().tolist()] for data in parts.values()), strict=True)
    width = max(map(len, [*names, "images"]))
    lines = [" " * width + "".join(f"{part:>16}" for part in parts)]
    for name, row in zip(["images", *names], rows, strict=True):
        lines.append(f"{name:<{width}}" + "".join(f"{n:>9}{n / max(sum(row), 1):>7.1%}" for n in row))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
