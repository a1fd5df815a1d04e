"""Finds objects in pictures and videos: draws them and writes detections.json.

examples:
  python tools/predict.py street.jpg                                    with a trained detector from the zoo
  python tools/predict.py street.jpg --weights runs/demo/best.pt
  python tools/predict.py photos/ 'more/*.png' --weights runs/demo/best.pt --score 0.3 --out found
  python tools/predict.py drive.mp4 --every 5                           or webcam:0, until Ctrl-C
  python tools/predict.py aerial.tif --tile 1024 --format json,yolo,crops
  torchrun --nproc_per_node=8 tools/predict.py photos/ --weights runs/demo/best.pt       on many GPUs
docs/prediction.md tells more.
"""

import argparse
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from retinanet.errors import UserError, command_line, did_you_mean

if TYPE_CHECKING:
    import torch

    from retinanet.inputs import Reader
    from retinanet.outputs import Outputs
    from retinanet.predictor import Predictor


@command_line
def main() -> int:
    args = parse_arguments()
    formats = parse_formats(args.format)

    from retinanet.distributed import process_group

    with process_group(args.device) as device:
        return predict(args, formats, device)


def predict(args: argparse.Namespace, formats: list[str], device: "torch.device") -> int:
    from retinanet.distributed import gather_to_main, main_first, say, world_size
    from retinanet.inputs import Reader, find_inputs
    from retinanet.outputs import Outputs
    from retinanet.predictor import Predictor
    from retinanet.weights.zoo import DEFAULT, ZOO

    sources = find_inputs(args.inputs, recursive=args.recursive)
    live = any(source.camera is not None for source in sources)
    batch_size = (1 if live else 8) if args.batch_size is None else args.batch_size
    reader = Reader(sources, batch_size if args.tile is None else min(1, batch_size), every=args.every)
    weights = args.weights or DEFAULT
    if args.weights is None:
        say(f"no --weights given: {DEFAULT} of the zoo, AP {ZOO[DEFAULT].ap} on COCO as {ZOO[DEFAULT].source} says")
    options = {"precision": args.precision, "tile": args.tile, "overlap": args.overlap, "tta": args.tta}
    options |= {"score_threshold": args.score, "device": device if world_size() > 1 else args.device}
    predictor = main_first(lambda: Predictor.load(weights, **options))
    out = args.out or (Path("runs", weights) if weights in ZOO else Path(weights).parent) / "predictions"
    outputs = Outputs(out, predictor.categories, formats=formats, pictures=args.pictures, sheet=args.sheet, inputs=sources)
    say(describe(predictor))
    done, stopped = look(predictor, reader, outputs, batch_size)
    ranks = gather_to_main((done, stopped, reader.unreadable))
    if not ranks:  # the first one tells of all
        return 0
    done, stopped, unreadable = map(sum, zip(*ranks, strict=True))
    if stopped:
        say("stopped" if reader.live else "interrupted: what was found so far is written")
    written = ["pictures"] * args.pictures + ["detections.json" if name == "json" else name for name in formats]
    say(f"{outputs.objects} objects in {done} images; {' and '.join(written)} in {out}")
    if unreadable:
        say(f"{unreadable} of {len(sources)} inputs could not be read, named above")
    return 130 if stopped and not reader.live else int(unreadable > 0)


def look(predictor: "Predictor", reader: "Reader", outputs: "Outputs", batch_size: int) -> tuple[int, int]:
    """At how many pictures this rank looked, and whether Ctrl-C ended it."""
    from tqdm import tqdm

    from retinanet.distributed import is_main, world_size

    done = stopped = 0
    try:
        with tqdm(total=reader.total(), desc="predict", unit="image", disable=not is_main()) as progress:
            for frames in reader:
                found = predictor.stream([frame.image for frame in frames], batch_size)
                for frame, detections in zip(frames, found, strict=True):
                    outputs.add(frame, detections)
                    done += 1
                    progress.update()
    except KeyboardInterrupt:
        stopped = 1
    finally:
        if world_size() > 1:  # torchrun passes Ctrl-C on once more, and the ranks have yet to meet
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        outputs.close()
    return done, stopped


def parse_formats(text: str) -> list[str]:
    from retinanet.outputs import FORMATS

    names = list(filter(None, map(str.strip, text.split(","))))
    for name in names:
        if name not in FORMATS:
            raise UserError(f"--format: there is no '{name}', but {', '.join(FORMATS)}.{did_you_mean(name, FORMATS)}")
    return names


def describe(predictor: "Predictor") -> str:
    """What was decided, in one line."""
    from retinanet.structures import shortened

    limits = [f"{threshold:.3g}" for threshold in predictor.thresholds.tolist()]
    named = [f"{category.name} {limit}" for category, limit in zip(predictor.categories, limits, strict=True)]
    parts = [f"{predictor.device}, {predictor.precision}"]
    parts.append(f"pictures resized to {predictor.input.short_edge}, their longer side to {predictor.input.long_edge} at most")
    if predictor.tiling:
        parts.append(f"in tiles of {predictor.tiling.tile}, overlap {predictor.tiling.overlap:g}")
    parts += ["six looks at each"] * predictor.tta
    return "; ".join([*parts, f"least score {limits[0] if len(set(limits)) == 1 else shortened(named)}"])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="an image, a video, a folder or glob of them, or a camera: webcam:0")
    add("--weights", help="a checkpoint, or a name of the zoo; default: the zoo's, for COCO's 80 classes")
    add("--out", type=Path, help="default: predictions/ beside the checkpoint, or in runs/<name in the zoo>/")
    add("--score", type=float, help="least score shown; default: the best found for each class, else 0.5")
    add("--format", default="json", metavar="F,F", help="json, coco, yolo, voc, csv, crops; several with commas (json)")
    add("--no-pictures", dest="pictures", action="store_false", help="write no pictures and videos with boxes")
    add("--sheet", action="store_true", help="also sheet.jpg: some of the pictures on one page")
    add("--recursive", action="store_true", help="look into folders in folders too")
    add("--every", type=int, default=1, metavar="N", help="look at every Nth frame of videos")
    add("--tile", type=int, help="cut larger pictures into tiles of so many pixels a side")
    add("--overlap", type=float, default=0.2, help="share of a tile's side that neighbours have in common (0.2)")
    add("--tta", action="store_true", help="look six times, mirrored and at three sizes: better, and slower")
    add("--batch-size", type=int, help="images in a forward; default: 8, with a camera 1")
    add("--device", help="cpu, cuda, cuda:1 ...; default: cuda where there is one")
    add("--precision", default="auto", help="auto, fp32, bf16 or fp16; auto: bf16 where the hardware has it (auto)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
