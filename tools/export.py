"""Write a checkpoint as an ONNX file, and compare the file with the checkpoint.

examples:
  python tools/export.py --weights runs/demo/best.pt --out demo.onnx                   one image of one size, raw outputs
  python tools/export.py --weights runs/demo/best.pt --out demo.onnx --dynamic --nms   any batch and size, final detections
  python tools/predict.py street.jpg --weights demo.onnx                               the file in use
"""

import argparse
from pathlib import Path

from retinanet.errors import UserError, command_line


@command_line
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="a checkpoint, or a name of the zoo")
    parser.add_argument("--out", type=Path, required=True, help="the file to write, ending in .onnx")
    parser.add_argument("--nms", action="store_true", help="put out final detections: thresholds, decoding and NMS inside")
    parser.add_argument("--dynamic", action="store_true", help="leave batch, height and width open (multiples of 32)")
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("H", "W"), help="without --dynamic; default: the config's short and long edge"
    )
    args = parser.parse_args()
    if args.out.suffix.lower() != ".onnx":
        raise UserError(f"--out {args.out}: the name of an ONNX file ends in .onnx")

    from retinanet.onnx.export import check_exporter, export_onnx
    from retinanet.onnx.runtime import load_onnx
    from retinanet.weights.zoo import load_weights

    check_exporter()  # what is missing is said before a download
    checkpoint = load_weights(args.weights)
    size = tuple(args.size) if args.size else None
    differences = export_onnx(checkpoint, args.out, nms=args.nms, dynamic=args.dynamic, size=size)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB")
    model = load_onnx(args.out, "cpu")
    for kind, values in (("in", model.session.get_inputs()), ("out", model.session.get_outputs())):
        for value in values:
            print(f"  {kind:3} {value.name:12} {value.type:15} {value.shape}")
    measured = ", ".join(f"{name} {value:.2g}" for name, value in differences.items())
    print(f"compared with the checkpoint on drawn images; the largest differences: {measured}")
    return 0


if __name__ == "__main__":
    main()
