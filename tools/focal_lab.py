"""The focal loss looked at: what it costs, where it goes, what it is good for (docs/focal_loss.md).

commands, each with --help:
  curves         loss and gradient by p_t, the probability of what is true (the paper's figure 1)
  distribution   how a detector's loss is spread over its samples (figure 4), its anchors, its hardest negatives
  ablation       trains with many losses, anchors and matchers, and puts them in a table (table 1)

examples:
  python tools/focal_lab.py curves --alpha 0.25 --gamma 0 0.5 2
  python tools/focal_lab.py distribution --weights runs/demo/best.pt --images 100
  python tools/focal_lab.py ablation                                      under an hour on two idle cores; Ctrl-C, and go on
  python tools/focal_lab.py ablation --rows ce focal-2-0.25 --seeds 5
  python tools/focal_lab.py ablation --table-only                         what there is so far
"""

import argparse
import sys
from pathlib import Path

from retinanet.errors import UserError, command_line


@command_line
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = {"curves": curves, "distribution": distribution, "ablation": ablation}
    parser.add_argument("command", choices=commands, help="one of the commands above")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the command")
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent.parent))  # laboratory/ is not installed
    own = argparse.ArgumentParser(prog=f"{parser.prog} {args.command}", description=commands[args.command].__doc__)
    return commands[args.command](own, args.arguments)


def curves(parser: argparse.ArgumentParser, arguments: list[str]) -> int:
    """Loss and gradient by p_t: prints a table, writes curves.csv and curves.png."""
    parser.add_argument("--alpha", type=float, help="weight of the foreground, 0..1; default: no weights, as in figure 1")
    parser.add_argument("--gamma", type=float, nargs="+", default=[0, 0.5, 1, 2, 5], help="default: figure 1's 0 0.5 1 2 5")
    parser.add_argument("--out", type=Path, default=Path("runs/focal_lab/curves"), help="folder (default: %(default)s)")
    args = parser.parse_args(arguments)
    if args.alpha is not None and not 0 < args.alpha < 1:
        raise UserError(f"--alpha {args.alpha:g}: expected more than 0 and less than 1")
    if not all(0 <= gamma <= 100 for gamma in args.gamma):  # NaN is not
        raise UserError(f"--gamma {' '.join(f'{gamma:g}' for gamma in args.gamma)}: expected 0..100")

    from laboratory.curves import curves_chart, curves_table, write_curves

    print(curves_table(args.gamma, args.alpha))
    write_curves(args.out / "curves.csv", args.gamma, args.alpha)
    curves_chart(args.out / "curves.png", args.gamma, args.alpha)
    print(f"written: {args.out / 'curves.csv'} and {args.out / 'curves.png'}")
    return 0


def distribution(parser: argparse.ArgumentParser, arguments: list[str]) -> int:
    """Where the loss of a trained detector comes from: distribution.json and .png, anchors.png, hardest_negatives.jpg."""
    parser.add_argument("settings", nargs="*", metavar="CONFIG key.sub=value", help="a YAML file and settings, all optional")
    parser.add_argument("--weights", required=True, help="a checkpoint, or a name of the zoo")
    parser.add_argument("--images", type=int, default=200, metavar="N", help="drawn from the data set (default: %(default)s)")
    parser.add_argument("--hardest", type=int, default=24, metavar="N", help="negatives on the sheet (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draws the images (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/focal_lab/distribution"), help="folder (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ...; default: cuda where there is one")
    args = parser.parse_intermixed_args(arguments)
    for name, least in (("images", 1), ("hardest", 1), ("seed", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: expected {least} or more")

    from laboratory.examination import examine_weights, write_findings
    from retinanet.config import config_for_inference, load_config, split_settings
    from retinanet.precision import choose_device
    from retinanet.results import make_folders
    from retinanet.weights.zoo import load_weights

    config, overrides = split_settings(args.settings)
    device, checkpoint = choose_device(args.device), load_weights(args.weights)
    given = load_config(config) if config else None
    checkpoint.config, notes = config_for_inference(checkpoint.config, given, overrides)
    print(*notes, sep="\n", end="\n" if notes else "")
    make_folders(args.out)
    findings, annotations = examine_weights(checkpoint, device, images=args.images, seed=args.seed, hardest=args.hardest)
    write_findings(args.out, findings, annotations, about=f"{args.weights} on {annotations.source}")
    return 0


def ablation(parser: argparse.ArgumentParser, arguments: list[str]) -> int:
    """Trains the rows of configs/ablation/rows.yaml one after another; goes on where it stopped. Writes table.md, table.json
    and chart.png after each run."""
    parser.add_argument("settings", nargs="*", metavar="key.sub=value", help="settings of all runs")
    parser.add_argument("--config", type=Path, default=Path("configs/ablation/base.yaml"), help="default: %(default)s")
    parser.add_argument("--rows", nargs="+", default=[], metavar="NAME", help="these only, by name (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of a main row, or of one named by --rows (default: 3)")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="folder (default: %(default)s)")
    parser.add_argument("--table-only", action="store_true", help="run nothing, show what there is")
    args = parser.parse_intermixed_args(arguments)
    if args.seeds < 1:
        raise UserError(f"--seeds {args.seeds}: expected 1 or more")

    from laboratory.ablation import plan, read_rows, run_all
    from laboratory.standings import show
    from retinanet.interrupts import Interrupts

    rows = read_rows()
    names = [word for word in args.rows if "=" not in word]
    settings = [*args.settings, *(word for word in args.rows if "=" in word)]  # those that stand behind the rows
    if args.rows and not names:
        raise UserError(f"--rows needs the name of a row before {settings[-1]}")
    runs = plan(rows, names, args.seeds, out=args.out, config=args.config, settings=settings)
    interrupts = Interrupts()
    try:
        with interrupts:
            if not args.table_only:
                run_all(runs, lambda: show(rows, args.out, quiet=True))
    except KeyboardInterrupt:
        show(rows, args.out)
        print("stopped; the same command goes on")
        return interrupts.exit_code
    show(rows, args.out)
    return 0


if __name__ == "__main__":
    main()
