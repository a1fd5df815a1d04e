"""How much is tried: the short form, or with RETINANET_FAULTS_MINUTES the long one, in which random data take so long."""

import os

import pytest

MINUTES = float(os.environ.get("RETINANET_FAULTS_MINUTES", "0"))


def seeds(short: int, long: int) -> pytest.MarkDecorator:
    """Parametrizes `seed`, of what is tried with many."""
    return pytest.mark.parametrize("seed", range(long if MINUTES else short))
