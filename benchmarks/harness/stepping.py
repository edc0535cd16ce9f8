"""Times and peak memory of training steps, whose candidates have gigabytes of state and so are built in turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .cases import StepCase
from .memory import PeakMemory
from .timing import Elapsed, wall_clock

Build = Callable[[], Callable[[], None]]  # builds a candidate with its state, and returns its step
ROUNDS, MOST_STEPS = 2, 3


class Turn(NamedTuple):
    """What one turn of a candidate found."""

    steps: list[Elapsed]  # those that were timed
    peak_bytes: int | None  # the model included; None where memory cannot be measured


def take_turn(build: Build, steps: int) -> Turn | None:
    """Build a candidate, time its steps after a first one that makes its state, and free it.

    Returns:
        None where it ran out of the device's memory.
    """
    memory = PeakMemory()
    try:
        step = build()
        step()
        memory.reset()
        return Turn([wall_clock(step) for _ in range(steps)], memory.read())
    except torch.cuda.OutOfMemoryError:
        return None


def time_steps(case: StepCase, candidates: list[str], runs: int) -> dict[str, list[Turn] | None]:
    """Two turns each, of half the `runs` but no more than three steps; None where memory ran out.

    The first round goes from last to first and the second from first to last, so that a steady drift of the machine's
    speed cancels, and a candidate's two turns show it; the last one of the case is timed first and last.
    """
    turns: dict[str, list[Turn] | None] = {name: [] for name in candidates}
    for name in [*reversed(candidates), *candidates]:
        if turns[name] is None:
            continue
        turn = take_turn(case.candidates[name], min(MOST_STEPS, max(1, runs // ROUNDS)))
        turns[name] = None if turn is None else [*turns[name], turn]
    return turns


def largest_within(budget: int, peak_of: Callable[[int], float], too_many: int) -> tuple[int, float]:
    """The largest size from 1 to `too_many - 1` whose peak is within the budget, and that peak; (0, 0) if none is."""
    fits, found = 0, 0.0
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        peak = peak_of(middle)
        if peak <= budget:
            fits, found = middle, peak
        else:
            too_many = middle
    return fits, found
