"""Correlations of attributions against their definitions, in plain loops."""

import math
from itertools import pairwise

import pytest
import torch

from ssiuu.analysis.drift import drift, mean_attributions, pearson, spearman
from ssiuu.analysis.influence import mean_influence
from ssiuu.analysis.measure import measure_influence
from tests.support.models import tiny_batch, tiny_model
from tests.toolkit.analysis.test_measure import brute_force


def correlation(x, y):
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    product = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return product / math.sqrt(sum((a - mean_x) ** 2 for a in x) * sum((b - mean_y) ** 2 for b in y))


def ranks(x):
    """1 for the smallest; equal values have the mean of the places that they take."""
    return [sum(b < a for b in x) + (1 + sum(b == a for b in x)) / 2 for a in x]


def test_equals_the_definitions():
    x, y = torch.randn(2, 60, dtype=torch.float64).round(decimals=1)  # some are equal
    y += 0.5 * x
    assert len(x.unique()) < 60
    assert pearson(x, y) == pytest.approx(correlation(x.tolist(), y.tolist()), rel=1e-9)
    assert spearman(x, y) == pytest.approx(correlation(ranks(x.tolist()), ranks(y.tolist())), rel=1e-9)


def test_each_pair_of_models_by_its_name():
    models = torch.randn(3, 50, dtype=torch.float64).cumsum(0)
    original, unlearned, attacked = models
    found = drift(original, unlearned, attacked)
    assert found["pearson"] == {
        "unlearned_attacked": pearson(unlearned, attacked),
        "original_unlearned": pearson(original, unlearned),
        "original_attacked": pearson(original, attacked),
    }
    assert found["spearman"]["original_attacked"] == spearman(original, attacked)
    assert len(set(found["pearson"].values())) == 3


def test_the_histogram_has_every_neuron_where_its_value_is():
    models = torch.randn(3, 400, dtype=torch.float64) ** 3 * torch.tensor([[1.0], [0.1], [10.0]])
    models[:, :7] = 0
    histogram = drift(*models)["histogram"]
    edges = histogram["edges"]
    assert edges == sorted(edges)
    assert edges[0] < models.min() < models.max() < edges[-1]
    for name, values in zip(("original", "unlearned", "attacked"), models.tolist(), strict=True):
        expected = [sum(low <= x < high for x in values) / len(values) for low, high in pairwise(edges)]
        assert histogram[name] == pytest.approx(expected)
        assert sum(histogram[name]) == pytest.approx(1)


def test_attributions_that_do_not_vary_have_no_correlation():
    x = torch.randn(9)
    assert drift(x, torch.zeros(9), x)["spearman"] == {
        "unlearned_attacked": None,
        "original_unlearned": None,
        "original_attacked": pytest.approx(1),
    }


def test_other_neurons_are_refused():
    with pytest.raises(ValueError, match=r"original \[4\], unlearned \[4\], attacked \[5\]"):
        drift(torch.randn(4), torch.randn(4), torch.randn(5))


def test_attributions_are_means_over_facts_of_sums_over_tokens():
    model, batch = tiny_model(dtype=torch.float64).eval(), tiny_batch()
    measured = measure_influence(model, [batch])
    expected = brute_force(model, batch)
    layers = [layer.nansum(1).mean(0) for kind in measured for layer in expected[kind]]
    found = mean_attributions(measured)
    assert torch.allclose(found, torch.cat(layers), rtol=1e-5, atol=1e-6 * found.abs().max())


def test_means_of_sums():
    from ssiuu_kernels import NeuronScores

    assert mean_influence(NeuronScores(*torch.tensor([[[1.0], [2.0]], [[0.0], [0.0]], [[4.0], [7.0]]]))).sum == 5.5
