"""The record of a run: rows with their provenance, as JSON and as a table."""

from __future__ import annotations

import datetime
import json
import subprocess
from pathlib import Path

from rich.table import Table

from ssiuu_kernels.env import environment

from .cases import Case
from .timing import Times


def provenance() -> dict[str, str]:
    """Commit, date and environment of this run."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"commit": commit.stdout.strip() or "unknown", "date": now, **environment()}


def make_row(case: Case, candidate: str, error: float, times: Times | None, ours: Times | None, copy: float) -> dict:
    """One row; without times where the gate is closed.

    Args:
        error: relative L2 error of the candidate.
        times: the candidate's; None where its gate is closed.
        ours: those of the case's first candidate, for the ratio.
        copy: copy bandwidth of this run, bytes per second.
    """
    row = {"suite": case.suite, "case": case.name, "candidate": candidate, "error": error, "passed": times is not None}
    if times is not None:
        rate = case.moved_bytes / (times.median * 1e-3)
        row |= {"median_ms": times.median, "p20_ms": times.p20, "p80_ms": times.p80, "moved_bytes": case.moved_bytes}
        row |= {"gb_per_s": rate / 1e9, "share_of_copy": rate / copy}
        row["times_ours"] = times.median / ours.median if ours is not None else None
    return row


def write_json(path: Path, rows: list[dict], copy: float) -> None:
    """Write the run's record, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"provenance": provenance(), "copy_gb_per_s": copy / 1e9, "rows": rows}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(path)


def make_table(rows: list[dict], copy: float) -> Table:
    """The rows for a terminal."""
    table = Table(title=f"copy bandwidth {copy / 1e9:.1f} GB/s", title_justify="left")
    for heading in ("case", "candidate", "ms (20 %, 80 %)", "GB/s", "of copy", "x ours", "error"):
        table.add_column(heading, justify="left" if heading in ("case", "candidate") else "right")
    previous = None
    for row in rows:
        if previous not in (None, row["case"]):
            table.add_section()
        name, previous = row["case"] if row["case"] != previous else "", row["case"]
        if not row["passed"]:
            table.add_row(name, row["candidate"], "wrong result, not timed", "", "", "", f"{row['error']:.1e}")
            continue
        table.add_row(
            name,
            row["candidate"],
            f"{row['median_ms']:.1f} ({row['p20_ms']:.1f}, {row['p80_ms']:.1f})",
            f"{row['gb_per_s']:.1f}",
            f"{row['share_of_copy']:.0%}",
            "" if row["times_ours"] is None else f"{row['times_ours']:.2f}",
            f"{row['error']:.1e}",
        )
    return table
