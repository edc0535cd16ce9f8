"""FDCU's mask: which scalars it damps, and that the damping has to be on the step."""

import random

import numpy
import pytest
import torch

import ssiuu_kernels as sk
from ssiuu.optimizers import OptimizerOptions
from ssiuu.regularizers import mask as mask_module

BETA = 20.0
RATE = OptimizerOptions(1e-2, weight_decay=0.1)


def attributions(setting):
    """`phi sum_b dlogP_b/dphi` over the forget facts, one by one; 0 of parameters that no loss reaches."""
    total = [torch.zeros_like(param) for param in setting.model.parameters()]
    for fact in range(len(setting.data.forget)):
        (log_prob,) = setting.log_probs(setting.batch([fact], []))
        grads = torch.autograd.grad(log_prob, list(setting.model.parameters()))
        total = [a + param.detach() * g for a, param, g in zip(total, setting.model.parameters(), grads, strict=True)]
    return total


@pytest.fixture
def masked(setting, made, monkeypatch):
    """The regularizer, set up; its batches are smaller than the forget set."""
    monkeypatch.setattr(mask_module, "BATCH_SIZE", 2)
    regularizer, method = made("mask", mask_beta=BETA)
    with sk.patch(setting.model, scope="all") as handle:
        regularizer.setup(setting.model, handle, method, setting.data)
    return regularizer


def test_it_damps_where_the_original_attribution_is_not_positive(setting, masked):
    for param, expected in zip(setting.model.parameters(), attributions(setting), strict=True):
        clear = (expected == 0) | (expected.abs() > 1e-12 * expected.abs().max())
        assert torch.equal(masked.damped[param][clear], (expected <= 0)[clear])
    assert 0.2 < torch.cat([damped.flatten() for damped in masked.damped.values()]).float().mean() < 0.9


def test_the_setup_leaves_gradients_mode_and_random_numbers_alone(setting, made):
    setting.model.train()
    states = [torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()]  # noqa: NPY002
    regularizer, method = made("mask")
    with sk.patch(setting.model, scope="all") as handle:
        regularizer.setup(setting.model, handle, method, setting.data)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert [random.getstate(), numpy.random.get_state()[1].tolist()] == states[1:]  # noqa: NPY002
    assert all(param.grad is None for param in setting.model.parameters())
    assert setting.model.training


def test_frozen_parameters_have_no_mask(setting, made):
    frozen = setting.model.lm_head.weight.requires_grad_(False)
    regularizer, method = made("mask")
    with sk.patch(setting.model, scope="all") as handle:
        regularizer.setup(setting.model, handle, method, setting.data)
    assert frozen not in regularizer.damped
    assert len(regularizer.damped) == len(list(setting.model.parameters())) - 1


def gradients(model):
    return [torch.randn_like(param) for param in model.parameters()]


def test_steps_are_those_of_adamw_damped_where_the_mask_is(setting, masked):
    optimizer = masked.optimizer(setting.model.parameters(), RATE)
    expected = [torch.nn.Parameter(value) for value in setting.clones()]
    adamw = torch.optim.AdamW(expected, lr=RATE.learning_rate, weight_decay=RATE.weight_decay)
    for _ in range(3):
        before = [param.detach().clone() for param in expected]
        for param, twin, grad in zip(setting.model.parameters(), expected, gradients(setting.model), strict=True):
            param.grad, twin.grad = grad, grad.clone()
        optimizer.step()
        adamw.step()
        for param, twin, start in zip(setting.model.parameters(), expected, before, strict=True):
            damped = masked.damped[param]
            twin.data[damped] = (start + (twin.detach() - start) / (1 + BETA))[damped]
            assert torch.equal(param[~damped], twin[~damped])
            assert torch.allclose(param, twin, rtol=1e-12)


def test_the_same_factor_on_the_gradient_would_change_nothing():
    """Why it is on the step: AdamW divides a scalar's gradient by its size."""
    start, factor = torch.randn(100, dtype=torch.float64), 1 / (1 + BETA * (torch.rand(100) < 0.5).double())
    plain, scaled = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = [torch.optim.AdamW([param], lr=1e-2, eps=1e-12) for param in (plain, scaled)]
    for _ in range(3):
        plain.grad = torch.randn_like(start)
        scaled.grad = factor * plain.grad
        for optimizer in optimizers:
            optimizer.step()
    assert torch.allclose(scaled, plain, rtol=1e-8)


def test_a_model_without_finite_attributions_is_refused(setting, made):
    with torch.no_grad():
        setting.model.lm_head.weight[0, 0] = float("nan")
    regularizer, method = made("mask")
    with sk.patch(setting.model, scope="all") as handle, pytest.raises(ValueError, match="not finite; check the model"):
        regularizer.setup(setting.model, handle, method, setting.data)
