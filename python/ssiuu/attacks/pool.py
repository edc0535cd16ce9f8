"""The facts that an attack is judged by: the pool, what is drawn from it to train on, and the rest."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from ..evaluation.likelihood import FactScores

POOLS = {
    "wrong": "the forget facts that the unlearned model answers wrongly, so that FS is 0 before the attack (FaithUn)",
    "all": "all forget facts (TOFU)",
}


class Pool(NamedTuple):
    """The facts that an attack is judged by.

    Attributes:
        name: of `POOLS`.
        indices: which of the forget facts.
        of: how many forget facts there are.
    """

    name: str
    indices: list[int]
    of: int

    @classmethod
    def choose(cls, name: str, scores: FactScores) -> Pool:
        """The pool of this name.

        Args:
            scores: the unlearned model's, of all forget facts.

        Raises:
            ValueError: the model answers all of them, and the pool is empty.
        """
        wrong = (scores.score == 0).tolist()
        indices = [i for i, missed in enumerate(wrong) if missed or name == "all"]
        if not indices:
            raise ValueError(
                f"pool={name!r} is empty: the unlearned model answers all {len(wrong)} forget facts rightly, so there "
                "is nothing for an attack to bring back; unlearn further, or use --pool all"
            )
        return cls(name, indices, len(wrong))

    def draw(self, fraction: float, seed: int) -> list[int]:
        """The indices of the facts to train on: `floor(fraction * n)` of the pool's n, in order."""
        self.check(fraction)
        return sorted(random.Random(seed).sample(self.indices, number_of(fraction, len(self.indices))))

    def check(self, fraction: float) -> None:
        """Raise a ValueError for a fraction that gives no fact to train on."""
        check_fraction(fraction, len(self.indices), f"the {len(self.indices)} facts of pool {self.name!r}")

    def without(self, seen: Sequence[int]) -> list[int]:
        """The indices of the facts that are not among `seen`."""
        return [i for i in self.indices if i not in set(seen)]

    def as_json(self) -> dict[str, Any]:
        """For an attack's file."""
        return {"name": self.name, "definition": POOLS[self.name], "size": len(self.indices), **self._asdict()}


def number_of(fraction: float, size: int) -> int:
    """`floor(fraction * size)` of the decimal number: 0.29 of 100 is 29, though the float product is below it."""
    return math.floor(Fraction(str(fraction)) * size)


def check_fraction(fraction: float, size: int, what: str) -> None:
    """Raise a ValueError unless this fraction of `size` facts is at least one.

    Args:
        what: has that many facts, in the message.
    """
    if size < 2:
        raise ValueError(
            f"fraction={fraction} of {what}: an attack that trains on some and scores the rest needs two; choose a "
            "kind that trains on no facts, or a larger pool"
        )
    if number_of(fraction, size) < 1:
        digits = len(str(size)) + 1
        least = math.ceil(10**digits / size) / 10**digits
        raise ValueError(
            f"fraction={fraction} of {what} is less than one fact, and the attack trains on floor(p n); use a "
            f"fraction of at least {least:g}"
        )
