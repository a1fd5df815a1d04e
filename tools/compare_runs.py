"""Compare the reports of two or more runs over the same data: what changed, and whether by more than chance.

examples:
  python tools/compare_runs.py runs/before runs/after                  runs whose reports are in report/ or evaluation/
  python tools/compare_runs.py runs/a/report runs/b/report runs/c/report --out runs/comparison     each against the first

Reports are what tools/evaluate.py --report writes. Intervals are drawn from the matches.npz in their folders; pictures,
annotations and weights are not needed. --out writes comparison.json, comparison.txt and comparison.html.
"""

import argparse
from pathlib import Path

from retinanet.errors import UserError, command_line


@command_line
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "reports", nargs="+", type=Path, metavar="FOLDER", help="a report's folder, or a run's; the first: before"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the comparison there too (default: it is only printed)")
    parser.add_argument("--samples", type=int, default=200, help="bootstrap resamples of the images (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="chooses the resamples (default: 0)")
    args = parser.parse_args()
    if len(args.reports) < 2:
        raise UserError("give two reports at least: the one before, and those after it")
    if args.samples < 2 or args.seed < 0:
        raise UserError(f"--samples {args.samples} --seed {args.seed}: expected 2 or more, and 0 or more")

    from retinanet.distributed import say
    from retinanet.report.compare import compare_reports, comparison_text, read_report, write_comparison

    comparison = compare_reports([read_report(path) for path in args.reports], samples=args.samples, seed=args.seed)
    say(comparison_text(comparison))
    if args.out is not None:
        write_comparison(comparison, args.out)
        say(f"written: {args.out / 'comparison.html'}, comparison.json and comparison.txt")
    return 0


if __name__ == "__main__":
    main()
