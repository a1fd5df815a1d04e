"""Comparisons with other projects; `tools/benchmark.py` runs them.

A module has `cases(options)` and `ROUNDS`, the calls of each variant, or where calls cannot take turns `measure(options)`.
"""
