"""Measure a detector: the twelve COCO numbers and a table by class.

examples:
  python tools/evaluate.py configs/retinanet_r50_1x.yaml --weights retinanet_resnet50_fpn     of the zoo, on COCO
  python tools/evaluate.py configs/bccd.yaml --weights runs/bccd/best.pt evaluation.split=test
  python tools/evaluate.py --weights runs/demo/best.pt --save-thresholds     keep the best score of each class in best.pt
  python tools/evaluate.py --weights runs/demo/best.pt --report runs/demo/report     the numbers, and a page about them
  python tools/evaluate.py --detections results.json --annotations truth.json     results of any detector
"""

import argparse
from pathlib import Path
from typing import Any

from retinanet.errors import UserError, command_line


@command_line
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="CONFIG key.sub=value", help="a YAML file and settings, all optional")
    parser.add_argument("--weights", help="a checkpoint, or a name of the zoo")
    parser.add_argument("--detections", type=Path, help="COCO results file, instead of weights")
    parser.add_argument("--annotations", type=Path, help="COCO ground truth of --detections")
    parser.add_argument("--images", type=Path, help="folder of the pictures of --annotations, for --report; default: its own")
    parser.add_argument("--report", type=Path, metavar="DIR", help="write DIR/index.html, a page, and its figures as JSON, CSV")
    parser.add_argument("--save-thresholds", action="store_true", help="keep the best scores found in the --weights file")
    where = "evaluation/ beside the checkpoint or in runs/<name in the zoo>/; of --detections <results>_evaluation/"
    parser.add_argument("--out", type=Path, help=f"default: {where}")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ...; default: cuda where there is one")
    args = parser.parse_intermixed_args()
    from retinanet.config import split_settings

    config, overrides = split_settings(args.settings)
    if (args.weights is None) == (args.detections is None):
        raise UserError("give either --weights or --detections (with --annotations)")
    if args.detections is not None:
        if args.annotations is None:
            raise UserError("--detections needs --annotations, the COCO ground truth")
        if args.save_thresholds:
            raise UserError("--save-thresholds goes with --weights, the file to keep them in")
        if args.settings:
            raise UserError(f"--detections takes no CONFIG and no settings, got {' '.join(args.settings)}")
        return evaluate_results(args)
    if args.annotations is not None or args.images is not None:
        which = "images" if args.annotations is None else "annotations"
        raise UserError(f"--{which} goes with --detections; with --weights say data.val.path=... data.val.annotations=...")
    if args.save_thresholds and not Path(args.weights).is_file():
        raise UserError(f"--save-thresholds needs a checkpoint's file to keep them in, not '{args.weights}'")
    metrics = evaluate_weights(args.weights, config, overrides, args)
    if args.save_thresholds and metrics:  # on the main rank
        from retinanet.checkpoint import save_thresholds
        from retinanet.evaluation.coco import best_thresholds

        kept = save_thresholds(Path(args.weights), best_thresholds(metrics))
        print(f"{args.weights}: best scores of {len(kept)} classes kept: {', '.join(kept)}")
    return 0


def evaluate_results(args: argparse.Namespace) -> int:
    from retinanet.data.coco import load_coco
    from retinanet.evaluation.coco import evaluate_rows, metrics_table
    from retinanet.evaluation.run import read_results
    from retinanet.report.write import write_report
    from retinanet.results import make_folders, write_json

    truth = load_coco(args.annotations, args.images or args.annotations.parent)
    rows = read_results(args.detections, truth)
    out = args.out or args.detections.parent / f"{args.detections.stem}_evaluation"
    make_folders(out, args.report)
    metrics = evaluate_rows(rows, truth)
    print(metrics_table(metrics))
    write_json(out / "metrics.json", metrics)
    print(f"written: {out / 'metrics.json'}")
    if args.report:
        write_report(rows, truth, metrics, args.report, args.detections.name)
    return 0


def evaluate_weights(weights: str, config_file: str | None, overrides: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """The metrics; empty on ranks other than 0."""
    import torch

    from retinanet.config import config_for_inference, load_config
    from retinanet.data.workers import choose_workers
    from retinanet.distributed import is_main, main_first, process_group, say, world_size
    from retinanet.evaluation.run import evaluate_model, write_evaluation
    from retinanet.postprocess import build_postprocessor
    from retinanet.precision import choose_precision
    from retinanet.report.write import write_report
    from retinanet.results import make_folders, write_json
    from retinanet.run_setup import load_splits
    from retinanet.weights.zoo import ZOO, load_weights

    with process_group(args.device) as chosen:  # a device that is not there is found before anything is read
        checkpoint = main_first(lambda: load_weights(weights))
        given = load_config(config_file) if config_file else None
        config, notes = config_for_inference(checkpoint.config, given, overrides)
        if (config.input.mean, config.input.std) != (checkpoint.config.input.mean, checkpoint.config.input.std):
            raise UserError("input.mean and input.std are part of the weights and cannot be changed here")
        name = config.evaluation.split
        (annotations,) = load_splits(config, name)
        if annotations is None:
            raise UserError(f"data.{name} is not set: name a CONFIG, or data.{name}.path=...")
        run = Path("runs", weights) if weights in ZOO else Path(weights).parent
        folder = args.out or run / "evaluation"
        make_folders(folder, args.report)
        checkpoint.config = config
        for note in notes:
            say(note)
        precision = choose_precision(config.train.precision, chosen)
        say(f"{weights} on {annotations.source}: {len(annotations)} images, {chosen}, {precision}")
        result = evaluate_model(
            checkpoint.build().to(chosen).to(memory_format=torch.channels_last),
            annotations,
            build_postprocessor(config.postprocess, checkpoint.categories),
            config.input,
            device=chosen,
            precision=precision,
            batch_size=config.evaluation.batch_size,
            workers=choose_workers(config.data.workers, world_size()),
            engine=config.evaluation.engine,
        )
        if is_main():
            write_evaluation(result.metrics, result.rows, annotations, folder)
            if args.out is None and (run / "config.yaml").exists():  # a run's folder always shows its latest evaluation
                write_json(run / "metrics.json", result.metrics)
            if args.report:
                write_report(result.rows, annotations, result.metrics, args.report, weights)
    return result.metrics


if __name__ == "__main__":
    main()
