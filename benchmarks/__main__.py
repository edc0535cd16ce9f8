"""Time the kernels against their peers: `python -m benchmarks`, or `--suite glu penalty` for some suites.
`python -m benchmarks plot` makes docs/benchmarks.md and its figures from the records."""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path

import torch
from rich.console import Console

from .harness.device import DEVICE
from .harness.record import Row, make_table, provenance, write_json
from .harness.running import run_case
from .harness.timing import copy_bandwidth
from .plot import write_docs
from .suites import SUITES

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"


def main() -> int:
    """Run the suites, or plot; exit status 1 where a result was wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("command", nargs="?", choices=["run", "plot"], default="run")
    parser.add_argument("--suite", nargs="+", choices=SUITES, default=list(SUITES), help="default: all")
    parser.add_argument("--case", default="", metavar="TEXT", help="only cases with this in their names")
    parser.add_argument(
        "--runs",
        type=int,
        default=15,
        help="timed runs of each candidate (default 15; of training steps no more than 6)",
    )
    out = RESULTS / ("gpu.json" if DEVICE.type == "cuda" else "cpu.json")
    parser.add_argument("--out", type=Path, default=out, help="JSON record (default %(default)s)")
    arguments = parser.parse_args()
    if arguments.runs < 2:
        parser.error(f"--runs {arguments.runs}: expected at least 2")
    if arguments.command == "plot":
        print("wrote", *write_docs(RESULTS, DOCS))
        return 0
    torch.manual_seed(0)
    console = Console(width=None if sys.stdout.isatty() else 140)
    copy, facts = copy_bandwidth(), provenance()
    rows: list[Row] = []
    for suite in arguments.suite:
        for case in SUITES[suite]():
            if arguments.case not in case.name:
                continue
            with console.status(f"{case.suite}: {case.name}"):
                rows += run_case(case, arguments.runs, copy)
            write_json(arguments.out, rows, copy, facts)  # a run that is cut short keeps what it has
            gc.collect()
    console.print(make_table(rows, copy))
    console.print(f"wrote {arguments.out}")
    return 1 if any(row["passed"] is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
