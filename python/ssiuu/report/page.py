"""The report of runs: a self-contained HTML page, its pictures as PNG, its table as Markdown and JSON."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.markup import escape
from rich.table import Table

import ssiuu_kernels as sk

from ..attacks.kinds import ATTACK_KINDS
from ..runs.locks import locked
from ..runs.read import RunRecord, read_runs
from . import figures as plots
from .groups import attack_groups, attack_summary
from .style import colour, save

NOT_RUN = "not run"
CAPTIONS = {
    "overview": "What unlearning did to neurons, and how much of the forgotten answers further training brings back.",
    "influence": "Influence variation summed over neurons, strongest first. A method that erases is high on the left, "
    "a method that hides is high on the right.",
    "modules": "Where influence changed: each cell is the mean over one module's strongest neurons in one layer.",
    "attacks": "Retraining attacks. Thin: one learning rate and seed; thick: their mean. Lower is more robust. "
    "The dashed line is the original model over all forget facts.",
    "training": "What each unlearning step logged.",
}
METRICS = {
    "FS": "Forget score: share of the forget facts that the model still answers, choosing the true answer over the "
    "false options (or ROUGE-L recall of the generated answer, for facts without options). At 1/3 with three options "
    "it answers by chance, at 1/2 with two.",
    "RS": "Retain score: the same over facts that should be kept, from people the unlearning trained to keep.",
    "RS, other people": "The same over people in neither the forget set nor the retain set.",
    "P(answer)": "Mean probability of the true answer, given the question. It moves where a few facts make FS coarse.",
    "by generation": "The same when the options stand in the prompt and the model writes its choice.",
    "margin": "Mean lead of the true answer over the best false option, in log-likelihood. Below 0, it loses.",
    **{f"{kind.name} attack": kind.summary for kind in ATTACK_KINDS.values()},
    "highest value": "Of an attack: the highest on the way, as the paper reports it, averaged over the learning rates "
    "and seeds that were run.",
    "D+": "Positive influence removed, summed over 100 neurons: knowledge erased.",
    "D-": "Negative influence added, summed over 100 neurons: neurons grown to push the answer down, so that it is "
    "hidden rather than erased.",
    "influence variation of": "The quantity that neurons are credited with: prob is P(answer), as in the paper; "
    "log_prob its logarithm. Attribution to prob is proportional to P(answer), so once a model gives an answer next to "
    "no probability, D- in prob is next to nothing whatever was grown; log_prob still shows it.",
    "lambda, share": "Weight of the SSIUU penalty, and the fraction of the parameters of negative attribution whose "
    "penalty gradient outweighs their loss gradient. lambda is no portable number; the share is.",
}


class Row(NamedTuple):
    """One line of the table: a section, what is measured, and one cell a run."""

    section: str
    name: str
    cells: list[str]


def write_report(run_dirs: Iterable[str | Path], out_dir: str | Path) -> Path:
    """Write the report of finished runs of one model; parts not run yet are marked as such.

    Args:
        run_dirs: run folders, in the order of the columns.
        out_dir: receives report.html, report.json, table.md and the figures as PNG; created, files there replaced.

    Returns:
        Path of report.html, one file that loads nothing else.

    Raises:
        ValueError: see `read_runs`; another process writes there.
        OSError: a folder that cannot be written to.
    """
    records = read_runs(run_dirs)
    with locked(Path(out_dir)):
        return _write(records, Path(out_dir))


def _write(records: Sequence[RunRecord], out_dir: Path) -> Path:
    figures = []
    for name, figure in plots.draw_all(records).items():
        file = out_dir / f"{name}.png"
        save(figure, file)
        figures.append((name, CAPTIONS[name], base64.b64encode(file.read_bytes()).decode("ascii")))
    rows = table_rows(records)
    (out_dir / "report.json").write_text(json.dumps(as_json(records), indent=1) + "\n", encoding="utf-8")
    (out_dir / "table.md").write_text(_markdown(records, rows), encoding="utf-8")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("report.html.j2").render(
        model=records[0].config["model"],
        runs=[
            {"label": record.label, "colour": colour(record), "config": json.dumps(record.config, indent=1)}
            for record in records
        ],
        rows=rows,
        figures=figures,
        metrics=METRICS,
        environment=sk.collect_env(),
        not_run=NOT_RUN,
    )
    path = out_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def summary_table(run_dirs: Iterable[str | Path]) -> Table:
    """The table of `write_report` for the terminal: a column a run.

    Raises:
        ValueError: see `read_runs`.
    """
    records = read_runs(run_dirs)
    title = escape(f"Unlearning {records[0].config['model']}")
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for record in records:
        table.add_column(escape(record.label), justify="right", header_style=colour(record))
    section = ""
    for row in table_rows(records):
        if row.section != section:
            section = row.section
            table.add_section()
            table.add_row(f"[bold]{section}[/bold]")
        table.add_row(row.name, *(f"[dim]{cell}[/dim]" if cell == NOT_RUN else cell for cell in row.cells))
    return table


def table_rows(records: Sequence[RunRecord]) -> list[Row]:
    """The rows of the table, the same in the page, in Markdown and in the terminal."""
    rows = [
        Row("Unlearning", "penalty", [_penalty(record) for record in records]),
        Row("Unlearning", "lambda, share at last", [_last_penalty(record) for record in records]),
        Row("Unlearning", "learning rate", [f"{record.config['learning_rate']:g}" for record in records]),
        Row("Unlearning", "steps", [_or_not_run(_steps(record), "d") for record in records]),
        Row("Unlearning", "seconds", [_or_not_run(_seconds(record), ".0f") for record in records]),
    ]
    for name, key, digits in (
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
    ):
        if key in ("fs", "rs") or any(record.evaluation and key in record.evaluation["after"] for record in records):
            rows.append(Row("Before → after", name, [_before_after(record, key, digits) for record in records]))
    for group, title in attack_groups(records).items() or [(("any", None), "any")]:
        found = [attack_summary(record, group) for record in records]
        for name, key, digits in (
            ("FS", "max_fs", ".2f"),
            ("FS, unseen facts", "max_unseen_fs", ".2f"),
            ("P(answer), forget", "max_forget_probability", ".3f"),
            ("P(answer), unseen facts", "max_unseen_probability", ".3f"),
        ):
            if key == "max_fs" or any(key in summary for summary in found):
                cells = [_or_not_run(summary.get(key), digits) for summary in found]
                rows.append(Row("Attacks, highest value", f"{title}: {name}", cells))
    targets = [record.diagnosis["target"] if record.diagnosis else NOT_RUN for record in records]
    rows.append(Row("Influence variation", "of", targets))
    sums = [record.diagnosis["sum"] if record.diagnosis else {} for record in records]
    for name, key in (("D+, erased", "d_plus"), ("D-, hidden", "d_minus")):
        rows.append(Row("Influence variation", name, [_or_not_run(found.get(key), ".3g") for found in sums]))
    return rows


def as_json(records: Sequence[RunRecord]) -> dict:
    """The report's numbers: model, and for every run its configuration, evaluation, attacks and diagnosis."""
    groups = attack_groups(records)
    return {
        "model": records[0].config["model"],
        "runs": [
            {
                "name": record.path.name,
                "label": record.label,
                "config": record.config,
                "facts": record.split,
                "steps": _steps(record),
                "seconds": _seconds(record),
                "evaluation": record.evaluation,
                "attacks": {title: attack_summary(record, group) for group, title in groups.items()},
                "diagnosis": record.diagnosis,
            }
            for record in records
        ],
    }


