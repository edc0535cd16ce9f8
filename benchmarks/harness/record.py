"""The record of a run: rows with their provenance, as JSON and as a table."""

from __future__ import annotations

import datetime
import json
import subprocess
from pathlib import Path

from rich.table import Table

from ssiuu_kernels.env import environment

from .cases import AnyCase
from .device import ON_GPU
from .timing import Times

Row = dict


def provenance() -> dict[str, str]:
    """Commit, date and environment of this run."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"commit": commit.stdout.strip() or "unknown", "date": now, **environment()}


def make_row(
    case: AnyCase,
    candidate: str,
    error: float,
    times: Times | None,
    ours: Times | None,
    copy: float,
    peak: int | None = None,
) -> Row:
    """One row; without times where the gate is closed.

    Args:
        error: relative L2 error of the candidate.
        times: the candidate's; None where its gate is closed.
        ours: those of the case's first candidate, for the ratio.
        copy: copy bandwidth of this run, bytes per second.
        peak: bytes above the inputs; None where not known.
    """
    row = gate_row(case, candidate, error, passed=times is not None)
    if times is None:
        return row
    row |= {"median_ms": times.median, "p20_ms": times.p20, "p80_ms": times.p80, "peak_bytes": peak}
    if ON_GPU:
        row |= {"host_ms": times.host, "late": times.late}
    if case.moved_bytes is not None:
        rate = case.moved_bytes / (times.median * 1e-3)
        row |= {"moved_bytes": case.moved_bytes, "gb_per_s": rate / 1e9, "share_of_copy": rate / copy}
    if case.tokens is not None:
        row["tokens_per_s"] = case.tokens / (times.median * 1e-3)
    row["times_ours"] = times.median / ours.median if ours is not None else None
    return row


def gate_row(case: AnyCase, candidate: str, error: float, *, passed: bool) -> Row:
    """What every row says of a candidate that was checked."""
    return {"suite": case.suite, "case": case.name, "candidate": candidate, "error": error, "passed": passed}


def missing_row(case: AnyCase, candidate: str, reason: str) -> Row:
    """The row of a candidate that could not take part."""
    return {"suite": case.suite, "case": case.name, "candidate": candidate, "missing": reason, "passed": None}


def write_json(path: Path, rows: list[Row], copy: float, facts: dict[str, str]) -> None:
    """Write the run's record, whole or not at all; `facts` are its provenance, from before anything was written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"provenance": facts, "copy_gb_per_s": copy / 1e9, "rows": rows}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(path)


HEADINGS = ("case", "candidate", "ms (20 %, 80 %)", "host ms", "rate", "of copy", "x ours", "MB", "error")


def cells(row: Row) -> list[str]:
    """The row as text, in the order of `HEADINGS`."""
    name = [row["case"], row["candidate"]]
    if row["passed"] is None:
        return [*name, row["missing"], *[""] * 6]
    if not row["passed"]:
        return [*name, "wrong result, not timed", *[""] * 5, f"{row['error']:.1e}"]
    if "layers" in row:
        fits = f"{row['layers']} layers, {row['parameters'] / 1e6:,.0f} M parameters"
        return [*name, "", "", fits, "", "", f"{row['peak_bytes'] / 1e6:.0f}", f"{row['error']:.1e}"]
    if "tokens_per_s" in row:
        rate, share = f"{row['tokens_per_s']:,.0f} tokens/s", ""
    else:
        rate, share = f"{row['gb_per_s']:.1f} GB/s", f"{row['share_of_copy']:.0%}"
    return [
        *name,
        f"{row['median_ms']:.3g} ({row['p20_ms']:.3g}, {row['p80_ms']:.3g})",
        _host(row),
        rate,
        share,
        "" if row["times_ours"] is None else f"{row['times_ours']:.2f}",
        "" if row.get("peak_bytes") is None else f"{row['peak_bytes'] / 1e6:.0f}",
        f"{row['error']:.1e}",
    ]


def _host(row: Row) -> str:
    """The host's time, with a mark where the device waited for it; empty on a CPU, where the two are one."""
    return "" if "host_ms" not in row else f"{row['host_ms']:.3g}{' (late)' if row['late'] else ''}"


def make_table(rows: list[Row], copy: float) -> Table:
    """The rows for a terminal."""
    table = Table(title=f"copy bandwidth {copy / 1e9:.1f} GB/s", title_justify="left")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in HEADINGS[:2] else "right")
    previous = None
    for row in rows:
        if previous not in (None, row["case"]):
            table.add_section()
        name, *rest = cells(row)
        table.add_row(name if row["case"] != previous else "", *rest)
        previous = row["case"]
    return table
