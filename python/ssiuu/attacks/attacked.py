"""The model that attacks start from, and what an attack leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from ..data.facts import Fact
from ..evaluation.likelihood import FactScores
from ..evaluation.protocol import Protocol
from ..evaluation.sets import named_means
from .pool import Pool


class Attacked(NamedTuple):
    """An unlearned model, which every attack loads again.

    Attributes:
        load: the model in float32, whatever its files have (updates at 1e-7 vanish in narrower types), and how its
            facts are asked and scored; takes further keyword arguments of `load_model`.
        forget: its forget facts.
    """

    load: Callable[..., tuple[PreTrainedModel, Protocol]]
    forget: Sequence[Fact]


@dataclass
class Course:
    """How an attack went.

    Attributes:
        pool: the facts that it is judged by.
        seen: indices of the forget facts that it trains on.
        steps: the scores of every evaluation, named as in metrics: of all forget facts, and of the unseen ones, which
            are those of the pool that it does not train on.
        flat: whether the unseen facts' curve was flat in the end; None where nobody asked.
    """

    pool: Pool
    seen: list[int]
    steps: list[dict[str, float]] = field(default_factory=list)
    flat: bool | None = None

    @property
    def unseen(self) -> list[int]:
        """Indices of the facts whose score is the attack's FS."""
        return self.pool.without(self.seen)

    def add(self, step: int, scores: FactScores) -> None:
        """Take in the scores of the forget facts at a step."""
        self.steps.append({"step": step, **self.named(scores)})

    def named(self, scores: FactScores) -> dict[str, float]:
        """Means of the scores of the forget facts under the names of metrics."""
        return named_means(scores, "forget") | named_means(scores.of(self.unseen), "unseen")

    def as_json(self) -> dict[str, Any]:
        """For an attack's file."""
        return {
            "pool": self.pool.as_json(),
            "seen": self.seen,
            "unseen": self.unseen,
            "steps": self.steps,
            "flat": self.flat,
            "max_fs": max(step["fs"] for step in self.steps),
            "max_unseen_fs": max(step["unseen_fs"] for step in self.steps),
        }