def _steps(record: RunRecord) -> int | None:
    return record.metrics[-1]["step"] if record.metrics else None


def _seconds(record: RunRecord) -> float | None:
    return sum(line["seconds"] for line in record.metrics) if record.metrics else None


def _penalty(record: RunRecord) -> str:
    if record.config.get("penalty_share") is not None:
        return f"share {record.config['penalty_share']:g}"
    if record.config.get("penalty_weight") is not None:
        return f"lambda {record.config['penalty_weight']:g}"
    return "none"


def _last_penalty(record: RunRecord) -> str:
    last = record.metrics[-1] if record.metrics else {}
    return f"{last['lambda']:.3g}, {last['share']:.3g}" if last.get("lambda") else "none"


def _or_not_run(value: float | None, digits: str) -> str:
    return NOT_RUN if value is None else _number(value, digits)


def _number(value: float, digits: str) -> str:
    # Only probabilities have three digits, and a forgotten answer's is small but never 0.
    return "<0.001" if digits == ".3f" and 0 < value < 0.0005 else format(value, digits)


def _before_after(record: RunRecord, key: str, digits: str) -> str:
    if record.evaluation is None or key not in record.evaluation["after"]:
        return NOT_RUN
    return " → ".join(_number(record.evaluation[when][key], digits) for when in ("before", "after"))


def _markdown(records: Sequence[RunRecord], rows: Sequence[Row]) -> str:
    lines = [["", *(record.label for record in records)], ["---", *["---:"] * len(records)]]
    section = ""
    for row in rows:
        if row.section != section:
            section = row.section
            lines.append([f"**{section}**", *[""] * len(records)])
        lines.append([row.name, *row.cells])
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
