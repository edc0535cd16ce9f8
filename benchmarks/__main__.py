"""Time the kernels against their peers: `python -m benchmarks`, or `--suite glu penalty` for some suites."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console

from .gate import errors
from .record import make_row, make_table, write_json
from .suites import SUITES
from .timing import copy_bandwidth, time_case

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    """Run the suites; exit status 1 where a result was wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=list(SUITES), help="default: all")
    parser.add_argument("--runs", type=int, default=15, help="timed runs of each candidate (default 15)")
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu.json", help="JSON record (default %(default)s)")
    arguments = parser.parse_args()
    if arguments.runs < 2:
        parser.error(f"--runs {arguments.runs}: expected at least 2")
    torch.manual_seed(0)
    console = Console(width=None if sys.stdout.isatty() else 130)
    copy = copy_bandwidth()
    rows: list[dict] = []
    for suite in arguments.suite:
        for case in SUITES[suite]():
            with console.status(f"{case.suite}: {case.name}"):
                rows += run_case(case, arguments.runs, copy)
    console.print(make_table(rows, copy))
    write_json(arguments.out, rows, copy)
    console.print(f"wrote {arguments.out}")
    return 0 if all(row["passed"] for row in rows) else 1


def run_case(case, runs: int, copy: float) -> list[dict]:
    """The rows of one case: gate first, then times of those that passed it."""
    found = errors(case)
    passed = [name for name, error in found.items() if error <= case.tolerance]
    times = time_case(case, passed, runs)
    ours = times.get(next(iter(case.candidates)))
    return [make_row(case, name, error, times.get(name), ours, copy) for name, error in found.items()]


if __name__ == "__main__":
    sys.exit(main())
