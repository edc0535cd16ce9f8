"""Correctness-gated timing. `python -m benchmarks --help` says how to run it."""
