"""Linear CKA against its definition, written out, and the states that it compares."""

import math

import pytest
import torch

from ssiuu.analysis.similarity import MOST, cka_by_layer, drawn_facts, linear_cka, prompt_states
from ssiuu.data.facts import Fact
from tests.support.models import tiny_model


def hsic(k, other):
    """Unbiased, of Gram matrices without diagonals."""
    n, ones = len(k), torch.ones(len(k), dtype=k.dtype)
    first = torch.trace(k @ other)
    second = (ones @ k @ ones) * (ones @ other @ ones) / ((n - 1) * (n - 2))
    third = 2 / (n - 2) * (ones @ k @ other @ ones)
    return (first + second - third) / (n * (n - 3))


def cka(x, y):
    k, other = ((z @ z.T) * (1 - torch.eye(len(z), dtype=z.dtype)) for z in (x, y))
    return (hsic(k, other) / math.sqrt(hsic(k, k) * hsic(other, other))).item()


@pytest.mark.parametrize("n", [4, 5, 30])
def test_equals_the_definition(n):
    x = torch.randn(n, 7, dtype=torch.float64) + 3
    y = x[:, :5] @ torch.randn(5, 9, dtype=torch.float64) + torch.randn(n, 9, dtype=torch.float64)
    assert linear_cka(x, y) == pytest.approx(cka(x, y), rel=1e-9)


def test_turning_scaling_and_moving_change_nothing():
    x = torch.randn(12, 6, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    assert linear_cka(x, 3 * x @ turn + 5) == pytest.approx(1, rel=1e-9)


def test_unrelated_states_have_none_though_facts_are_fewer_than_dimensions():
    found = [linear_cka(torch.randn(12, 500), torch.randn(12, 500)) for _ in range(50)]
    assert abs(sum(found) / len(found)) < 0.1


def test_states_that_do_not_vary_have_none():
    x = torch.randn(6, 2, 3)
    still = torch.ones(6, 2, 3)
    still[:, 1] = x[:, 1]
    assert cka_by_layer(x, still) == [None, pytest.approx(1, rel=1e-6)]


def test_too_few():
    with pytest.raises(ValueError, match=r"\[3, 2\] and \[3, 2\]; expected .* n at least 4"):
        linear_cka(torch.randn(3, 2), torch.randn(3, 2))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_states_are_those_of_the_last_prompt_token(family, prompts, facts):
    model, done = tiny_model(family).eval(), []
    found = prompt_states(model, prompts, facts, progress=done.append)
    assert sum(done) == len(facts)
    for sample, states in zip(prompts.encode_facts(facts), found, strict=True):
        with torch.no_grad():
            output = model(input_ids=torch.tensor([sample.prompt]), output_hidden_states=True, use_cache=False)
        assert torch.allclose(states[0], output.hidden_states[1][0, -1], rtol=1e-4, atol=1e-5)
        assert len(states) == 2


def test_large_sets_are_drawn_from_always_alike():
    facts = [Fact(f"question {i}", "answer") for i in range(MOST + 30)]
    drawn = drawn_facts(facts)
    assert len(set(drawn)) == MOST
    assert drawn == drawn_facts(facts)
    assert drawn_facts(facts[:9]) == facts[:9]
