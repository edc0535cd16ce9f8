"""The grid of attacks: every fraction, learning rate and seed of some kinds."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from .kinds import get_kind
from .retraining import Attack


def attack_grid(
    kinds: Iterable[str],
    seeds: Iterable[int] = (0,),
    *,
    fractions: Sequence[float] | None = None,
    learning_rates: Sequence[float] | None = None,
    **options,
) -> list[Attack]:
    """Attacks of these kinds at every fraction, learning rate and seed.

    Args:
        kinds: names of `ATTACK_KINDS`.
        fractions, learning_rates: the paper's where None.
        options: of `Attack`.

    Raises:
        ValueError: an unknown kind.
    """
    found = []
    for kind in map(get_kind, kinds):
        which = (fractions or kind.fractions) if kind.on_forget_facts else (None,)
        grid = itertools.product(which, learning_rates or kind.learning_rates, seeds)
        found += [Attack(kind.name, p, rate, seed, **options) for p, rate, seed in grid]
    return found
