"""The pull to the original weights."""

import pytest
import torch

import ssiuu_kernels as sk
from ssiuu.optimizers import OptimizerOptions

WEIGHT = 0.3
RATE = OptimizerOptions(1e-2)


def random_gradients(model):
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    return [param.grad.clone() for param in model.parameters()]


@pytest.fixture
def pulled(setting, made):
    """(model, regularizer, optimizer, W0)"""
    regularizer, method = made("l2", l2_weight=WEIGHT)
    regularizer.setup(setting.model, None, method, setting.data)
    return setting.model, regularizer, regularizer.optimizer(setting.model.parameters(), RATE), setting.clones()


def test_steps_are_those_of_adamw_on_the_sum_of_both_gradients(pulled):
    model, _, optimizer, original = pulled
    expected = [torch.nn.Parameter(value.clone()) for value in original]
    adamw = torch.optim.AdamW(expected, lr=RATE.learning_rate, weight_decay=0.0)
    for _ in range(3):
        for param, start, grad in zip(expected, original, random_gradients(model), strict=True):
            param.grad = grad + 2 * WEIGHT * (param.detach() - start)
        adamw.step()
        optimizer.step()
    for actual, param in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(actual, param, rtol=1e-12)


def test_the_value_is_the_squared_distance_at_the_step(pulled):
    model, regularizer, optimizer, original = pulled
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param))
    squared = sum((p.detach() - start).square().sum() for p, start in zip(model.parameters(), original, strict=True))
    random_gradients(model)
    optimizer.step()
    found = regularizer.metrics()
    assert found["penalty"] == pytest.approx(WEIGHT * squared.item())
    assert found["penalty_grad_norm"] == pytest.approx(2 * WEIGHT * squared.sqrt().item())


def test_a_parameter_without_a_gradient_is_not_stepped(pulled):
    model, _, optimizer, original = pulled
    first = next(model.parameters())
    with torch.no_grad():
        first.add_(1)
    random_gradients(model)
    first.grad = None
    optimizer.step()
    assert torch.equal(first, original[0] + 1)


def test_the_pull_is_added_once_to_bfloat16_weights(setting, made):
    """Whose AdamW is a subclass: torch calls a step's hooks once for each class whose `step` runs."""
    sk.SsiuuAdamW([torch.nn.Parameter(torch.zeros(1))])
    setting.model.bfloat16()
    regularizer, method = made("l2", l2_weight=WEIGHT)
    regularizer.setup(setting.model, None, method, setting.data)
    options = OptimizerOptions(1e-2, stochastic_rounding=True)
    optimizer = regularizer.optimizer(setting.model.parameters(), options)
    with torch.no_grad():
        for param in setting.model.parameters():
            param.add_(1)
    given = random_gradients(setting.model)
    moved = [param.detach() - start for param, start in regularizer.original.items()]
    kept = [param.grad for param in setting.model.parameters()]
    optimizer.step()
    for grad, before, by in zip(kept, given, moved, strict=True):
        assert torch.allclose(grad.float(), before.float() + 2 * WEIGHT * by.float(), rtol=0.02, atol=0.02)
