"""The results of a study: intervals over seeds and differences from the baseline, as JSON, tables and figures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from ..analysis.statistics import FEW, LEVEL, RESAMPLES, Interval, bootstrap, paired_difference
from ..pairs import appearance
from ..runs.folder import replace_file
from ..runs.locks import locked
from ..runs.study import Study
from ..runs.tasks import FAILED, Task
from .measured import Quantity, measure_runs
from .style import FAINT, INK, STYLE, new_figure, save

MISSING = "–"
Values = Mapping[str, Mapping[int, Mapping[str, float]]]  # cell -> seed -> quantity -> value


def write_results(study: Study, tasks: Mapping[str, Task], out: Path) -> Path:
    """Write results.json, table.md and one PNG per quantity from the runs that are finished.

    A cell whose attacks or diagnosis failed has the rest of its values.

    Returns:
        The folder of the results.

    Raises:
        BusyError: another process writes them.
    """
    finished = [task for task in tasks.values() if task.cell and task.has_finished_run(out)]
    shown, measured = measure_runs({(task.cell.name, task.seed): task.folder(out) for task in finished})
    values: dict[str, dict[int, dict[str, float]]] = {name: {} for name in study.cells}
    for (cell, seed), found in measured.items():
        values[cell][seed] = found
    states = {task.name: task.state(out) for task in tasks.values()}
    failures = {name: state["error"] for name, state in states.items() if state.get("status") == FAILED}
    folder = out / "results"
    with locked(folder):
        results = _as_json(study, values, shown, failures)
        replace_file(folder / "results.json", json.dumps(results, indent=1) + "\n")
        replace_file(folder / "table.md", _as_markdown(study, results, shown))
        for quantity in shown:
            save(_draw(study, results, quantity), folder / f"{quantity.key}.png")
    return folder


def _as_json(study: Study, values: Values, shown: Sequence[Quantity], failures: Mapping[str, str]) -> dict[str, Any]:
    cells = {}
    for name, cell in study.cells.items():
        baseline = study.baseline_of(cell)
        cells[name] = {"options": dict(cell.values), "match": asdict(cell.match) if cell.match else None, "values": {}}
        if baseline:
            cells[name]["baseline"] = baseline.name
        for quantity in shown:
            of_seed = _of_seeds(values[name], quantity)
            if not of_seed:
                continue
            found = {"seeds": of_seed, **bootstrap(list(of_seed.values()))._asdict()}
            if baseline:
                difference = paired_difference(of_seed, _of_seeds(values[baseline.name], quantity))
                found["difference"] = difference and difference._asdict()
            cells[name]["values"][quantity.key] = found
    return {
        "study": study.name,
        "seeds": study.given.seeds,
        "interval": {"method": "percentile bootstrap over seeds", "level": LEVEL, "resamples": RESAMPLES, "seed": 0},
        "quantities": {quantity.key: quantity.label for quantity in shown},
        "cells": cells,
        "failures": dict(failures),
    }


def _of_seeds(values: Mapping[int, Mapping[str, float]], quantity: Quantity) -> dict[int, float]:
    return {seed: found[quantity.key] for seed, found in values.items() if quantity.key in found}


def _as_markdown(study: Study, results: Mapping[str, Any], shown: Sequence[Quantity]) -> str:
    """One table per section, with one row per cell; then the same of the differences."""
    cells = results["cells"]
    values = {name: cell["values"] for name, cell in cells.items()}
    compared = {
        name: {key: found["difference"] for key, found in values[name].items() if found["difference"]}
        for name, cell in cells.items()
        if "baseline" in cell
    }
    parts = [f"# {study.name}\n", *_tables(shown, values)]
    if any(compared.values()):
        parts += [f"# Difference from {study.given.baseline}, seed by seed\n", *_tables(shown, compared, signed=True)]
    interval = f"{LEVEL:.0%} percentile bootstrap interval, {RESAMPLES} resamples"
    notes = [f"Mean over seeds [{interval}]; {MISSING}: not measured."]
    counts = [found["count"] for cell in cells.values() for found in cell["values"].values()]
    if min(counts, default=0) < FEW:
        notes.append(
            f"Some values are from fewer than {FEW} seeds, (n) in the table; their intervals are too narrow to rely on."
        )
    notes += [f"Failed: {name}: {error}" for name, error in results["failures"].items()]
    return "\n".join([*parts, *(f"{note}\n" for note in notes)])


def _tables(shown: Sequence[Quantity], rows: Mapping[str, Any], *, signed: bool = False) -> Iterator[str]:
    for section in dict.fromkeys(quantity.section for quantity in shown):
        columns = [quantity for quantity in shown if quantity.section == section]
        lines = [[section, *(quantity.label for quantity in columns)], ["---", *["---:"] * len(columns)]]
        lines += [[name, *(_cell(found.get(q.key), q.digits, signed) for q in columns)] for name, found in rows.items()]
        yield "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _cell(found: Mapping[str, Any] | None, digits: str, signed: bool) -> str:
    if found is None:
        return MISSING
    digits = ("+" if signed else "") + digits
    interval = Interval(*(found[name] for name in Interval._fields))
    text = format(interval.mean, digits)
    if interval.low is not None:
        text += f" [{interval.low:{digits}}, {interval.high:{digits}}]"
    return text if interval.count >= FEW else f"{text} ({interval.count})"


def _draw(study: Study, results: Mapping[str, Any], quantity: Quantity) -> Figure:
    """A dot with its interval for each cell, and a faint dot for each seed."""
    names = [name for name, cell in results["cells"].items() if quantity.key in cell["values"]]
    with matplotlib.rc_context(STYLE):
        figure, ((ax,),) = new_figure(1, 1, (7, 1.1 + 0.32 * len(names)))
        for y, name in enumerate(names):
            found = results["cells"][name]["values"][quantity.key]
            values = study.cells[name].values
            color = appearance({"method": values.get("method", "ssiuu"), **values}).color or INK
            ax.plot([*found["seeds"].values()], [y] * found["count"], "o", color=color, alpha=0.3, markersize=4)
            if found["low"] is not None:
                ax.plot([found["low"], found["high"]], [y, y], color=color)
            ax.plot([found["mean"]], [y], "o", color=color, markersize=7)
        baseline = next((y for y, name in enumerate(names) if study.baseline_of(study.cells[name]) is None), None)
        if study.given.baseline and not study.given.models and baseline is not None:
            level = results["cells"][names[baseline]]["values"][quantity.key]["mean"]
            ax.axvline(level, color=FAINT, linewidth=1.2, linestyle=(0, (4, 3)))
        ax.set_yticks(range(len(names)), names)
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.grid(False, axis="y")
        ax.set_xlabel(quantity.label)
        if quantity.key == "learning_rate":
            ax.set_xscale("log")
    return figure
