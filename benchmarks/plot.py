"""docs/benchmarks.md and its figures, from the committed records alone."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .harness.record import HEADINGS, Row, cells

OURS, PEER = "#1f6f8b", "#b9c3c9"
# What a table does not say of itself.
NOTES = {
    "step": (
        "From a batch to new weights. Algorithm 1 is written in two ways, forget and retain samples in one forward or\n"
        "in one each; the faster of the two is the one to compare with. MB is the peak of the step, weights included.\n"
    ),
    "memory": "The most layers with which a training step fits into the budget that the case names.\n",
}


def write_docs(results: Path, docs: Path) -> list[Path]:
    """Write docs/benchmarks.md and one figure a record and suite; the paths written."""
    records = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    figures = docs / "benchmarks"
    figures.mkdir(parents=True, exist_ok=True)
    written = []
    for device, record in records.items():
        for suite in _suites(record):
            path = figures / f"{device}-{suite}.png"
            _draw([row for row in record["rows"] if row["suite"] == suite and row["passed"]], path)
            written.append(path)
    page = docs / "benchmarks.md"
    page.write_text(render(records))
    return [*written, page]


def render(records: dict[str, dict]) -> str:
    """The page's text."""
    parts = [
        "# Benchmarks\n",
        "Made by `python -m benchmarks plot` from the records in [benchmarks/results](../benchmarks/results), not to\n"
        "be edited. A time is given only for a result that was checked in the same run. "
        '"x ours" is a candidate\'s time\nover that of the first in its case.\n',
    ]
    for device, record in records.items():
        facts = record["provenance"]
        where = facts["gpu"] if facts.get("gpu", "none") != "none" else facts["cpu"]
        parts.append(f"## {device}\n")
        parts.append(
            f"{where}; torch {facts['torch']}, triton {facts['triton']}; commit {facts['commit']}, {facts['date']}. "
            f"A plain copy moved {record['copy_gb_per_s']:.1f} GB/s.\n"
        )
        for suite in _suites(record):
            parts.append(f"### {suite}\n")
            if suite in NOTES:
                parts.append(NOTES[suite])
            parts.append(f"![{suite} on {device}](benchmarks/{device}-{suite}.png)\n")
            parts.append(_table([row for row in record["rows"] if row["suite"] == suite]))
    return "\n".join(parts)


def _suites(record: dict) -> list[str]:
    return list(dict.fromkeys(row["suite"] for row in record["rows"]))


def _table(rows: list[Row]) -> str:
    lines = [" | ".join(HEADINGS), " | ".join(["---", "---", *["---:"] * (len(HEADINGS) - 2)])]
    lines += [" | ".join(cells(row)) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


def _draw(rows: list[Row], path: Path) -> None:
    """Each case's candidates as bars of time over ours or of what fits, the number written beside."""
    budget = any("parameters" in row for row in rows)
    key, unit = ("parameters", 1e6) if budget else ("times_ours", 1)
    cases = list(dict.fromkeys(row["case"] for row in rows))
    height = 0.6 + 0.26 * len(rows) + 0.3 * len(cases)
    figure, axes = plt.subplots(figsize=(8, height), layout="constrained")
    position, ticks = 0.0, []
    for case in cases:
        axes.text(0, position - 0.75, case, fontsize=8, fontweight="bold", va="center")
        for index, row in enumerate(r for r in rows if r["case"] == case and r[key] is not None):
            value = row[key] / unit
            ours = index == 0 or row["candidate"].startswith("ssiuu")
            axes.barh(position, value, color=OURS if ours else PEER, height=0.75)
            axes.text(value, position, f" {value:.{0 if budget else 2}f}", fontsize=8, va="center")
            ticks.append((position, row["candidate"]))
            position += 1
        position += 1.3
    axes.set_yticks([tick for tick, _ in ticks], [name for _, name in ticks], fontsize=8)
    axes.set_ylim(position - 1.3, -1.3)
    label = "millions of parameters that fit (longer is more)" if budget else "time over ours (longer is slower)"
    axes.set_xlabel(label, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
