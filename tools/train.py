"""Train a detector.

examples:
  python tools/train.py configs/demo.yaml
  python tools/train.py configs/demo.yaml train.batch_size=8 output_dir=runs/small
  python tools/train.py configs/demo.yaml --resume                      go on where a run stopped
  torchrun --nproc_per_node=8 tools/train.py configs/retinanet_r50_1x.yaml

exit codes: 0 finished, 1 failed on its way, 2 a mistake in the settings or the data, 75 saved after SIGTERM (a scheduler may
requeue it), 130 saved after Ctrl-C; docs/distributed.md
"""

import argparse
import os

from retinanet.errors import command_line


@command_line
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that win over the file's")
    parser.add_argument("--resume", action="store_true", help="go on from the newest valid checkpoint in output_dir")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ...; default: cuda where there is one")
    args = parser.parse_intermixed_args()

    from retinanet.config import load_config
    from retinanet.interrupts import Interrupts
    from retinanet.precision import choose_device
    from retinanet.training import train

    choose_device(args.device)  # a device that is not there is found before anything is read
    config, interrupts = load_config(args.config, args.overrides), Interrupts()
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"  # by torchrun --max-restarts
    finished = train(config, resume=args.resume or restarted, device=args.device, interrupts=interrupts)
    return 0 if finished else interrupts.exit_code


if __name__ == "__main__":
    main()
