"""What a study will do, and how long that takes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from rich.markup import escape
from rich.table import Table

from ..data.facts import Split, draw_people, load_facts
from ..evaluation.protocol import Protocol
from ..models.load import load_model
from ..pairs import resolve
from ..progress import console
from ..runs.study import Cell, Study
from ..runs.tasks import DONE, FAILED, Task, taught_name
from .unlearn import choose_facts

MEASURED = 8  # facts


def planned_split(study: Study, cell: Cell, seed: int) -> Split:
    """The sets of a run, before `known_probability`; raises for data that cannot be used."""
    options, teaching = cell.options(seed), study.taught.get(cell.model)
    if teaching is None:
        return choose_facts(options).split
    facts = load_facts(teaching.facts)
    if teaching.people is not None:
        facts = draw_people(facts, teaching.people, teaching.seed)
    return choose_facts(options, facts).split


def progress_line(
    task: Task, status: str, states: Mapping[str, str], tasks: Mapping[str, Task], out: Path, jobs: int
) -> str:
    """What is printed when a task ends: how far the study is, and the time that is left."""
    ended = sum(state in (DONE, FAILED) for state in states.values())
    state = task.state(out)
    what = f" in {duration(state['seconds'])}" if status == DONE else f": {state['error']}" if status == FAILED else ""
    left = expected([other for name, other in tasks.items() if name not in states], tasks.values(), out, jobs)
    ahead = f"; about {duration(left)} left" if left else ""
    return f"[{ended}/{len(tasks)}] {task.name} {status}{what}{ahead}"


def expected(remaining: Iterable[Task], tasks: Iterable[Task], out: Path, jobs: int) -> float | None:
    """Seconds that these tasks take, from finished ones of the same cell, or else of any; None before one is."""
    taken: dict[str, list[float]] = {}
    for task in tasks:
        if task.cell and task.is_done(out):
            taken.setdefault(task.cell.name, []).append(task.state(out)["seconds"])
    everything = [seconds for found in taken.values() for seconds in found]
    if not everything:
        return None
    means = [_mean(taken.get(task.cell.name, everything)) for task in remaining if task.cell]
    return sum(means) / max(1, jobs)


def print_plan(study: Study, tasks: Mapping[str, Task], out: Path, jobs: int) -> None:
    """Print the tasks of a study, and how long those that are left take.

    The time is that of finished cells (`expected`). Before one is finished, a plain forward and backward of `MEASURED`
    facts and their scoring are timed on the first model, before teaching; every run is taken to need its max_steps, and
    every search for a learning rate all of its trials.
    """
    left = [task for task in tasks.values() if not task.is_done(out)]
    table = Table(title=escape(f"{study.name} -> {out}"), title_justify="left", title_style="bold")
    table.add_column("cell", no_wrap=True)
    for name in ("method", "matched to", "seeds", "done"):
        table.add_column(name)
    for cell in study.cells.values():
        of_cell = [task for task in tasks.values() if task.cell is cell]
        method, regularizer = resolve(cell.values.get("method", "ssiuu"), cell.values.get("regularizer", "none"))
        match = cell.match and f"{'steps' if cell.match.steps else 'distance'} of {cell.match.cell}"
        table.add_row(*map(escape, (
            cell.name,
            method.name if regularizer.name == "none" else f"{method.name} + {regularizer.name}",
            match or "",
            ", ".join(str(task.seed) for task in of_cell),
            str(sum(task not in left for task in of_cell)),
        )))  # fmt: skip
    console.print(table)
    for model, teaching in study.taught.items():
        what = f"{teaching.model} is taught first{f' ({model})' if model else ''}: {teaching.steps} steps"
        console.print(what, markup=False)
    names = ", ".join(attack.name for attack in study.attacks) or "none"
    console.print(f"attacks of each: {names}", markup=False, soft_wrap=True)
    took = _time(study, left, tasks, out, jobs)
    console.print(f"{len(left)} of {len(tasks)} tasks are to be run; {took}", markup=False, soft_wrap=True)


def _time(study: Study, left: list[Task], tasks: Mapping[str, Task], out: Path, jobs: int) -> str:
    seconds = expected(left, tasks.values(), out, jobs)
    if seconds is not None:
        return f"about {duration(seconds)}, by the finished ones"
    cell = next(iter(study.cells.values()))
    try:
        rates = _measure(study, cell)
    except (ValueError, OSError) as error:
        return f"time unknown: {error}"
    most = sum(_most(study, task, rates) for task in left) / max(1, jobs)
    return f"at most about {duration(most)} (a measured step, and max_steps for every run)"


class Rates(NamedTuple):
    """Seconds.

    Attributes:
        sample: forward and backward of one sample.
        fact: scoring of one fact.
    """

    sample: float
    fact: float


def _measure(study: Study, cell: Cell) -> Rates:
    options = cell.options(study.given.seeds[0])
    model, tokenizer = load_model(options.model, **options.loading())
    facts = planned_split(study, cell, options.seed).retain[:MEASURED]
    protocol = Protocol.of(options, model, tokenizer)
    samples = protocol.prompts.encode_facts(facts)
    batch = {name: tensor.to(model.device) for name, tensor in protocol.prompts.collate(samples).items()}

    def seconds(work) -> float:
        work()  # the first time is longer than those after it
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / len(facts)

    step = seconds(lambda: model(**batch, use_cache=False).loss.backward())
    return Rates(step, seconds(lambda: protocol.score(model, facts)))


def _most(study: Study, task: Task, rates: Rates) -> float:
    """Seconds of a task at most, penalties and the optimizer's own time left out."""
    if task.cell is None:
        teaching = next(options for model, options in study.taught.items() if taught_name(model) == task.name)
        return teaching.steps * teaching.batch_size * rates.sample
    options = task.cell.options(task.seed)
    split = planned_split(study, task.cell, task.seed)
    forget, watched = len(split.forget), len(split.forget) + min(len(split.retain), options.evaluation_facts)
    forget_batch = options.forget_batch or forget
    samples = options.max_steps * options.accumulate * (forget_batch + (options.retain_batch or forget_batch))
    scored = options.max_steps // options.evaluate_every * watched
    runs = task.cell.match.trials if task.cell.match and task.cell.match.steps else 1
    samples, scored = samples * runs, (scored + 2 * sum(map(len, split))) * runs
    for attack in study.attacks:
        samples += attack.steps * attack.batch_size
        scored += (attack.steps // attack.evaluate_every + 1) * forget
    if study.diagnosis is not None:
        samples += 2 * forget
    return samples * rates.sample + scored * rates.fact


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def duration(seconds: float) -> str:
    """In words: "40 s", "12 min", "3.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
