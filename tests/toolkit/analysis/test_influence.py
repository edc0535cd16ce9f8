"""The formulas of influence variation, on numbers that can be checked by hand."""

import pytest
import torch

from ssiuu.analysis.influence import Variation, influence_variation, summarise
from ssiuu_kernels import NeuronScores


def test_mean_inside_and_clamp_outside():
    def scores(largest, smallest):
        return NeuronScores(torch.tensor(largest)[:, None], torch.tensor(smallest)[:, None], torch.zeros(2, 1))

    before = scores([1.0, 3.0], [-1.0, 0.0])
    # D+: samples change by 1 - 0 (a negative maximum counts as none) and 3 - 5; D-: by -1 + 4 and 0 + 0.
    variation = influence_variation(before, scores([-2.0, 5.0], [-4.0, 0.0]))
    assert variation.d_plus.tolist() == [0.0]
    assert variation.d_minus.tolist() == [1.5]
    assert influence_variation(before, scores([-2.0, 1.0], [0.0, 0.0])).d_plus.tolist() == [1.5]


def test_sums_at_the_top():
    layers = torch.arange(6.0).reshape(2, 3)
    variations = {"q": Variation(layers, layers * 2), "k": Variation(layers + 10, layers)}
    summary = summarise(variations, top=2)
    assert summary["sum"] == {"d_plus": 29.0, "d_minus": 18.0}
    assert summary["sum_by_kind"]["q"] == {"d_plus": 9.0, "d_minus": 18.0}
    assert summary["mean_top"]["d_plus"] == {"q": [1.5, 4.5], "k": [11.5, 14.5]}


def test_stacks_of_other_shapes():
    scores = [NeuronScores(*torch.zeros(3, samples, 5)) for samples in (2, 3)]
    with pytest.raises(ValueError, match=r"\[2, 5\] and \[3, 5\]"):
        influence_variation(*scores)
