"""Fault injection: runs of `tools/train.py` that are killed, starved, lied to and torn apart, and must lose nothing."""
