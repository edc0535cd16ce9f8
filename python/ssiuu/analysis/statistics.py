"""Bootstrap intervals over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

LEVEL, RESAMPLES = 0.95, 10_000
FEW = 5  # seeds, below which a percentile interval is too narrow to rely on


class Interval(NamedTuple):
    """A mean over seeds and its interval.

    Attributes:
        mean: of the values.
        low, high: the interval; None where there is one value.
        count: number of values.
    """

    mean: float
    low: float | None
    high: float | None
    count: int


def bootstrap(
    values: Sequence[float], *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Interval | None:
    """The mean and its percentile bootstrap interval (Efron 1979): quantiles of the means of resamples.

    With n values there are at most `n^n` resamples, and the interval is too narrow for few of them: from the three
    values a, b, c it cannot leave [min, max].

    Args:
        values: one per seed.
        level: of the interval, in (0, 1).
        resamples: how many are drawn.
        seed: of the draw; the same values and seed give the same interval.

    Returns:
        None where there is no value.

    Raises:
        ValueError: a value that is not finite, or a level or number out of range.
    """
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"level={level}, resamples={resamples}; expected a level in (0, 1) and at least one resample")
    found = np.asarray(values, dtype=np.float64)
    if not np.isfinite(found).all():
        raise ValueError(f"values={list(values)} are not finite; leave out seeds without a value")
    if len(found) == 0:
        return None
    mean = float(found.mean())
    if len(found) == 1:
        return Interval(mean, None, None, 1)
    draws = np.random.default_rng(seed).integers(len(found), size=(resamples, len(found)))
    low, high = np.quantile(found[draws].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high), len(found))


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float], **options) -> Interval | None:
    """`bootstrap` of the differences from a baseline, seed by seed; seeds that one of them lacks are left out.

    Args:
        values, baseline: seed -> value.
        options: of `bootstrap`.
    """
    return bootstrap([values[seed] - baseline[seed] for seed in values if seed in baseline], **options)
