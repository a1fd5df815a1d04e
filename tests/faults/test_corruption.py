"""Torn and flipped checkpoints: found out and fallen back from, or harmless; never loaded wrong, never a traceback."""

import random
from pathlib import Path

import pytest
import torch

from faults.runs import assert_same, content
from faults.seeds import seeds
from retinanet.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from retinanet.config import Config
from retinanet.errors import UserError
from retinanet.run_state import find_checkpoint
from retinanet.structures import Category

pytestmark = pytest.mark.slow
CASES = 20  # damages a seed


def checkpoint(step: int) -> Checkpoint:
    """A small one, so that headers and directories, not only tensors, are hit: of 40 kB half."""
    generator = torch.Generator().manual_seed(step)
    weights = {f"layer{n}.weight": torch.rand(n + 1, 100, generator=generator) for n in range(6)}
    return Checkpoint(
        config=Config(),
        categories=(Category(3, "red"), Category(7, "green")),
        model=weights,
        ema={key: value.double() for key, value in weights.items()},
        thresholds={"red": 0.25},
        training={"step": step, "minutes": 1.5, "random": {"torch": torch.get_rng_state()}, "moments": [torch.ones(3).bool()]},
    )


def damage(good: bytes, rng: random.Random) -> bytes:
    """A truncation, or a range of 1 to 4096 bytes that are all changed: to other random ones, or in one bit."""
    begin = rng.randrange(len(good))
    if rng.random() < 0.3:
        return good[:begin]
    end = min(len(good), begin + int(4096 ** rng.random()))
    masks = range(1, 256) if rng.random() < 0.5 else [1 << rng.randrange(8)]
    mask = bytes(rng.choices(masks, k=end - begin))
    return good[:begin] + bytes(old ^ flip for old, flip in zip(good[begin:end], mask, strict=True)) + good[end:]


@seeds(short=2, long=50)
def test_a_damaged_checkpoint_is_never_loaded_as_something_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    last, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    save_checkpoint(previous, checkpoint(2))
    save_checkpoint(last, checkpoint(4))
    good, wanted = last.read_bytes(), {step: content(checkpoint(step)) for step in (2, 4)}
    rng, refused = random.Random(seed), 0
    for _ in range(CASES):
        last.write_bytes(damage(good, rng))
        try:
            loaded = load_checkpoint(last)
        except UserError as error:
            assert str(last) in str(error)
            assert "\n" not in str(error)
            refused += 1
            loaded = None
        capsys.readouterr()
        found = find_checkpoint(tmp_path, resume=True)
        said = capsys.readouterr().out
        assert found is not None
        if loaded is None:  # the one before takes its place, and that is said
            assert_same(content(found), wanted[2])
            assert "warning: " in said and str(last) in said and f"{previous}, step 2" in said
        else:
            assert_same(content(loaded), wanted[4])
            assert_same(content(found), wanted[4])
            assert "warning" not in said
        assert "Traceback" not in said
    assert refused > CASES / 2  # most damages hurt
