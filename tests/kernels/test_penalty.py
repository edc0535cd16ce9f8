"""penalty_ and penalty_adamw_: every backend against float64 formulas and torch.optim.AdamW."""

import pytest
import torch

import ssiuu_kernels as sk

from . import eager
from .accuracy import assert_as_accurate_as_pytorch, assert_same_direction
from .cases import BACKENDS

# parameter, gradients, states
TYPES = {
    "float32": (torch.float32, torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "float32 states": (torch.bfloat16, torch.bfloat16, torch.float32),
    "float32 gradients": (torch.bfloat16, torch.float32, torch.float32),
}
SIZES = [1, 15, 1003, 70001]
ADAMW = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def make_inputs(size, types):
    """param, grad, target_grad, prev_attribution, exp_avg, exp_avg_sq."""
    param, grad, state = types
    tensors = [torch.randn(size).to(dtype) for dtype in (param, grad, grad, state, state)]
    return [*tensors, torch.rand(size).to(state)]


def doubled(tensors):
    return [tensor.double() for tensor in tensors]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("types", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("step", [1, 2, 7])
def test_penalty(step, size, types, backend):
    param, grad, target_grad, previous, *_ = make_inputs(size, types)
    inputs = (param, grad.clone(), target_grad, previous.clone())
    exact_grad, exact_attribution, exact_stats = eager.penalty(*doubled(inputs), 0.3, step)
    own_grad, own_attribution, _ = eager.penalty(*inputs, 0.3, step)
    stats = sk.ops.penalty_(grad, param, target_grad, previous, weight=0.3, step=step, backend=backend)
    assert_as_accurate_as_pytorch(grad, exact_grad, own_grad, grad.dtype)
    assert_same_direction(grad, exact_grad, grad.dtype)
    assert_as_accurate_as_pytorch(previous, exact_attribution, own_attribution, previous.dtype)
    # The share counts a comparison of rounded numbers: one scalar may fall either way.
    for name, actual, exact in zip(stats._fields, stats, exact_stats, strict=True):
        slack = 1 / max(exact_stats[4].item(), 1) if name == "share" else 0
        assert abs(actual.item() - exact.item()) <= 1e-5 * abs(exact.item()) + slack, name


def adamw_step(tensors, weight, step, dtype):
    """The update in eager PyTorch: the penalised gradient handed to torch.optim.AdamW with its state at step - 1."""
    param, grad, target_grad, previous, exp_avg, exp_avg_sq = (tensor.to(dtype) for tensor in tensors)
    total, attribution, _ = eager.penalty(param, grad, target_grad, previous, weight, step)
    param = torch.nn.Parameter(param)
    optimizer = torch.optim.AdamW([param], **ADAMW, foreach=False)
    optimizer.state[param] = {
        "step": torch.tensor(step - 1.0),
        "exp_avg": exp_avg.clone(),
        "exp_avg_sq": exp_avg_sq.clone(),
    }
    param.grad = total
    optimizer.step()
    state = optimizer.state[param]
    return param.detach(), attribution, state["exp_avg"], state["exp_avg_sq"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("types", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("step", "weight"), [(1, 0.3), (2, 0.3), (50, 0.3), (3, 0.0)])
def test_penalty_adamw(step, weight, size, types, backend):
    tensors = make_inputs(size, types)
    exact = adamw_step([tensor.clone() for tensor in tensors], weight, step, torch.float64)
    own = adamw_step([tensor.clone() for tensor in tensors], weight, step, types[0])
    sk.ops.penalty_adamw_(*tensors, step=step, weight=weight, backend=backend, **ADAMW)
    param, _, _, previous, exp_avg, exp_avg_sq = tensors
    for actual, wanted, eager_value in zip((param, previous, exp_avg, exp_avg_sq), exact, own, strict=True):
        assert_as_accurate_as_pytorch(actual, wanted, eager_value, actual.dtype)
        assert_same_direction(actual, wanted, actual.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_two_forms_give_the_same_statistics(backend):
    param, grad, target_grad, previous, exp_avg, exp_avg_sq = make_inputs(5003, TYPES["float32"])
    alone = sk.ops.penalty_(grad.clone(), param, target_grad, previous.clone(), weight=0.7, step=2, backend=backend)
    fused = sk.ops.penalty_adamw_(
        param, grad, target_grad, previous, exp_avg, exp_avg_sq, step=2, weight=0.7, backend=backend, **ADAMW
    )
    assert alone == fused


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_left_alone_by_the_update(backend):
    tensors = make_inputs(257, TYPES["float32"])
    grad, target_grad = tensors[1].clone(), tensors[2].clone()
    sk.ops.penalty_adamw_(*tensors, step=2, weight=0.3, backend=backend, **ADAMW)
    assert torch.equal(tensors[1], grad)
    assert torch.equal(tensors[2], target_grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    param, grad, target_grad, previous, exp_avg, exp_avg_sq = make_inputs(40, TYPES["float32"])
    torch.library.opcheck(torch.ops.ssiuu.penalty_, (grad, param, target_grad, previous, 0.3, 2, backend))
    torch.library.opcheck(
        torch.ops.ssiuu.penalty_adamw_,
        (param, grad, target_grad, previous, exp_avg, exp_avg_sq, 2, 1e-2, 0.9, 0.99, 1e-8, 0.1, 0.3, backend),
    )


def test_statistics_of_parts_add_up():
    param, grad, target_grad, previous, *_ = make_inputs(400, TYPES["float32"])
    whole = sk.ops.penalty_(grad.clone(), param, target_grad, previous.clone(), weight=0.3, step=2)
    parts = [
        sk.ops.penalty_(*(t[piece].clone() for t in (grad, param, target_grad, previous)), weight=0.3, step=2)
        for piece in (slice(0, 100), slice(100, 400))
    ]
    assert torch.allclose(torch.stack(sk.PenaltyStats.total(parts)), torch.stack(whole), rtol=1e-6)
