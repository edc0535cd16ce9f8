"""Results of versions in which attacks had no pool."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

# A pool of its own in tables: harmful attacks trained on ceil(p n) of all n forget facts, so their rows are not those
# of today's "all".
WHOLE = "whole set, ceil"
DEFINITION = "all forget facts, of which harmful attacks trained on ceil(p n); from an earlier version"


def with_pool(result: Mapping[str, Any], forget: int) -> dict[str, Any]:
    """An attack's result, or an earlier version's in today's form.

    Args:
        result: what the attack's file holds.
        forget: number of forget facts of its run.
    """
    if "pool" in result:
        return dict(result)
    everything = list(range(forget))
    seen = []
    if result["fraction"] is not None:
        drawn = random.Random(result["seed"]).sample(everything, math.ceil(result["fraction"] * forget))
        seen = sorted(drawn)
    return {
        **result,
        "tuning": "full",
        "pool": {"name": WHOLE, "definition": DEFINITION, "size": forget, "indices": everything, "of": forget},
        "seen": seen,
        "unseen": [i for i in everything if i not in seen],
        "steps": [_with_unseen(step) for step in result["steps"]],
        "flat": None,
        "max_unseen_fs": result.get("max_unseen_fs", result["max_fs"]),
    }


def _with_unseen(step: Mapping[str, float]) -> dict[str, float]:
    """Benign attacks had no unseen facts of their own: all forget facts are theirs."""
    if "unseen_fs" in step:
        return dict(step)
    named = {"unseen_fs": "fs", **{f"unseen_{name}": f"forget_{name}" for name in ("probability", "margin")}}
    return {**step, **{new: step[old] for new, old in named.items() if old in step}}
