"""The names of the engines, and which one a loss took."""

from __future__ import annotations

from typing import NamedTuple

ONE_BACKWARD, TWO_BACKWARD, CHECKED = ENGINES = ("one-backward", "two-backward", "checked")
PLAIN = "plain"  # autograd alone: no target gradient is asked for


class GradientPath(NamedTuple):
    """How the gradients of the last unlearning loss are made.

    Attributes:
        engine: "one-backward", "two-backward", or "plain" where no target gradient is asked for.
        reason: why, in one sentence.
    """

    engine: str
    reason: str
