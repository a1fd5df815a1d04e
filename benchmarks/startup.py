"""Wall seconds until the command lines answer: `--help` of every tool beside Python's own start, and a prediction beside
`import torch`. No peak memory, and no floor but these.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from benchmarks.peer import draw_picture, our_checkpoint
from benchmarks.timing import Options, Row, interleaved, summarize
from retinanet.checkpoint import save_checkpoint

TOOLS = Path(__file__).parent.parent / "tools"
ROUNDS = 5


def measure(options: Options) -> list[Row]:
    rounds = options.rounds or ROUNDS
    rows = [_row(f"{tool.name} --help", "pass", [tool, "--help"], rounds) for tool in sorted(TOOLS.glob("*.py"))]
    backbone, size = options.backbone or "resnet18", (options.sizes or (320,))[0]
    with tempfile.TemporaryDirectory() as folder:
        weights, picture = Path(folder, "model.pt"), Path(folder, "picture.jpg")
        save_checkpoint(weights, our_checkpoint(backbone, size))
        Image.fromarray(draw_picture((480, 640))).save(picture)
        predict = [TOOLS / "predict.py", picture, "--weights", weights, "--device", options.device]
        rows.append(_row(f"predict.py, one image, {backbone} {size} px", "import torch", predict, rounds))
    return rows


def _row(case: str, program: str, arguments: list[object], rounds: int) -> Row:
    print(f"startup: {case}", flush=True)
    peer = f"python -c '{program}'"
    times, _ = interleaved({peer: _started("-c", program), "ours": _started(*arguments)}, rounds)
    row = summarize(Row("startup", case, peer, "ours"), times[peer], times["ours"])
    row.ratio = row.ratio_low = row.ratio_high = None  # that of a floor, not of a peer
    row.differences = {"seconds beyond it": (row.seconds or 0) - (row.peer_seconds or 0)}
    return row


def _started(*arguments: object) -> Callable[[], None]:
    command = [sys.executable, *map(str, arguments)]

    def run() -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()[-300:]}")

    return run
