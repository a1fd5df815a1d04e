"""Turn a RetinaNet of torchvision, detectron2 or mmdet into a checkpoint of this project, or one of ours into torchvision's.

examples:
  python tools/convert_weights.py --list                                               trained detectors to be had by name
  python tools/convert_weights.py model_final_5bd44e.pkl --from detectron2 --out weights/r50.pt
  python tools/convert_weights.py mine.pth --from torchvision --classes names.txt --out weights/mine.pt
  python tools/convert_weights.py runs/mine/best.pt --to torchvision --out mine_torchvision.pth

Nothing in the files is executed.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from retinanet.errors import UserError, command_line

if TYPE_CHECKING:
    from torch import Tensor

SOURCES = ("torchvision", "detectron2", "mmdet")


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", metavar="SRC", help="the file to convert; with --to also a name from --list")
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--from", dest="origin", choices=SOURCES, help="whose file SRC is; it becomes our checkpoint")
    way.add_argument("--to", choices=["torchvision"], help="whose state dict SRC, a checkpoint of ours, becomes")
    way.add_argument("--list", action="store_true", help="show the detectors that can be named instead of a file")
    parser.add_argument("--out", type=Path, metavar="FILE", help="what is written")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="names of the classes, one a line; default: COCO's")
    parser.add_argument(
        "--bn-eps", type=float, help="the BatchNorm epsilon; default: 0 for torchvision's published version 1, else 1e-5"
    )
    args = parser.parse_args()
    if not args.list and (args.source is None or args.out is None):
        parser.error("SRC and --out are needed")
    if args.origin is None and (args.classes or args.bn_eps is not None):
        parser.error("--classes and --bn-eps go with --from")
    if args.list:
        list_zoo()
    elif Path(args.source).resolve() == args.out.resolve():
        raise UserError(f"--out {args.out} is the file to convert: name another")
    elif args.to:
        export(args.source, args.out)
    else:
        convert(args.source, args.origin, args.out, args.classes, args.bn_eps)


def list_zoo() -> None:
    from retinanet.weights.zoo import ZOO

    print(f"{'name':<30} {'AP':>4}  {'published by':<12}  {'MB':>3}  licence")
    for name, entry in ZOO.items():
        print(f"{name:<30} {entry.ap:>4}  {entry.source:<12}  {entry.megabytes:>3}  {entry.licence}")
    print("AP is that of boxes on COCO val2017 as published, not measured by this project. See docs/weights.md.")
    print("ImageNet's backbones: model.backbone_weights=imagenet or imagenet_v2, for every model.backbone.")


def convert(source: str, origin: str, out: Path, classes: Path | None, bn_eps: float | None) -> None:
    from retinanet.checkpoint import save_checkpoint
    from retinanet.weights.zoo import import_file

    names = read_names(classes) if classes else None
    imported = import_file(source, origin, classes=names, bn_eps=bn_eps)
    checkpoint = imported.checkpoint()
    save_checkpoint(out, checkpoint)
    model = checkpoint.config.model
    print(imported.table())
    if origin == "mmdet":
        print("note: taken for a detector of PyTorch's style; one of mmdet's *_caffe_* configs would find nonsense")
    print(f"{out}: {model.backbone}, {model.num_classes} classes, BatchNorm epsilon {model.norm_eps:g}")


def read_names(path: Path) -> list[str]:
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--classes {path} cannot be read: {error}") from None
    twice = {name for name in names if names.count(name) > 1}
    if not names or twice:
        raise UserError(f"--classes {path}: {f'{min(twice)!r} stands there twice' if twice else 'no names in it'}")
    return names


def export(source: str, out: Path) -> None:
    from retinanet.weights.torchvision import export_torchvision_state
    from retinanet.weights.zoo import load_weights

    checkpoint = load_weights(source)
    save_state(out, export_torchvision_state(checkpoint))
    model, slots = checkpoint.config.model, max(category.id for category in checkpoint.categories) + 1
    builders = {("resnet50", "p5", "none"): "retinanet_resnet50_fpn", ("resnet50", "c5", "group"): "retinanet_resnet50_fpn_v2"}
    form = (model.backbone, model.p6_from, model.head_norm)
    if form in builders:
        print(f"{out}: for {builders[form]}(weights=None, weights_backbone=None, num_classes={slots})")
    else:
        print(f"{out}: for a RetinaNet with {form[0]}, P6 from {form[1].upper()}, head norm {form[2]}, num_classes={slots}")
    if model.norm_eps != 1e-5:
        print(f"then set eps = {model.norm_eps:g} in the BatchNorm of its backbone")


def save_state(out: Path, state: "dict[str, Tensor]") -> None:
    import torch

    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    try:
        torch.save(state, partial)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
