"""Attacks of runs in groups that differ in learning rate and seed alone, which tables and figures summarise."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from ..attacks.kinds import AttackGroup
from ..runs.read import RunRecord

SCORES = ("unseen_fs", "unseen_probability", "unseen_margin", "fs")


def attack_groups(records: Iterable[RunRecord]) -> list[AttackGroup]:
    """The groups of attacks that the runs have, in the order of reports.

    Raises:
        ValueError: an attack of an unknown kind.
    """
    found = {AttackGroup.of(attack) for record in records for attack in record.attacks}
    return sorted(found, key=lambda group: group.order)


def attacks_in(record: RunRecord, group: AttackGroup) -> list[dict]:
    """A run's attacks of a group."""
    return [attack for attack in record.attacks if AttackGroup.of(attack) == group]


def attack_summary(record: RunRecord, group: AttackGroup) -> dict[str, Any]:
    """A group's result, as the paper has it: the highest value over steps and learning rates, as a mean over seeds.

    Seeds that lack a learning rate of the group are left out: their highest value is over fewer attacks.

    Returns:
        Nothing where no attack was run; otherwise attacks, seeds, rates, facts (how many the scores are of), steps
        (the fewest and the most), and of every score "max_..." (the mean, None where no seed has all rates) and
        "sd_..." (the standard deviation over seeds; from two seeds on).
    """
    attacks = attacks_in(record, group)
    if not attacks:
        return {}
    rates = {attack["learning_rate"] for attack in attacks}
    by_seed: dict[int, list[dict]] = {}
    for attack in attacks:
        by_seed.setdefault(attack["seed"], []).append(attack)
    whole = [found for found in by_seed.values() if {attack["learning_rate"] for attack in found} == rates]
    ends = [attack["steps"][-1]["step"] for attack in attacks]
    summary = {
        "attacks": len(attacks),
        "seeds": len(whole),
        "rates": len(rates),
        "facts": len(attacks[0]["unseen"]),
        "steps": [min(ends), max(ends)],
    }
    for name in SCORES:
        if all(name in attack["steps"][0] for attack in attacks):
            maxima = [max(step[name] for attack in found for step in attack["steps"]) for found in whole]
            summary[f"max_{name}"] = statistics.fmean(maxima) if maxima else None
            if len(maxima) > 1:
                summary[f"sd_{name}"] = statistics.stdev(maxima)
    return summary


def mean_curve(attacks: Sequence[dict], name: str) -> tuple[list[int], list[float]]:
    """Steps that all the attacks have a value of `name` at, and its mean over the attacks there.

    An attack that ended because its curve was flat keeps its last value.
    """
    curves = [{step["step"]: step[name] for step in attack["steps"] if name in step} for attack in attacks]
    steps = sorted({step for curve in curves for step in curve})
    for attack, curve in zip(attacks, curves, strict=True):
        if attack["flat"] and curve:
            last = max(curve)
            curve.update({step: curve[last] for step in steps if step > last})
    kept = [step for step in steps if all(step in curve for curve in curves)]
    return kept, [sum(curve[step] for curve in curves) / len(curves) for step in kept]
