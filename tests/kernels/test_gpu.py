"""What only a device can show: determinism across launches, graphs, streams, and no waiting on the host.

Where their bodies need no device they also run on the emulated kernels, which checks the tests themselves. Tests
marked `sanitizer` are small: `compute-sanitizer --tool memcheck python -m pytest -m "gpu and sanitizer"`, and the same
with `--tool racecheck`.
"""

import pytest
import torch

import ssiuu_kernels as sk

from ..support.cases import as_segments, random_rows

GPU_BACKENDS = [
    pytest.param("native", id="native_cuda", marks=pytest.mark.gpu),
    pytest.param("triton", id="triton_cuda", marks=pytest.mark.gpu),
]
EMULATED = pytest.param("native", id="cuda_emulated", marks=pytest.mark.emulated)
ADAMW = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
ROWS, COLS = 70, 136
SAMPLES = [(0, 33), (36, 70)]


def glu_forward(gate, up, _grad_h, *_, backend):
    return [sk.ops.glu_forward(gate, up, activation="silu", backend=backend)]


def glu_backward(gate, up, grad_h, segments, *_, backend):
    grads = sk.ops.glu_backward(
        gate, up, grad_h, activation="silu", segments=segments, scores=True, recompute_h=True, backend=backend
    )
    return [grads.h, grads.grad_gate, grads.grad_up, *grads.h_scores, *grads.gate_scores]


def penalised_glu_backward(gate, up, grad_h, segments, previous, *_, backend):
    bank = previous[: len(SAMPLES)].to(torch.float32, copy=True)
    penalty = sk.ops.NeuronPenalty(
        weight=0.3, ratio=torch.ones(len(SAMPLES)), bank=bank, rows=torch.arange(len(SAMPLES))
    )
    grads = sk.ops.glu_backward(gate, up, grad_h, segments=segments, penalty=penalty, backend=backend)
    return [grads.grad_gate, grads.grad_up, bank]


def packed_glu_backward(gate, up, grad_h, segments, *_, backend):
    grads = sk.ops.packed_glu_backward(
        torch.cat([gate, up], 1), grad_h, segments=segments, scores=True, recompute_h=True, backend=backend
    )
    return [grads.grad_gate_up, grads.h, *grads.h_scores, *grads.gate_scores]


def act_forward(x, *_, backend):
    return [sk.ops.act_forward(x, backend=backend)]


def act_backward(x, _up, grad_h, segments, *_, backend):
    grads = sk.ops.act_backward(x, grad_h, segments=segments, scores=True, recompute_h=True, backend=backend)
    return [grads.grad_x, grads.h, *grads.h_scores, *grads.x_scores]


def token_scores(z, grad_z, _other, segments, *_, backend):
    return list(sk.ops.token_scores(z, grad_z, segments=segments, backend=backend))


def penalty_(param, grad, target_grad, _segments, previous, *_, backend):
    stats = sk.ops.penalty_(grad, param, target_grad, previous, weight=0.3, step=2, backend=backend)
    return [grad, previous, *stats]


def penalty_adamw_(param, grad, target_grad, _segments, previous, exp_avg, exp_avg_sq, *, backend):
    stats = sk.ops.penalty_adamw_(
        param, grad, target_grad, previous, exp_avg, exp_avg_sq, step=2, weight=0.3, backend=backend, **ADAMW
    )
    return [param, previous, exp_avg, exp_avg_sq, *stats]


OPS = [
    glu_forward, glu_backward, penalised_glu_backward, packed_glu_backward, act_forward, act_backward,
    token_scores, penalty_, penalty_adamw_,
]  # fmt: skip
# Recorded once and replayed with new inputs by a training step.
GRAPHED = [glu_backward, token_scores, penalty_adamw_]


def make_inputs(dtype=torch.float32):
    """Three tensors of rows, segments, and three states of an optimizer; the last is not negative."""
    tensors = [random_rows(ROWS, COLS, dtype) for _ in range(5)]
    return [*tensors[:3], as_segments(SAMPLES), *tensors[3:], torch.rand(ROWS, COLS).to(dtype)]


def clones(tensors):
    return [tensor.clone() for tensor in tensors]


def assert_same_bits(actual, expected):
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.sanitizer
@pytest.mark.parametrize("backend", [*GPU_BACKENDS, EMULATED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", OPS)
def test_the_same_bits_twice(op, dtype, backend):
    inputs = make_inputs(dtype)
    first = clones(op(*clones(inputs), backend=backend))
    assert_same_bits(op(*clones(inputs), backend=backend), first)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("op", GRAPHED)
def test_a_replayed_graph_equals_eager(op, backend):
    held = make_inputs()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        op(*clones(held), backend=backend)  # Triton compiles at the first launch, which a graph cannot record.
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = op(*held, backend=backend)
    fresh = make_inputs()
    expected = op(*clones(fresh), backend=backend)
    for place, value in zip(held, fresh, strict=True):
        place.copy_(value)
    graph.replay()
    assert_same_bits(recorded, expected)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_nothing_waits_on_the_host(op, backend):
    inputs = make_inputs()
    op(*clones(inputs), backend=backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        op(*inputs, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_the_current_stream_orders_the_kernels(op, backend):
    inputs = make_inputs()
    expected = op(*clones(inputs), backend=backend)
    held = [torch.zeros_like(tensor) for tensor in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)  # cycles: a kernel on another stream would read the zeros
        for place, value in zip(held, inputs, strict=True):
            place.copy_(value)
        actual = op(*held, backend=backend)
    torch.cuda.current_stream().wait_stream(stream)
    assert_same_bits(actual, expected)


def assert_last_rows_are_right(rows, cols, backend):
    tail = 8
    z, grad_z = (torch.zeros(rows, cols, dtype=torch.bfloat16) for _ in range(2))
    # Small integers, whose sums are exact in any order.
    z[-tail:], grad_z[-tail:] = (torch.randint(-3, 4, (tail, cols)).to(z.dtype) for _ in range(2))
    scores = sk.ops.token_scores(z, grad_z, segments=as_segments([(rows - tail, rows)]), backend=backend)
    products = z[-tail:].float() * grad_z[-tail:].float()
    for actual, expected in zip(scores, (products.amax(0), products.amin(0), products.sum(0)), strict=True):
        torch.testing.assert_close(actual[0], expected, rtol=0, atol=0)
    h = sk.ops.glu_forward(z, grad_z, activation="silu", backend=backend)
    ends = sk.ops.glu_forward(z[-tail:], grad_z[-tail:], activation="silu", backend=backend)
    assert torch.equal(h[-tail:], ends)


@pytest.mark.parametrize("backend", [EMULATED])
def test_the_last_rows(backend):
    assert_last_rows_are_right(1000, 64, backend)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_more_elements_than_32_bits_count(backend):
    rows, cols = 2**20 + 8, 2048
    if torch.cuda.mem_get_info()[0] < 6 * rows * cols * 2:
        pytest.skip("needs 26 GB of free device memory")
    assert_last_rows_are_right(rows, cols, backend)
