"""The summary table of runs: its rows, in a terminal and in Markdown; the template of the page makes HTML of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.markup import escape
from rich.table import Table

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
ATTACK_SCORES = (
    ("FS", "max_fs", ".2f"),
    ("FS, unseen facts", "max_unseen_fs", ".2f"),
    ("P(answer), forget", "max_forget_probability", ".3f"),
    ("P(answer), unseen facts", "max_unseen_probability", ".3f"),
)
ALWAYS_SHOWN = ("fs", "rs", "max_fs")  # the others where a run has them


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
        for name, key, digits in SCORES
        if key in ALWAYS_SHOWN or any(record.evaluation and key in record.evaluation["after"] for record in records)
    ]


def _attacks(records: Sequence[RunRecord]) -> list[Row]:
    rows = []
    for group, title in attack_groups(records).items() or [(("any", None), "any")]:
        found = [attack_summary(record, group) for record in records]
        for name, key, digits in ATTACK_SCORES:
            if key in ALWAYS_SHOWN or any(key in summary for summary in found):
                cells = [_or_not_run(summary.get(key), digits) for summary in found]
                rows.append(Row("Attacks, highest value", f"{title}: {name}", cells))
    return rows


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
