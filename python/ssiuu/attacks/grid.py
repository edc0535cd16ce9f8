"""The grid of attacks: every fraction, learning rate and seed of some kinds."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from ..options import AttackOptions
from .attack import Attack
from .kinds import ATTACK_KINDS, get_kind, get_tuning

PAPER_SEEDS = (0, 1, 2)


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
        fractions, learning_rates: those of the kind (and of the tuning) where None.
        options: of `Attack`.

    Raises:
        ValueError: an unknown kind or tuning.
    """
    tuning, seeds, found = options.get("tuning", "full"), list(seeds), []
    get_tuning(tuning)
    for kind in map(get_kind, kinds):
        if not kind.trains:
            found.append(Attack(kind.name, **options))
            continue
        which = (fractions or kind.fractions) if kind.on_facts else (None,)
        grid = itertools.product(which, learning_rates or kind.learning_rates[tuning], seeds)
        found += [Attack(kind.name, p, rate, seed, **options) for p, rate, seed in grid]
    return found


def paper_grid(**options) -> list[Attack]:
    """The paper's attacks: harmful at p = 0.1 and 0.3, and benign, each at three rates with three seeds.

    Args:
        options: of `Attack`.
    """
    kinds = [kind for kind in ATTACK_KINDS.values() if kind.in_paper]
    return [
        attack
        for kind in kinds
        for attack in attack_grid([kind.name], PAPER_SEEDS, fractions=kind.paper_fractions, **options)
    ]


def grid_of(options: AttackOptions) -> list[Attack]:
    """The attacks that the options of a command ask for.

    Raises:
        ValueError: an unknown kind or tuning, or the paper's grid beside a choice of what is in it.
    """
    shared = asdict(options)
    chosen = {name: shared.pop(name) for name in ("kind", "fraction", "learning_rate", "seed")}
    if shared.pop("paper_grid"):
        for name, value in chosen.items():
            if value:
                raise ValueError(f"{name}={value} beside paper_grid=True, which sets it; leave one of them out")
        return paper_grid(**shared)
    kinds = chosen["kind"] or [kind.name for kind in ATTACK_KINDS.values() if kind.in_paper]
    grid = {"fractions": chosen["fraction"], "learning_rates": chosen["learning_rate"]}
    return attack_grid(kinds, chosen["seed"] or (0,), **grid, **shared)
