"""act_forward and act_backward: every backend against float64 autograd."""

import pytest
import torch

import ssiuu_kernels as sk

from ...support import eager
from ...support.accuracy import assert_as_accurate_as_pytorch, assert_same_direction
from ...support.cases import BACKENDS, DTYPES, SEGMENTED, as_segments, random_rows


def eager_act(x, grad_h, segments, activation):
    """h, grad_x, h scores and x scores, all in the inputs' type."""
    x = x.detach().requires_grad_()
    h = eager.ACTIVATIONS[activation](x)
    (grad_x,) = torch.autograd.grad(h, x, grad_h)
    h, x = h.detach(), x.detach()
    return {
        "h": h,
        "grad_x": grad_x,
        "h_scores": eager.segment_scores(h * grad_h, segments),
        "x_scores": eager.segment_scores(x * grad_x, segments),
    }


def compare(x, grad_h, segments, activation, backend):
    grads = sk.ops.act_backward(
        x, grad_h, activation=activation, segments=segments, scores=True, recompute_h=True, backend=backend
    )
    exact = eager_act(x.double(), grad_h.double(), segments, activation)
    same_dtype = eager_act(x, grad_h, segments, activation)
    for name, value in grads._asdict().items():
        value = torch.stack(value) if "scores" in name else value
        stored = torch.float32 if "scores" in name else x.dtype
        assert_as_accurate_as_pytorch(value, exact[name], same_dtype[name], stored)
        assert_same_direction(value, exact[name], x.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", eager.ACTIVATIONS)
def test_backward_for_every_activation(activation, dtype, backend):
    x, grad_h = (random_rows(23, 67, dtype, sliced=True) for _ in range(2))
    compare(x, grad_h, as_segments([(0, 10), (13, 23)]), activation, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", SEGMENTED)
def test_backward_for_every_shape(case, backend):
    rows, cols, pairs = SEGMENTED[case]
    x, grad_h = (random_rows(rows, cols, torch.float32) for _ in range(2))
    compare(x, grad_h, as_segments(pairs), "gelu", backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", eager.ACTIVATIONS)
def test_forward(activation, dtype, backend):
    x = random_rows(33, 101, dtype, sliced=True)
    h = sk.ops.act_forward(x, activation=activation, backend=backend)
    exact = eager.ACTIVATIONS[activation](x.double())
    assert_as_accurate_as_pytorch(h, exact, eager.ACTIVATIONS[activation](x), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", eager.ACTIVATIONS)
def test_nan_reaches_gradient_and_scores(activation, backend):
    x, grad_h = torch.randn(9, 45), torch.randn(9, 45)
    x[4, 17], grad_h[4, 17] = 1.5, float("nan")
    grads = sk.ops.act_backward(x, grad_h, activation=activation, scores=True, backend=backend)
    for scores in (*grads.h_scores, *grads.x_scores):
        assert scores.isnan().nonzero().tolist() == [[0, 17]]
    assert grads.grad_x.isnan().nonzero().tolist() == [[4, 17]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", eager.ACTIVATIONS)
def test_infinity_and_nan_go_where_pytorch_puts_them(activation, dtype, backend):
    """The gradient of relu is 0 at x <= 0, whatever arrives."""
    x, grad_h = eager.specials(2, dtype)
    grads = sk.ops.act_backward(x, grad_h, activation=activation, recompute_h=True, backend=backend)
    expected = eager_act(x, grad_h, as_segments([]), activation)
    for name in ("h", "grad_x"):
        assert torch.equal(eager.kinds(getattr(grads, name)), eager.kinds(expected[name])), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_was_asked_for(backend):
    grads = sk.ops.act_backward(torch.randn(5, 8), torch.randn(5, 8), backend=backend)
    assert grads[1:] == (None, None, None)


@pytest.mark.parametrize("activation", eager.ACTIVATIONS)
def test_gradcheck(activation):
    x = (torch.rand(3, 5, dtype=torch.float64) + 0.1) * torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    assert torch.autograd.gradcheck(lambda x: sk.ops.act_forward(x, activation=activation), x.requires_grad_())


def test_compiles_into_one_graph():
    x = torch.randn(6, 10, requires_grad=True)
    compiled = torch.compile(lambda x: sk.ops.act_forward(x).square().sum(), fullgraph=True, backend="aot_eager")
    compiled(x).backward()
    (expected,) = torch.autograd.grad(torch.nn.functional.silu(x).square().sum(), x)
    assert torch.allclose(x.grad, expected, rtol=1e-5, atol=1e-6)


def test_second_derivative_is_refused():
    x = torch.randn(3, 4, requires_grad=True)
    (first,) = torch.autograd.grad(sk.ops.act_forward(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        first.sum().backward()
