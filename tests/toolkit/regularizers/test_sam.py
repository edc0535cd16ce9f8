"""The gradient at the ascended weights, against autograd at weights that the test ascends."""

import math

import pytest
import torch

import ssiuu_kernels as sk

RADIUS = 0.7


@pytest.fixture
def prepared(setting, made):
    """(setting, regularizer, what runs a micro-batch's forward and backward)"""
    regularizer, method = made("sam", sam_radius=RADIUS)
    with sk.patch(setting.model, scope="all") as handle:
        method.setup(setting.model, handle, setting.data)
        regularizer.setup(setting.model, handle, method, setting.data)

        def run(batch):
            loss = regularizer.loss(batch)
            loss.backward()
            return loss.detach()

        yield setting, regularizer, run


def gradients(model):
    return [param.grad for param in model.parameters()]


def ascended_gradients(setting, batch):
    """Of GD's loss at `W + radius g / |g|`."""
    params, original = list(setting.model.parameters()), setting.clones()
    grads = torch.autograd.grad(setting.gd(batch), params)
    norm = torch.cat([grad.flatten() for grad in grads]).norm()
    with torch.no_grad():
        for param, grad in zip(params, grads, strict=True):
            param += RADIUS * grad / norm
    found = torch.autograd.grad(setting.gd(batch), params)
    with torch.no_grad():
        for param, value in zip(params, original, strict=True):
            param.copy_(value)
    return found


def assert_close(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


def test_the_gradient_is_that_at_the_ascended_weights(prepared):
    setting, regularizer, run = prepared
    batch = setting.batch([0, 1], [0, 2])
    expected, plain = (
        ascended_gradients(setting, batch),
        torch.autograd.grad(setting.gd(batch), list(setting.model.parameters())),
    )
    loss = regularizer.forward_backward(lambda: run(batch))
    assert_close(gradients(setting.model), expected)
    assert loss.item() == pytest.approx(setting.gd(batch).item(), rel=1e-12)
    assert any((a - b).norm() > 1e-2 * b.norm() for a, b in zip(expected, plain, strict=True))


def test_the_weights_are_restored_bit_for_bit(prepared):
    setting, regularizer, run = prepared
    original = setting.clones()
    regularizer.forward_backward(lambda: run(setting.batch([0, 1], [0, 2])))
    assert all(torch.equal(*pair) for pair in zip(setting.model.parameters(), original, strict=True))


def test_every_micro_batch_ascends_by_itself(prepared):
    setting, regularizer, run = prepared
    step = ([0, 1], [0, 1])
    parts = [setting.batch([i], [i], 2, step) for i in range(2)]
    expected = [sum(pair) for pair in zip(*(ascended_gradients(setting, part) for part in parts), strict=True)]
    for part in parts:
        regularizer.forward_backward(lambda part=part: run(part))
    assert_close(gradients(setting.model), expected)


def test_weights_are_restored_where_the_second_pass_fails(prepared):
    setting, regularizer, run = prepared
    original, passes = setting.clones(), []

    def failing():
        passes.append(1)
        if len(passes) == 2:
            raise MemoryError
        return run(setting.batch([0], [0]))

    with pytest.raises(MemoryError):
        regularizer.forward_backward(failing)
    assert all(torch.equal(*pair) for pair in zip(setting.model.parameters(), original, strict=True))


@pytest.mark.parametrize("size", [0.0, math.nan, math.inf])
def test_a_gradient_without_a_direction_ascends_nowhere(prepared, size):
    setting, regularizer, _ = prepared
    original, passes = setting.clones(), []

    def run():
        passes.append(1)
        for param in setting.model.parameters():
            param.grad = torch.full_like(param, size)
        return torch.zeros(())

    regularizer.forward_backward(run)
    assert len(passes) == 1
    assert all(torch.equal(*pair) for pair in zip(setting.model.parameters(), original, strict=True))
    assert all(grad.isfinite().all() == math.isfinite(size) for grad in gradients(setting.model))


def test_a_tiny_gradient_ascends_the_radius(prepared):
    setting, regularizer, _ = prepared
    original, moved = setting.clones(), []

    def run():
        moved.extend((p.detach() - o).flatten() for p, o in zip(setting.model.parameters(), original, strict=True))
        for param in setting.model.parameters():
            param.grad = torch.full_like(param, 1e-150)
        return torch.zeros(())

    regularizer.forward_backward(run)
    assert torch.cat(moved).norm().item() == pytest.approx(RADIUS, rel=1e-6)


def test_both_passes_draw_the_same_random_numbers(prepared):
    setting, regularizer, _ = prepared
    drawn = []

    def run():
        drawn.append(torch.rand(()).item())
        for param in setting.model.parameters():
            param.grad = torch.ones_like(param)
        return torch.zeros(())

    regularizer.forward_backward(run)
    assert len(drawn) == 2
    assert drawn[0] == drawn[1]
