"""Suggest anchors that reach the boxes of a data set, as training would see them, and a larger image or P2 where it takes that.

examples:
  python tools/suggest_anchors.py configs/finetune.yaml --out configs/fitted.yaml       that config with what fits its data
  python tools/suggest_anchors.py configs/finetune.yaml data.train.path=datasets/mine input.short_edge=640
  python tools/suggest_anchors.py datasets/mine/data.yaml                               a data set and the default settings

Prints how many boxes the anchors reach before and after, and the settings as a piece to paste into a config. Searches on a
sample where there are many boxes; the shares printed are of all of them.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retinanet.errors import UserError, command_line

if TYPE_CHECKING:
    from retinanet.config import Config


@command_line
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="CONFIG|PATH", help="a config's YAML file; or a data set's folder or file")
    parser.add_argument("settings", nargs="*", metavar="key.sub=value", help="settings, as in training")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write a whole config, ready for tools/train.py")
    parser.add_argument("--seed", type=int, default=0, help="chooses the boxes to look at where there are many (default: 0)")
    args = parser.parse_intermixed_args()
    if args.out is not None and args.out.exists():
        raise UserError(f"--out {args.out} exists: name another file, nothing is overwritten")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: expected 0 or more")

    import yaml

    from retinanet.anchor_search import suggest
    from retinanet.config import differences, save_config, set_key
    from retinanet.data.formats import load_dataset

    config = load(args.source, args.settings)
    if config.data.train is None:
        raise UserError(f"{args.source} names no training data: it needs data.train.path=...")
    annotations = load_dataset(config.data.train)
    found = suggest(annotations, config.model, config.input, config.loss, seed=args.seed, progress=True)
    print(f"\nas it is, images {config.input.short_edge} x {config.input.long_edge}:\n{found.before.table(annotations)}")
    if not found.changed:
        print(f"\n{found.reason}{'' if args.out is None else f'; {args.out} is not written'}")
        return 0
    fitted = found.apply(config)
    print(f"\nas suggested, images {fitted.input.short_edge} x {fitted.input.long_edge}:\n{found.after.table(annotations)}")
    print(f"\n{found.reason}; about {found.cost:.2g} times the computation:\n")
    piece: dict[str, Any] = {}
    for key, (_, new) in differences(config, fitted).items():
        set_key(piece, key, new)
    print(yaml.safe_dump(piece, sort_keys=False))
    print("A detector trained with other anchors lends its backbone only: train.init_part=backbone.")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        if fitted.train.init_from is not None:
            fitted.train.init_part = "backbone"
        save_config(fitted, args.out)
        print(f"written: {args.out}; train with it: python tools/train.py {args.out}")
    return 0


def load(source: str, settings: list[str]) -> "Config":
    from retinanet.config import load_config
    from retinanet.data.files import YAML, read_yaml

    path = Path(source)
    if path.suffix not in YAML or (path.exists() and "names" in read_yaml(path)):  # YOLO's data.yaml names the classes
        return load_config(None, [f"data.train.path={source}", *settings])
    config = load_config(path, settings)
    if config.output_dir == f"runs/{path.stem}":
        config.output_dir = None  # it follows a config's name, and the fitted one gets another
    return config


if __name__ == "__main__":
    main()
