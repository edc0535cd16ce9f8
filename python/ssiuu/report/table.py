"""The summary table of runs: its rows, in a terminal and in Markdown; the template of the page makes HTML of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.markup import escape
from rich.table import Table

from ..attacks.kinds import get_kind
from ..data.registry import DATA_SETS
from ..runs.read import RunRecord, read_runs
from .groups import attack_groups, attack_summary

NOT_RUN = "not run"
# Name in the table, key in the run folder, format.
SCORES = (
    ("FS", "fs", ".2f"),
    ("FS by generation", "fs_generation", ".2f"),
    ("RS", "rs", ".2f"),
    ("RS by generation", "rs_generation", ".2f"),
    ("RS, other people", "test_rs", ".2f"),
    ("P(answer), forget", "forget_probability", ".3f"),
    ("P(answer), retain", "retain_probability", ".3f"),
    ("P(answer), other people", "test_retain_probability", ".3f"),
    ("margin, forget", "forget_margin", ".2f"),
    ("margin, retain", "retain_margin", ".2f"),
    ("margin, other people", "test_retain_margin", ".2f"),
)
# The further sets of benchmarks.
EXTRA_SCORES = tuple(
    (f"{name.replace('_', ' ')}: {score}", f"{name}_{key}", digits)
    for name in dict.fromkeys(name for data in DATA_SETS.values() for name in data.extra)
    for score, key, digits in (("score", "score", ".2f"), ("P(answer)", "probability", ".3f"))
)
# Name in the table, key of `attack_summary` after max_ and sd_, format.
ATTACK_SCORES = (
    ("FS", "unseen_fs", ".2f"),
    ("P(answer)", "unseen_probability", ".3f"),
    ("margin", "unseen_margin", ".2f"),
)
ALWAYS_SHOWN = ("fs", "rs", "unseen_fs")  # the others where a run has them


class Row(NamedTuple):
    """One line of the table: a section, what is measured, and one cell per run."""

    section: str
    name: str
    cells: list[str]


def table_rows(records: Sequence[RunRecord]) -> list[Row]:
    """The rows of the table, the same in the page, in Markdown and in the terminal."""
    return [*_unlearning(records), *_before_and_after(records), *_attacks(records), *_influence(records)]


def summary_table(run_dirs: Iterable[str | Path]) -> Table:
    """The table of `write_report` for the terminal, with one column per run.

    Raises:
        ValueError: see `read_runs`.
    """
    records = read_runs(run_dirs)
    title = escape(f"Unlearning {records[0].config['model']}")
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for record in records:
        table.add_column(escape(record.label), justify="right", header_style=record.color)
    section = ""
    for row in table_rows(records):
        if row.section != section:
            section = row.section
            table.add_section()
            table.add_row(f"[bold]{section}[/bold]")
        table.add_row(row.name, *(f"[dim]{cell}[/dim]" if cell == NOT_RUN else cell for cell in row.cells))
    return table


def as_markdown(records: Sequence[RunRecord]) -> str:
    """The table in Markdown, with one column per run."""
    lines = [["", *(record.label for record in records)], ["---", *["---:"] * len(records)]]
    section = ""
    for row in table_rows(records):
        if row.section != section:
            section = row.section
            lines.append([f"**{section}**", *[""] * len(records)])
        lines.append([row.name, *row.cells])
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _unlearning(records: Sequence[RunRecord]) -> list[Row]:
    rows = {
        "penalty": map(_penalty, records),
        "lambda, share at last": map(_last_penalty, records),
        "learning rate": (f"{record.config['learning_rate']:g}" for record in records),
        "steps": (_or_not_run(record.steps, "d") for record in records),
        "seconds": (_or_not_run(record.seconds, ".0f") for record in records),
    }
    return [Row("Unlearning", name, list(cells)) for name, cells in rows.items()]


def _before_and_after(records: Sequence[RunRecord]) -> list[Row]:
    return [
        Row("Before → after", name, [_change(record, key, digits) for record in records])
        for name, key, digits in (*SCORES, *EXTRA_SCORES)
        if key in ALWAYS_SHOWN or any(record.evaluation and key in record.evaluation["after"] for record in records)
    ]


def _attacks(records: Sequence[RunRecord]) -> list[Row]:
    rows = {}
    for group in attack_groups(records):
        found = [attack_summary(record, group) for record in records]
        for name, key, digits in ATTACK_SCORES:
            if key in ALWAYS_SHOWN or any(f"max_{key}" in summary for summary in found):
                rows[f"{group.title}: {name}"] = [_mean_and_spread(summary, key, digits) for summary in found]
        if get_kind(group.kind).trains:
            rows[f"{group.title}: steps"] = [_steps(summary) for summary in found]
        counted = ("seeds", "rates", "facts") if get_kind(group.kind).trains else ("facts",)
        rows[f"{group.title}: {', '.join(counted)}"] = [_counts(summary, *counted) for summary in found]
    rows = rows or {"any: FS": [NOT_RUN] * len(records)}
    return [Row("Attacks, highest value", name, cells) for name, cells in rows.items()]


def _mean_and_spread(summary: Mapping[str, Any], key: str, digits: str) -> str:
    if f"max_{key}" not in summary:
        return NOT_RUN
    if summary[f"max_{key}"] is None:
        return "incomplete"
    mean, spread = _number(summary[f"max_{key}"], digits), summary.get(f"sd_{key}")
    return mean if spread is None else f"{mean} ± {spread:{digits}}"


def _steps(summary: Mapping[str, Any]) -> str:
    return "–".join(map(str, dict.fromkeys(summary["steps"]))) if summary else NOT_RUN


def _counts(summary: Mapping[str, Any], *names: str) -> str:
    return ", ".join(str(summary[name]) for name in names) if summary else NOT_RUN


def _influence(records: Sequence[RunRecord]) -> list[Row]:
    sums = [record.diagnosis["sum"] if record.diagnosis else {} for record in records]
    rows = {
        "of": (record.diagnosis["target"] if record.diagnosis else NOT_RUN for record in records),
        "D+, erased": (_or_not_run(found.get("d_plus"), ".3g") for found in sums),
        "D-, hidden": (_or_not_run(found.get("d_minus"), ".3g") for found in sums),
    }
    return [Row("Influence variation", name, list(cells)) for name, cells in rows.items()]


def _penalty(record: RunRecord) -> str:
    if record.config.get("penalty_share") is not None:
        return f"share {record.config['penalty_share']:g}"
    if record.config.get("penalty_weight") is not None:
        return f"lambda {record.config['penalty_weight']:g}"
    return "none"


def _last_penalty(record: RunRecord) -> str:
    last = record.metrics[-1] if record.metrics else {}
    return f"{last['lambda']:.3g}, {last['share']:.3g}" if last.get("lambda") else "none"


def _change(record: RunRecord, key: str, digits: str) -> str:
    if record.evaluation is None or key not in record.evaluation["after"]:
        return NOT_RUN
    return " → ".join(_number(record.evaluation[when][key], digits) for when in ("before", "after"))


def _or_not_run(value: float | None, digits: str) -> str:
    return NOT_RUN if value is None else _number(value, digits)


def _number(value: float, digits: str) -> str:
    # Only probabilities have three digits, and a forgotten answer's is small but never 0.
    return "<0.001" if digits == ".3f" and 0 < value < 0.0005 else format(value, digits)
