"""Measure this project beside its peers: torchvision's RetinaNet and its reference pipeline, and pycocotools.

measures: what is timed, each variant in turns with the peer's, and compared in its results
  inference      pictures to detections             --size 640 800    short side in pixels; --backbone resnet18
  training       an optimizer step                  the same
  loss           matching, losses, gradients        --size, in pixels
  postprocess    raw outputs to detections          --size, in pixels
  data           JPEG files to the model's input    --size, in pixels
  evaluation     COCO's twelve numbers              --size, in images
  startup        the tools' command lines
  all            the above: about 21 minutes on two cores
apart
  memory         of loading processes               --size, in annotations
  time_to_ap     CONFIG [key.sub=value ...]         two trainings until --target; the peer's --limit times as long at most
  accuracy       CONFIG [key.sub=value ...]         two trainings to their end, --rounds times, each with another seed

examples:
  python tools/benchmark.py loss
  python tools/benchmark.py all --json runs/benchmark.json --chart runs/benchmark.png
  python tools/benchmark.py inference --backbone resnet18 --size 512 --rounds 20 --device cuda
  python tools/benchmark.py time_to_ap configs/demo.yaml --target 0.8
"""

import argparse
import sys
from pathlib import Path

from retinanet.errors import UserError, command_line

PARTS = ("inference", "training", "loss", "postprocess", "data", "evaluation", "startup")
TRAININGS = ("time_to_ap", "accuracy")


@command_line
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("name", metavar="NAME", choices=(*PARTS, "all", "memory", *TRAININGS), help="one of the measures above")
    add("settings", nargs="*", metavar="CONFIG key.sub=value", help="of time_to_ap and accuracy only")
    add("--json", type=Path, metavar="FILE", help="write all figures, with hardware, versions and command")
    add("--chart", type=Path, metavar="FILE.png", help="draw the ratios")
    add("--rounds", type=int, help="calls of each variant; default: the measure's, 3 to 15")
    add("--size", type=int, nargs="+", default=[], metavar="N", help="see above; default: the measure's")
    add("--backbone", help="of inference, training and startup; default: the measure's")
    add("--device", default="cpu", help="cpu, cuda, cuda:1 ... (cpu)")
    add("--target", type=float, default=0.85, help="the AP50, 0..1, of time_to_ap (0.85)")
    add("--limit", type=float, default=5.0, help="of the peer in time_to_ap, times our time (5)")
    add("--no-memory", action="store_true", help="skip peak memory, which takes a process for each variant")
    args = parser.parse_intermixed_args()
    check(args)

    sys.path.insert(0, str(Path(__file__).parent.parent))  # benchmarks/ is not installed
    from benchmarks.machine import header
    from benchmarks.report import header_text, table, write_chart, write_report
    from benchmarks.timing import Options, Row, measured, measured_apart
    from retinanet.precision import choose_device

    options = Options(
        rounds=args.rounds,
        device=str(choose_device(args.device)),
        sizes=tuple(args.size),
        backbone=args.backbone,
        memory=not args.no_memory,
        config=args.settings[0] if args.settings else None,
        overrides=tuple(args.settings[1:]),
        target=args.target,
        limit=args.limit,
    )
    head = header(options.device)
    rows: list[Row] = []
    for name in PARTS if args.name == "all" else (args.name,):
        rows += measured_apart(name, options) if args.name == "all" else measured(name, options)
        if args.json is not None:
            write_report(args.json, head, rows)  # after each, so that an interruption costs one measure
    print(f"\n{header_text(head)}\n\n{table(rows)}")
    if args.chart is not None:
        write_chart(args.chart, rows)
    for file in filter(None, (args.json, args.chart)):
        print(f"written: {file}")
    return 0


def check(args: argparse.Namespace) -> None:
    """Raises `UserError` for what does not go together, before anything is measured."""
    from retinanet.config import ModelConfig, load_config

    known = ModelConfig.model_json_schema()["properties"]["backbone"]["enum"]
    if args.backbone is not None and args.backbone not in known:
        raise UserError(f"--backbone {args.backbone}: expected one of {', '.join(known)}")
    if args.device.partition(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"--device {args.device}: expected cpu, cuda, cuda:1 ...")
    if (args.name in TRAININGS) != bool(args.settings):
        raise UserError(f"{' and '.join(TRAININGS)} need a CONFIG, and no other measure takes one")
    if any("=" not in text for text in args.settings[1:]):
        raise UserError(f"expected CONFIG, then key.sub=value, got {' '.join(args.settings)}")
    if args.name == "all" and args.size:
        raise UserError("--size means something else in each measure: run them one by one, not all")
    rounds = 1 if args.rounds is None else args.rounds
    for option, values, least in (("--rounds", [rounds], 1), ("--size", args.size, 32 if args.name in PARTS[:5] else 1)):
        if any(value < least for value in values):
            raise UserError(f"{option} must be at least {least}, got {' '.join(map(str, values))}")
    if not 0 < args.target <= 1:
        raise UserError(f"--target is an AP50 above 0 and at most 1, got {args.target:g}")
    if not args.limit >= 1:
        raise UserError(f"--limit is at least 1, the time that we take, got {args.limit:g}")
    if args.chart is not None and args.chart.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UserError(f"--chart {args.chart}: the name of a chart ends in .png, .svg or .pdf")
    if args.settings:
        load_config(args.settings[0], args.settings[1:])


if __name__ == "__main__":
    main()
