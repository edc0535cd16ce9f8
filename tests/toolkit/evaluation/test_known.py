"""Which facts a model knows."""

import torch

from ssiuu.evaluation.known import known_facts
from ssiuu.evaluation.likelihood import FactScores


def test_known_facts_are_right_and_sure(facts):
    scores = FactScores(torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([0.3, 0.9, 0.1, 0.5]), torch.zeros(4))
    assert known_facts(scores, facts[:4], 0.2) == [facts[3], facts[0]]
