"""Write a checkpoint as an ONNX file, and compare the file with the checkpoint; and an int8 twin that is faster on CPUs.

examples:
  python tools/export.py --weights runs/demo/best.pt --out demo.onnx                   one image of one size, raw outputs
  python tools/export.py --weights runs/demo/best.pt --out demo.onnx --dynamic --nms   any batch and size, final detections
  python tools/export.py --weights runs/demo/best.pt --out demo.onnx --dynamic --int8 --calibrate photos/   and demo.int8.onnx
"""

import argparse
import random
import re
from pathlib import Path
from typing import TYPE_CHECKING

from retinanet.errors import UserError, command_line

if TYPE_CHECKING:
    from retinanet.config import Config
    from retinanet.data.annotations import Annotations

LARGE_LOSS = 1.0  # AP points


@command_line
def main() -> int:
    args = parse_arguments()

    from retinanet.onnx.export import check_exporter, export_onnx
    from retinanet.onnx.runtime import load_onnx
    from retinanet.weights.zoo import load_weights

    check_exporter()  # what is missing is said before a download
    checkpoint = load_weights(args.weights)
    pictures = find_pictures(args.calibrate, args.pictures) if args.int8 else []
    truth = evaluation_data(args.data, checkpoint.config) if args.int8 else None
    differences = export_onnx(checkpoint, args.out, nms=args.nms, dynamic=args.dynamic, size=args.size and tuple(args.size))
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB")
    session = load_onnx(args.out, "cpu", runtime="onnxruntime").session
    for kind, value in [("in", v) for v in session.get_inputs()] + [("out", v) for v in session.get_outputs()]:
        print(f"  {kind:3} {value.name:12} {value.type:15} {value.shape}")
    print("compared with the checkpoint on drawn images; the largest differences:", end=" ")
    print(", ".join(f"{name} {value:.2g}" for name, value in differences.items()))
    if args.int8:
        write_int8(args.out, pictures, truth)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--weights", required=True, help="a checkpoint, or a name of the zoo")
    add("--out", type=Path, required=True, help="the file to write, ending in .onnx")
    add("--nms", action="store_true", help="put out final detections: thresholds, decoding and NMS inside")
    add("--dynamic", action="store_true", help="leave batch, height and width open (multiples of 32)")
    add("--size", type=int, nargs=2, metavar=("H", "W"), help="without --dynamic; default: the config's edges")
    add("--int8", action="store_true", help="also write NAME.int8.onnx, with int8 convolutions")
    add("--calibrate", nargs="+", metavar="PHOTOS", help="pictures like those to come: folders, globs, data sets' files")
    add("--pictures", type=int, default=200, metavar="N", help="so many of them, drawn at random (200)")
    add("--data", type=Path, help="a data set or config to measure int8's loss of AP on; default: the checkpoint's data.val")
    args = parser.parse_args()
    if args.out.suffix.lower() != ".onnx":
        raise UserError(f"--out {args.out}: the name of an ONNX file ends in .onnx")
    if args.int8 and not args.calibrate:
        raise UserError("--int8 needs pictures like those to come, to learn its number ranges from: --calibrate PHOTOS")
    if not args.int8 and (args.calibrate or args.data):
        raise UserError("--calibrate and --data go with --int8")
    return args


def find_pictures(arguments: list[str], most: int) -> list[Path]:
    """`most` of the pictures that folders (with what is in them), globs and data sets' files name."""
    from retinanet.data.formats import FORMAT_OF, load_path
    from retinanet.inputs import find_inputs
    from retinanet.onnx.quantize import LEAST

    found: list[Path] = []
    for text in arguments:
        if Path(text).suffix.lower() in FORMAT_OF:
            annotations = load_path(text)
            found += [annotations.path(n) for n in range(len(annotations))]
        else:
            found += [Path(source.name) for source in find_inputs([text], recursive=True) if not source.is_video]
    chosen = random.Random(0).sample(found, min(most, len(found)))
    if len(chosen) < LEAST:
        raise UserError(f"--calibrate: {len(chosen)} pictures are too few: give {LEAST} or more, better 200")
    print(f"calibrating on {len(chosen)} of {len(found)} pictures")
    return chosen


def evaluation_data(given: Path | None, config: "Config") -> "Annotations | None":
    from retinanet.config import load_config
    from retinanet.data.formats import load_path
    from retinanet.run_setup import load_splits

    if given is None:
        return load_splits(config, "val")[0] if config.data.val and Path(config.data.val.path).exists() else None
    is_yaml = given.suffix in (".yaml", ".yml") and given.is_file()
    if not is_yaml or re.search(r"^names:", given.read_text(encoding="utf-8"), re.MULTILINE):  # YOLO's data.yaml
        return load_path(given)
    return load_splits(load_config(given), "val")[0]


def write_int8(source: Path, pictures: list[Path], truth: "Annotations | None") -> None:
    from retinanet.onnx.quantize import quantize_onnx, save_ap_loss

    target = source.with_suffix(".int8.onnx")
    quantize_onnx(source, target, pictures)
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB")
    if truth is None or not truth.counts().sum():
        print("note: what int8 costs in AP was not measured: name a data set with boxes, --data")
        return
    fp32, int8 = (average_precision(path, truth) for path in (source, target))
    loss = 100 * (fp32 - int8)
    save_ap_loss(target, loss)
    advice = ": calibrate on more pictures, and on such as those to come, or take precision bf16 instead"
    print(f"warning: int8 costs {loss:.2f} AP points{advice}" if loss > LARGE_LOSS else f"int8 costs {loss:.2f} AP points")


def average_precision(path: Path, truth: "Annotations") -> float:
    """Prints AP and AP50, and returns AP in 0..1."""
    import numpy as np
    from tqdm import tqdm

    from retinanet.evaluation.coco import evaluate_rows
    from retinanet.evaluation.run import map_categories
    from retinanet.inputs import Reader, Source
    from retinanet.onnx.runtime import load_onnx
    from retinanet.predictor import Predictor
    from retinanet.results import COLUMNS, to_rows

    model = load_onnx(path, "cpu")
    predictor = Predictor.from_onnx(model, score_threshold=model.header.postprocess.score_threshold)
    ids, rows = map_categories(predictor.categories, truth), [np.empty((0, COLUMNS))]
    reader = Reader([Source(str(truth.path(n))) for n in range(len(truth))])
    for frames in tqdm(reader, path.name, -(-len(truth) // reader.size), unit="batch", leave=False):
        # One at a time: in a batch, padding to the largest changes what GroupNorm does, by up to a point of AP.
        for frame, found in zip(frames, predictor.stream((frame.image for frame in frames), batch_size=1)):
            rows.append(to_rows(int(truth.image_ids[frame.image_id - 1]), found, ids))
    metrics = evaluate_rows(np.concatenate(rows), truth)
    print(f"{path}: AP {100 * metrics['AP']:.2f}, AP50 {100 * metrics['AP50']:.2f} on {truth.source}")
    return metrics["AP"]


if __name__ == "__main__":
    main()
