"""Controls that are matched to another run: in the number of steps to their stop, or in distance."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from ..options import UnlearnOptions
from ..progress import console
from ..runs.folder import COMPLETE, Run
from ..runs.study import Match
from ..training.step_log import MAX_STEPS, DivergedError
from .unlearn import unlearn

FACTOR = 2.0  # between learning rates until one is too low and one too high


def unlearn_to_end(options: UnlearnOptions, folder: Path) -> Run:
    """A finished run: the one that is there, continued, or a new one."""
    started = (folder / "config.json").is_file()
    if started and Run(folder).config()["status"] == COMPLETE:
        return Run(folder)
    return unlearn(options, folder, resume=started)


def unlearn_matched(options: UnlearnOptions, match: Match, other: Run, folder: Path, trials: Path) -> Run:
    """A finished run that is matched to another one.

    Args:
        options: of the run, whose learning rate is where a search begins.
        other: the finished run to match.
        folder: of the run.
        trials: folder of the runs of a search.

    Raises:
        ValueError: the other run did not come to its stop, or no learning rate was found.
    """
    last = other.last_metrics()
    if match.distance:
        if "distance" not in last:
            raise ValueError(f"{other.path} logged no distance; run it with log_distance")
        return unlearn_to_end(options.replace(stop_distance=last["distance"]), folder)
    if last["stopped_by"] == MAX_STEPS:
        raise ValueError(
            f"{other.path} reached max_steps={last['step']} before its stop, so its steps cannot be matched; raise "
            "max_steps"
        )
    return _search(options, match, last["step"], folder, trials)


def _search(options: UnlearnOptions, match: Match, steps: int, folder: Path, trials: Path) -> Run:
    """The run that comes to its stop in so many steps, by bisection on the logarithm of the learning rate.

    From the options' own learning rate, by `FACTOR` up or down until one trial is too slow and one too fast. Each trial
    is a run, ended once it is too slow; its rate follows from those before it, so a search that was broken off goes on
    where it was. Rejected trials keep their records and not their models.
    """
    if (folder / "config.json").is_file():
        return Run(folder)  # a trial becomes the run when it is finished
    allowed = max(options.evaluate_every, round(match.tolerance * steps))
    low, high, rate = 0.0, math.inf, options.learning_rate
    tried = []
    for number in range(1, match.trials + 1):
        trial = trials / str(number)
        needed = _steps_needed(options.replace(learning_rate=rate, max_steps=steps + allowed), trial)
        console.print(f"learning rate {rate:.3g}: {_said(needed)}, wanted {steps}", markup=False)
        if isinstance(needed, int) and abs(needed - steps) <= allowed:
            trial.rename(folder)
            return Run(folder)
        shutil.rmtree(Run(trial).model, ignore_errors=True)
        tried.append(f"{rate:.3g} ({_said(needed)})")
        low, high = (rate, high) if needed == math.inf else (low, rate)
        rate = low * FACTOR if high == math.inf else high / FACTOR if low == 0 else math.sqrt(low * high)
    raise ValueError(
        f"no learning rate in {match.trials} trials needs {steps} +- {allowed} steps: {', '.join(tried)}; allow more "
        "trials or a larger tolerance"
    )


def _steps_needed(options: UnlearnOptions, folder: Path) -> float:
    """Steps to the stop; infinity where it takes more than are allowed, 0 where the run diverges."""
    try:
        last = unlearn_to_end(options, folder).last_metrics()
    except DivergedError:
        return 0.0
    return math.inf if last["stopped_by"] == MAX_STEPS else last["step"]


def _said(needed: float) -> str:
    return "too slow" if needed == math.inf else f"{needed} steps" if needed else "diverged"
