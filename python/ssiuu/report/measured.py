"""What is measured of each run of a study: one number per quantity, and none where there is none."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple, TypeVar

from ..attacks.kinds import AttackGroup
from ..runs.read import RunRecord, read_runs
from ..training.step_log import MAX_STEPS
from .groups import attack_groups, attack_summary, attacks_in

Key = TypeVar("Key")


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
DIAGNOSIS = (
    Quantity("d_plus", "Diagnosis", "D+, erased", ".3g"),
    Quantity("d_minus", "Diagnosis", "D-, hidden", ".3g"),
    Quantity("lens_lowest", "Diagnosis", "logit lens: share of facts ahead, lowest layer"),
    Quantity("cka_lowest", "Diagnosis", "CKA with the original on forget facts, lowest layer", ".3f"),
)
COST = (
    Quantity("seconds_per_step", "Cost", "seconds per step", ".3g"),
    Quantity("memory_gib", "Cost", "peak memory, GiB", ".3g"),
)


def measure_runs(paths: Mapping[Key, Path]) -> tuple[list[Quantity], dict[Key, dict[str, float]]]:
    """The quantities that some of these finished runs have, and of each run key -> value; missing ones are left out."""
    records = {name: read_runs([path])[0] for name, path in paths.items()}
    groups = {group: _attack_quantities(group) for group in attack_groups(records.values())}
    values = {name: _measure(record, groups) for name, record in records.items()}
    attacks = [quantity for quantities in groups.values() for quantity in quantities]
    known = {key for found in values.values() for key in found}
    counts = {entry["count"] for record in records.values() for entry in (record.ablation or {}).get("ablated", ())}
    ablations = [_ablation_quantity(count, which) for count in sorted(counts) for which in ("hidden", "random")]
    every = (*RUN, *SCORES, *attacks, *DIAGNOSIS, *ablations, *COST)
    return [quantity for quantity in every if quantity.key in known], values


def _attack_quantities(group: AttackGroup) -> tuple[Quantity, Quantity]:
    name, section = re.sub(r"[^\w.]+", "-", group.title).strip("-"), "Attacks, highest value"
    return (
        Quantity(f"{name}-fs", section, f"{group.title}: FS, unseen facts"),
        Quantity(f"{name}-margin-gain", section, f"{group.title}: margin gained, unseen facts"),
    )


def _ablation_quantity(count: int, which: str) -> Quantity:
    neurons = {"hidden": f"{count} neurons of largest D-", "random": f"{count} random neurons"}[which]
    return Quantity(f"ablation-{count}-{which}", "Ablation: margin gained with neurons at zero", neurons)


def _measure(record: RunRecord, groups: Mapping[AttackGroup, Iterable[Quantity]]) -> dict[str, float]:
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
    if record.lens:
        found["lens_lowest"] = min(record.lens["after"]["share"], default=None)
    if record.cka:
        layers = [value for value in record.cka.get("forget", ()) if value is not None]
        found["cka_lowest"] = min(layers, default=None)
    for entry in (record.ablation or {}).get("ablated", ()):
        for which in ("hidden", "random"):
            if "margin" in entry[which]:
                gained = entry[which]["margin"] - record.ablation["none"]["margin"]
                found[_ablation_quantity(entry["count"], which).key] = gained
    for group, (score, gain) in groups.items():
        summary = attack_summary(record, group)
        found[score.key] = summary.get("max_unseen_fs")
        highest = summary.get("max_unseen_margin")
        if highest is not None:
            before = {a["seed"]: a["steps"][0]["unseen_margin"] for a in attacks_in(record, group)}
            found[gain.key] = highest - fmean(before.values())
    return {key: float(value) for key, value in found.items() if value is not None}
