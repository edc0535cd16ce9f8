"""Per-fact stopping: a forget fact that is forgotten leaves the loss until it is answered again."""

from __future__ import annotations

import torch

from ..evaluation.likelihood import FactScores


class StoppedFacts:
    """The forget facts that have left the loss, as a run's evaluations find them.

    A fact with options leaves when it is answered wrongly and its margin is at or below `-margin`; one without options
    when its score is at or below the run's threshold. It comes back when it is answered right, or scored above the
    threshold. Before the first evaluation all facts are in the loss.

    Args:
        margin: log-likelihood per token by which a fact has to be answered wrongly, at least 0.

    Attributes:
        ids: the facts' places in the forget set, in order.
    """

    def __init__(self, margin: float):
        self.margin = margin
        self.ids: list[int] = []

    def observe(self, scores: FactScores, threshold: float) -> None:
        """Take note of the scores of all forget facts.

        Args:
            threshold: the run stops when their mean is at or below it. Where it is below 0, so that a run goes on after
                everything is forgotten, a fact is forgotten at 0.
        """
        wrong = scores.score <= max(threshold, 0.0)
        out = torch.zeros_like(wrong)
        out[self.ids] = True
        by_enough = wrong & (scores.margin <= -self.margin) if self.margin else wrong
        self.ids = (by_enough | (out & wrong)).nonzero().flatten().tolist()
