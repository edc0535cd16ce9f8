"""Which facts a model knows."""

from __future__ import annotations

from collections.abc import Sequence

from ..data.facts import Fact
from .likelihood import FactScores


def known_facts(scores: FactScores, facts: Sequence[Fact], min_probability: float) -> list[Fact]:
    """The facts that the model answers, with at least this probability, surest first."""
    order = scores.probability.argsort(descending=True).tolist()
    return [facts[i] for i in order if scores.score[i] == 1 and scores.probability[i] >= min_probability]
