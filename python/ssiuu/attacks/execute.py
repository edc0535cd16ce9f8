"""Attacks on one model, one after the other."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from ..progress import Job
from .attack import Attack
from .attacked import Attacked
from .pool import Pool
from .quantisation import quantise
from .retraining import retrain


def execute(attacks: Sequence[Attack], attacked: Attacked, bar: Job) -> Iterator[tuple[Attack, dict[str, Any]]]:
    """Run attacks, each on the model as it is.

    Args:
        attacks: which `Attack.check` and `Attack.check_data` accept, with a pool each (`Attack.on`).
        bar: moved on by `length` of the attacks.

    Yields:
        Each attack with its result: kind, fraction, learning_rate, seed, tuning, options, pool (name, definition, size,
        indices, of), seen and unseen (indices of forget facts), steps (a list of scores, step 0 being before the
        attack), flat, max_fs, max_unseen_fs (the attack's FS), seconds.

    Raises:
        ValueError: an empty pool, or one that gives an attack no fact to train on, before any attack.
        DivergedError: a loss or gradient that is not finite.
    """
    if not attacks:
        return
    model, protocol = attacked.load()
    before = protocol.score(model, attacked.forget)
    del model  # the attack has one of its own
    pools = {name: Pool.choose(name, before) for name in {attack.pool for attack in attacks}}
    for attack in attacks:
        if attack.what.on_facts:
            pools[attack.pool].check(attack.fraction)
    for attack in attacks:
        started = time.perf_counter()
        run = retrain if attack.what.trains else quantise
        course = run(attacked, attack, pools[attack.pool], before, bar)
        yield (
            attack,
            {
                "kind": attack.kind,
                "fraction": attack.fraction,
                "learning_rate": attack.learning_rate,
                "seed": attack.seed,
                "tuning": attack.tuning if attack.what.trains else None,
                "options": attack.options,
                **course.as_json(),
                "seconds": time.perf_counter() - started,
            },
        )


def length(attacks: Sequence[Attack]) -> int:
    """Of the progress bar of these attacks."""
    return sum(attack.steps if attack.what.trains else 1 for attack in attacks)
