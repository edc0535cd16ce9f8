"""glu_forward and glu_backward: every backend against float64 autograd."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ssiuu_kernels as sk

from ...support import eager
from ...support.accuracy import assert_as_accurate_as_pytorch, assert_same_direction
from ...support.cases import BACKENDS, DTYPES, SEGMENTED, as_segments, random_rows

ACTIVATIONS = list(eager.ACTIVATIONS)


def run(gate, up, grad_h, segments, activation, backend):
    grads = sk.ops.glu_backward(
        gate, up, grad_h, activation=activation, segments=segments, scores=True, recompute_h=True, backend=backend
    )
    return {
        "h": grads.h,
        "grad_gate": grads.grad_gate,
        "grad_up": grads.grad_up,
        "h_scores": torch.stack(grads.h_scores),
        "gate_scores": torch.stack(grads.gate_scores),
    }


def compare(inputs, segments, activation, backend):
    """Every output of the backward against float64, by the rule of accuracy.py."""
    dtype = inputs[0].dtype
    actual = run(*inputs, segments, activation, backend)
    exact = eager.glu(*(x.double() for x in inputs), segments, activation)
    same_dtype = eager.glu(*inputs, segments, activation)
    for name, value in actual.items():
        # Scores are float32 whatever came in, so the rounding of the inputs' type is no excuse for them.
        stored = torch.float32 if "scores" in name else dtype
        assert_as_accurate_as_pytorch(value, exact[name], same_dtype[name], stored)
        assert_same_direction(value, exact[name], dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backward_for_every_activation(activation, dtype, backend):
    inputs = [random_rows(71, 203, dtype) for _ in range(3)]
    compare(inputs, as_segments([(0, 40), (45, 71)]), activation, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SEGMENTED)
def test_backward_for_every_shape(case, dtype, backend):
    rows, cols, pairs = SEGMENTED[case]
    inputs = [random_rows(rows, cols, dtype) for _ in range(3)]
    compare(inputs, as_segments(pairs), "silu", backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_reads_strided_rows(dtype, backend):
    inputs = [random_rows(21, 67, dtype, sliced=True) for _ in range(3)]
    compare(inputs, as_segments([(0, 21)]), "silu", backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_reads_strided_columns(backend):
    inputs = [torch.randn(14, 9).t() for _ in range(3)]
    compare(inputs, as_segments([(0, 4), (4, 9)]), "silu", backend)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 300), st.integers(1, 1100), st.sampled_from(ACTIVATIONS), st.data())
def test_backward_for_random_shapes(rows, cols, activation, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), max_size=6)))
    segments = as_segments(list(zip(cuts[::2], cuts[1::2], strict=False)))
    compare([random_rows(rows, cols, torch.float32) for _ in range(3)], segments, activation, "auto")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward(activation, dtype, backend):
    gate, up = (random_rows(33, 101, dtype, sliced=True) for _ in range(2))
    h = sk.ops.glu_forward(gate, up, activation=activation, backend=backend)
    exact = eager.ACTIVATIONS[activation](gate.double()) * up.double()
    assert_as_accurate_as_pytorch(h, exact, eager.ACTIVATIONS[activation](gate) * up, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-30, -1e-30, 88.0, -88.0, -104.0, 1e4, -1e4])
def test_extreme_gates(value, activation, backend):
    gate, one = torch.full((2, 40), value), torch.ones(2, 40)
    compare([gate, one, one], as_segments([(0, 2)]), activation, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("position", [0, 17, 44])
def test_nan_reaches_gradients_and_scores(position, backend):
    gate, up, grad_h = (random_rows(9, 45, torch.float32) for _ in range(3))
    grad_h[4, position] = float("nan")
    grads = sk.ops.glu_backward(gate, up, grad_h, scores=True, backend=backend)
    for scores in (*grads.h_scores, *grads.gate_scores):
        assert scores.isnan().nonzero().tolist() == [[0, position]]
    assert grads.grad_gate.isnan().nonzero().tolist() == [[4, position]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_infinity_and_nan_go_where_pytorch_puts_them(activation, dtype, backend):
    inputs = eager.specials(3, dtype)
    actual = run(*inputs, as_segments([]), activation, backend)
    expected = eager.glu(*inputs, as_segments([]), activation)
    for name in ("h", "grad_gate", "grad_up"):
        assert torch.equal(eager.kinds(actual[name]), eager.kinds(expected[name])), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_three_dimensions_are_samples(backend):
    gate, up, grad_h = (torch.randn(4, 6, 19) for _ in range(3))
    grads = sk.ops.glu_backward(gate, up, grad_h, scores=True, backend=backend)
    assert grads.grad_gate.shape == (4, 6, 19)
    assert torch.allclose(grads.h_scores.max, (eager.ACTIVATIONS["silu"](gate) * up * grad_h).amax(1), rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_was_asked_for(backend):
    gate, up, grad_h = (torch.randn(5, 8) for _ in range(3))
    grads = sk.ops.glu_backward(gate, up, grad_h, backend=backend)
    assert grads[2:] == (None, None, None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
# Halves that start on 16 bytes, halves that do not, and rows with something between them.
@pytest.mark.parametrize(("width", "columns"), [(32, slice(None)), (46, slice(None)), (51, slice(3, -2))])
def test_packed_equals_separate(width, columns, dtype, backend):
    gate_up = torch.randn(3, 7, width).to(dtype)[..., columns]
    grad_h = torch.randn(3, 7, gate_up.shape[-1] // 2).to(dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    options = {"segments": as_segments([(2, 9), (9, 21)]), "scores": True, "recompute_h": True, "backend": backend}
    packed = sk.ops.packed_glu_backward(gate_up, grad_h, **options)
    separate = sk.ops.glu_backward(gate, up, grad_h, **options)
    assert torch.equal(packed.grad_gate_up, torch.cat([separate.grad_gate, separate.grad_up], dim=-1))
    assert torch.equal(packed.h, separate.h)
    assert torch.equal(torch.stack(packed.h_scores), torch.stack(separate.h_scores))
    assert torch.equal(torch.stack(packed.gate_scores), torch.stack(separate.gate_scores))
    assert torch.equal(sk.ops.packed_glu_forward(gate_up, backend=backend), separate.h)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_gradient_is_written_in_one_piece(backend):
    gate_up = torch.randn(5, 12, requires_grad=True)
    sk.ops.packed_glu_forward(gate_up, backend=backend).sum().backward()
    expected = torch.autograd.grad(eager.ACTIVATIONS["silu"](gate_up[:, :6]).mul(gate_up[:, 6:]).sum(), gate_up)[0]
    assert torch.allclose(gate_up.grad, expected, rtol=1e-5, atol=1e-6)
    assert gate_up.grad.is_contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_left_alone(backend):
    inputs = [torch.randn(5, 8) for _ in range(3)]
    before = [x.clone() for x in inputs]
    sk.ops.glu_backward(*inputs, scores=True, recompute_h=True, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


def test_the_thread_count_changes_no_bit():
    inputs = [torch.randn(700, 1100) for _ in range(3)]
    segments = as_segments([(0, 650), (660, 700)])
    one = run(*inputs, segments, "silu", "native")
    torch.set_num_threads(3)
    try:
        three = run(*inputs, segments, "silu", "native")
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(one[name], three[name]) for name in one)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    # Away from 0, where a rectifier has no derivative.
    gate = (torch.rand(3, 5, dtype=torch.float64) + 0.1) * torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    up = torch.randn(3, 5, dtype=torch.float64)
    inputs = (gate.requires_grad_(), up.requires_grad_())
    assert torch.autograd.gradcheck(lambda g, u: sk.ops.glu_forward(g, u, activation=activation), inputs)
    packed = torch.cat([gate, up], dim=1).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sk.ops.packed_glu_forward(x, activation=activation), packed)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "scores, h and penalty"])
def test_opcheck(extras, gated, backend):
    # Transposed: outputs are row-major whatever the inputs are.
    gate, up, grad_h = (torch.randn(10, 6).t() for _ in range(3))
    up = up if gated else None
    segments = as_segments([(0, 2), (2, 6)])
    penalty = (torch.tensor(0.5), torch.ones(2), torch.randn(3, 10), torch.tensor([2, 0])) if extras else [None] * 4
    arguments = (gate, up, grad_h, segments, "silu", extras, extras, gated and extras, 0, *penalty, backend)
    torch.library.opcheck(torch.ops.ssiuu.mlp_backward, arguments)
    differentiable = [None if x is None else x.requires_grad_() for x in (gate, up)]
    torch.library.opcheck(torch.ops.ssiuu.mlp_forward, (*differentiable, "silu", backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_of_the_packed_forward(backend):
    torch.library.opcheck(torch.ops.ssiuu.packed_glu_forward, (torch.randn(6, 20, requires_grad=True), "silu", backend))


def test_compiles_into_one_graph():
    gate, up = torch.randn(6, 10, requires_grad=True), torch.randn(6, 10, requires_grad=True)
    compiled = torch.compile(lambda g, u: sk.ops.glu_forward(g, u).square().sum(), fullgraph=True, backend="aot_eager")
    compiled(gate, up).backward()
    (expected,) = torch.autograd.grad((torch.nn.functional.silu(gate) * up).square().sum(), gate)
    assert torch.allclose(gate.grad, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("forward", "inputs"), [(sk.ops.glu_forward, 2), (sk.ops.packed_glu_forward, 1)])
def test_second_derivative_is_refused(forward, inputs):
    tensors = [torch.randn(3, 4, requires_grad=True) for _ in range(inputs)]
    (first,) = torch.autograd.grad(forward(*tensors).sum(), tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        first.sum().backward()
