"""What is measured of each run of a study: one number per quantity, and none where there is none."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

from ..attacks.kinds import ATTACK_KINDS, get_kind
from ..runs.read import RunRecord, read_runs
from ..training.step_log import MAX_STEPS


class Quantity(NamedTuple):
    """Something that is measured of a run.

    Attributes:
        key: in results.json and of its figure's file.
        section: of the tables.
        label: in tables and figures.
        digits: how it is written.
    """

    key: str
    section: str
    label: str
    digits: str = ".2f"


RUN = (
    Quantity("reached_stop", "Unlearning", "reached its stop (share of runs)"),
    Quantity("steps", "Unlearning", "steps", ".1f"),
    Quantity("learning_rate", "Unlearning", "learning rate", ".2g"),
    Quantity("distance", "Unlearning", "distance from the original weights", ".3g"),
)
SCORES = (
    Quantity("fs", "Scores", "FS"),
    Quantity("rs", "Scores", "RS (test set)"),
    Quantity("retain_score", "Scores", "retain score"),
    Quantity("forget_probability", "Scores", "P(answer), forget", ".2g"),
    Quantity("forget_margin", "Scores", "margin, forget"),
    Quantity("retain_margin", "Scores", "margin, retain"),
    Quantity("test_margin", "Scores", "margin, test"),
)
EARLIER_NAMES = {"rs": "retain_score", "test_rs": "rs", "test_retain_margin": "test_margin"}
INFLUENCE = (
    Quantity("d_plus", "Influence variation", "D+, erased", ".3g"),
    Quantity("d_minus", "Influence variation", "D-, hidden", ".3g"),
)
COST = (
    Quantity("seconds_per_step", "Cost", "seconds per step", ".3g"),
    Quantity("memory_gib", "Cost", "peak memory, GiB", ".3g"),
)


def measure_run(path: Path) -> dict[str, float]:
    """Key -> value of a finished run; a quantity that it does not have is left out."""
    (record,) = read_runs([path])
    last = record.metrics[-1] if record.metrics else {}
    found = {
        "steps": record.steps,
        "learning_rate": record.config["learning_rate"],
        "distance": last.get("distance"),
        "seconds_per_step": median(line["seconds"] for line in record.metrics) if record.metrics else None,
        "memory_gib": max((line["peak_memory_bytes"] for line in record.metrics), default=0) / 2**30 or None,
        "reached_stop": float(last["stopped_by"] != MAX_STEPS) if "stopped_by" in last else None,
    }
    if record.evaluation:
        after = record.evaluation["after"]
        if "retain_score" not in after:  # of before the scores had the paper's names
            after = {EARLIER_NAMES.get(name, name): value for name, value in after.items()}
        found |= {quantity.key: after.get(quantity.key) for quantity in SCORES}
    if record.diagnosis:
        found |= record.diagnosis["sum"]
    found |= _attacked(record)
    return {key: float(value) for key, value in found.items() if value is not None}


def quantities(keys: Iterable[str]) -> list[Quantity]:
    """Those of these keys, in the order of the tables."""
    keys = set(keys)
    attacks = map(_attack_quantity, sorted((key for key in keys if "/" in key), key=_attack_order))
    return [quantity for quantity in (*RUN, *SCORES, *attacks, *INFLUENCE, *COST) if quantity.key in keys]


# Of an attack's steps: what is measured, its label, and whether it counts from before the attack. Facts that an attack
# does not train on count where it has some: those that it trains on come back in any case.
_UNSEEN = {"unseen_fs": ("FS, unseen facts", False), "unseen_margin": ("margin gained, unseen facts", True)}
_ALL = {"fs": ("FS", False), "forget_margin": ("margin gained", True)}


def _attacked(record: RunRecord) -> dict[str, float]:
    """Of each kind and fraction: the highest value over the run and the learning rates, as a mean over the seeds."""
    found = {}
    for kind, fraction in {(attack["kind"], attack["fraction"]) for attack in record.attacks}:
        for name, (_, gained) in (_UNSEEN if get_kind(kind).on_forget_facts else _ALL).items():
            by_seed: dict[int, list[float]] = {}
            for attack in record.attacks_of(kind, fraction):
                values = [step[name] for step in attack["steps"] if name in step]
                if values:
                    by_seed.setdefault(attack["seed"], []).append(max(values) - gained * values[0])
            if by_seed:
                which = kind if fraction is None else f"{kind}-p{fraction:g}"
                found[f"{which}/{name}"] = mean(map(max, by_seed.values()))
    return found


def _attack_order(key: str) -> tuple[int, float, int]:
    kind, fraction, name = _parts(key)
    return [*ATTACK_KINDS].index(kind), fraction or 0.0, [*_UNSEEN, *_ALL].index(name)


def _attack_quantity(key: str) -> Quantity:
    kind, fraction, name = _parts(key)
    return Quantity(key, "Attacks, highest value", f"{get_kind(kind).title(fraction)}: {(_UNSEEN | _ALL)[name][0]}")


def _parts(key: str) -> tuple[str, float | None, str]:
    which, _, name = key.partition("/")
    kind, _, fraction = which.partition("-p")
    return kind, float(fraction) if fraction else None, name
