"""The named objectives against their formulas, written out number by number."""

import math

import pytest
import torch

from ssiuu_kernels.loss.objectives import (
    BETA,
    direct_preference,
    negative_preference,
    resolve_objective,
    simple_negative_preference,
)

LOG_PROBS = torch.tensor([-3.0, -8.0, -2.0, -5.0, -6.0])
REFERENCE = torch.tensor([-2.0, -9.0, -2.5, -7.0, -4.0])
LENGTHS = torch.tensor([2, 4, 1, 3, 2])
FORGET = torch.tensor([True, False, True, False, False])


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def value(name, forget=FORGET, log_probs=LOG_PROBS, reference=None):
    return resolve_objective(name, reference)(log_probs, LENGTHS[: len(forget)], forget).item()


def test_gradient_ascent():
    assert value("ga") == pytest.approx((-3 - 2) / (2 + 1))


def test_gradient_difference():
    assert value("gd") == pytest.approx((-3 - 2) / (2 + 1) - (-8 - 5 - 6) / (4 + 3 + 2))


@pytest.fixture
def beta():
    return 0.1 + torch.rand(()).item()


def npo(growths, beta=BETA):
    return -2 / beta * sum(log_sigmoid(-beta * growth) for growth in growths) / len(growths)


def test_npo_adds_the_retain_samples():
    assert value("npo", reference=REFERENCE) == pytest.approx(npo([-1, 0.5]) - (-8 - 5 - 6) / 9)


def test_npo_without_retain_samples():
    every = torch.ones(5, dtype=torch.bool)
    assert value("npo", every, reference=REFERENCE) == pytest.approx(npo([-1, 1, 0.5, 2, -2]))


def test_npo_with_another_beta(beta):
    found = negative_preference(LOG_PROBS, LENGTHS, FORGET, REFERENCE, beta).item()
    assert found == pytest.approx(npo([-1, 0.5], beta) - (-8 - 5 - 6) / 9)


def test_npo_is_gradient_ascent_where_unlearning_starts():
    log_probs = REFERENCE.clone().requires_grad_()
    resolve_objective("npo", REFERENCE)(log_probs, LENGTHS, torch.ones(5, dtype=torch.bool)).backward()
    assert torch.allclose(log_probs.grad, torch.full((5,), 1 / 5))


def test_dpo_pairs_in_order_and_adds_the_rest():
    # Sample 1 is preferred to 0, and 3 to 2; 4 is a retain sample.
    pairs = [log_sigmoid(BETA * (1 - -1)), log_sigmoid(BETA * (2 - 0.5))]
    assert value("dpo", reference=REFERENCE) == pytest.approx(-1 / BETA * sum(pairs) / 2 - -6 / 2)


def test_dpo_without_retain_samples():
    found = value("dpo", FORGET[:4], LOG_PROBS[:4], REFERENCE[:4])
    assert found == pytest.approx(-1 / BETA * (log_sigmoid(BETA * 2) + log_sigmoid(BETA * 1.5)) / 2)


def test_dpo_with_another_beta(beta):
    found = direct_preference(LOG_PROBS[:4], LENGTHS[:4], FORGET[:4], REFERENCE[:4], beta).item()
    assert found == pytest.approx(-1 / beta * (log_sigmoid(beta * 2) + log_sigmoid(beta * 1.5)) / 2)


def simnpo(per_token, beta=2.5, gamma=0):
    return -2 / beta * sum(log_sigmoid(-beta * s - gamma) for s in per_token) / len(per_token)


def test_simnpo_counts_per_token_and_adds_the_retain_samples():
    assert value("simnpo") == pytest.approx(simnpo([-3 / 2, -2 / 1]) - (-8 - 5 - 6) / 9)


def test_simnpo_without_retain_samples():
    every = torch.ones(5, dtype=torch.bool)
    assert value("simnpo", every) == pytest.approx(simnpo([-3 / 2, -8 / 4, -2 / 1, -5 / 3, -6 / 2]))


def test_simnpo_with_another_beta_and_a_margin(beta):
    gamma = torch.rand(()).item()
    found = simple_negative_preference(LOG_PROBS, LENGTHS, FORGET, beta, gamma).item()
    assert found == pytest.approx(simnpo([-3 / 2, -2 / 1], beta, gamma) - (-8 - 5 - 6) / 9)


BAD = {
    "no preferred answers": ("needs a preferred answer", "dpo", REFERENCE),
    "no reference": ("reference_log_probs is missing", "npo", None),
    "a reference that nothing reads": ("objective='gd' does not read it", "gd", REFERENCE),
    "a reference of another length": (r"shape \[2\]", "npo", REFERENCE[:2]),
    "a reference with a gradient": ("requires a gradient", "npo", REFERENCE.clone().requires_grad_()),
    "an unknown name": ("one of ga, gd, simnpo, npo, dpo", "rmu", None),
}


@pytest.mark.parametrize(("message", "name", "reference"), BAD.values(), ids=BAD)
def test_bad_input(message, name, reference):
    with pytest.raises(ValueError, match=message):
        value(name, torch.tensor([True, True, True, False, False]), reference=reference)
