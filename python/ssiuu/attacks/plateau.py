"""When an attack has brought back what it can: the curve of the unseen facts is flat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# What has to rise by more than this to be a rise: a score, which one fact in a hundred moves by as much, and the mean
# margin, in nats per token (facts without options have none).
TOLERANCE = {"unseen_fs": 0.01, "unseen_margin": 0.05}


def is_flat(steps: Sequence[Mapping[str, float]], evaluations: int) -> bool:
    """Whether the unseen facts' score and margin have stopped rising.

    Neither the best value nor the latest one is more than `TOLERANCE` above what it was `evaluations` ago. The latest
    counts too: a curve that climbs back from a dip has not ended.

    Args:
        steps: the evaluations so far, the one before the attack included.
    """
    if len(steps) <= evaluations:
        return False
    for name, tolerance in TOLERANCE.items():
        curve = [step[name] for step in steps if name in step]
        earlier = curve[:-evaluations]
        if curve and max(max(curve) - max(earlier), curve[-1] - earlier[-1]) > tolerance:
            return False
    return True
