"""Train a detector.

examples:
  python tools/train.py configs/demo.yaml
  python tools/train.py configs/demo.yaml train.batch_size=8 output_dir=runs/small
  python tools/train.py configs/demo.yaml --resume                      go on where a run stopped
  torchrun --nproc_per_node=8 tools/train.py configs/retinanet_r50_1x.yaml
"""

import argparse

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
    from retinanet.precision import choose_device
    from retinanet.training import train

    choose_device(args.device)  # a device that is not there is found before anything is read
    finished = train(load_config(args.config, args.overrides), resume=args.resume, device=args.device)
    return 0 if finished else 130


if __name__ == "__main__":
    main()
