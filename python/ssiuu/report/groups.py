"""Attacks of runs in groups that differ in learning rate and seed alone, which tables and figures average over."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..attacks.kinds import ATTACK_KINDS, get_kind
from ..runs.read import RunRecord


def attack_groups(records: Iterable[RunRecord]) -> dict[tuple[str, float | None], str]:
    """(kind, fraction) -> title, of every group of attacks that the runs have, in the order of `ATTACK_KINDS`.

    Raises:
        ValueError: an attack of an unknown kind.
    """
    found = {(get_kind(attack["kind"]), attack["fraction"]) for record in records for attack in record.attacks}
    order = list(ATTACK_KINDS.values())
    ordered = sorted(found, key=lambda group: (order.index(group[0]), group[1] or 0))
    return {(kind.name, fraction): kind.title(fraction) for kind, fraction in ordered}


def attack_summary(record: RunRecord, group: tuple[str, float | None]) -> dict[str, float]:
    """Highest values during attacks, as means over a group's learning rates and seeds; empty where none was run."""
    attacks = record.attacks_of(*group)
    if not attacks:
        return {}
    found = {"attacks": len(attacks)}
    for name in ("fs", "unseen_fs", "forget_probability", "unseen_probability"):
        maxima = [max((step[name] for step in attack["steps"] if name in step), default=None) for attack in attacks]
        if None not in maxima:
            found[f"max_{name}"] = sum(maxima) / len(maxima)
    return found


def mean_curve(attacks: Sequence[dict], name: str) -> tuple[list[int], list[float]]:
    """Steps that all the attacks have measured `name` at, and its mean over the attacks there."""
    curves = [{step["step"]: step[name] for step in attack["steps"] if name in step} for attack in attacks]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    return steps, [sum(curve[step] for curve in curves) / len(curves) for step in steps]
