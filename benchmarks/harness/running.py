"""From a case to its rows: the gate first, then times of those that passed it."""

from __future__ import annotations

import functools
import statistics

from .cases import BudgetCase, Case, StepCase
from .gate import errors
from .memory import MEASURABLE
from .record import Row, gate_row, make_row, missing_row
from .stepping import Turn, largest_within, take_turn, time_steps
from .timing import Times, peak_bytes, summarise, time_case


@functools.singledispatch
def run_case(case: Case, runs: int, copy: float) -> list[Row]:
    """The rows of one case.

    Args:
        runs: timed runs of each candidate.
        copy: copy bandwidth, bytes per second.
    """
    found = errors(case)
    passed = [name for name, error in found.items() if error <= case.tolerance]
    times = time_case(case, passed, runs)
    ours = times.get(next(iter(case.candidates)))
    rows = [
        make_row(case, name, error, times.get(name), ours, copy, peak_bytes(case, name) if name in times else None)
        for name, error in found.items()
    ]
    return rows + [missing_row(case, name, reason) for name, reason in case.missing.items()]


@run_case.register
def _(case: StepCase, runs: int, copy: float) -> list[Row]:
    found = case.errors()
    turns = time_steps(case, [name for name, error in found.items() if error <= case.tolerance], runs)
    times = {name: _summary(taken) for name, taken in turns.items() if taken is not None}
    ours = times.get(next(iter(case.candidates)))
    rows = []
    for name, error in found.items():
        if name in turns and turns[name] is None:
            rows.append(missing_row(case, name, "out of memory"))
            continue
        rows.append(make_row(case, name, error, times.get(name), ours, copy))
        if name in times:
            rows[-1] |= _of_turns(turns[name], case.weight_bytes)
    return rows


def _summary(turns: list[Turn]) -> Times:
    return summarise([step for turn in turns for step in turn.steps])


def _of_turns(turns: list[Turn], weight_bytes: int) -> Row:
    """Peaks, with and without the weights, and how much slower the second turn was than the first."""
    first, second = (statistics.median(step.device for step in turn.steps) for turn in turns)
    row = {"second_turn_over_first": second / first}
    if turns[0].peak_bytes is None:
        return row
    peak = max(turn.peak_bytes for turn in turns)
    return row | {"peak_bytes": peak, "peak_bytes_above_weights": peak - weight_bytes}


@run_case.register
def _(case: BudgetCase, runs: int, copy: float) -> list[Row]:
    if not MEASURABLE:
        return [missing_row(case, name, "peak memory cannot be measured here") for name in case.candidates]
    return [_budget_row(case, name, error) for name, error in case.errors().items()]


def _budget_row(case: BudgetCase, name: str, error: float) -> Row:
    def peak_of(layers: int) -> float:
        turn = take_turn(functools.partial(case.candidates[name], layers), steps=1)
        return float("inf") if turn is None else turn.peak_bytes

    if not error <= case.tolerance:
        return gate_row(case, name, error, passed=False)
    layers, peak = largest_within(case.budget, peak_of, case.too_many)
    if layers == 0:
        return missing_row(case, name, "not one layer fits")
    found = {"layers": layers, "parameters": case.parameters(layers), "peak_bytes": peak}
    return gate_row(case, name, error, passed=True) | found
