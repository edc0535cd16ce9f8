"""The compiled module by itself: what it says of its build, and its kernels called with raw pointers."""

import ctypes
import math
import re
from pathlib import Path

import pytest
import torch

from ssiuu_kernels import _native, ops
from ssiuu_kernels.ops.penalty.scalars import step_scalars

ROOT = Path(__file__).parents[2]
FLOAT32 = 0


def hidden_backward(activation, gate, up, grad_h, segments):
    """Gradients, and scores over `segments`, of float32 [T, F] tensors on the CPU kernel."""
    rows, cols = gate.shape
    grad_gate, grad_up = torch.full_like(gate, math.nan), torch.full_like(gate, math.nan)
    h_scores, gate_scores = torch.full((2, 3, len(segments), cols), math.nan)
    _native.hidden_backward_cpu(
        FLOAT32, activation, rows, cols,
        gate.data_ptr(), gate.stride(0), up.data_ptr(), up.stride(0), grad_h.data_ptr(), grad_h.stride(0),
        grad_gate.data_ptr(), cols, grad_up.data_ptr(), cols, 0, 0,
        segments.data_ptr(), len(segments), 0, h_scores.data_ptr(), gate_scores.data_ptr(), 0, 0, 0, 0,
    )  # fmt: skip
    return grad_gate, grad_up, h_scores, gate_scores


def penalty(param, grad, target_grad, prev_attribution, step=2):
    stats = torch.full((5,), math.nan, dtype=torch.float64)
    scalars = step_scalars(step, 10.0, torch.device("cpu")).host
    _native.penalty_cpu(
        FLOAT32, FLOAT32, FLOAT32, [param.numel()], [param.data_ptr()], [grad.data_ptr()], [target_grad.data_ptr()],
        [prev_attribution.data_ptr()], [0], [0], [], scalars, 0, False, stats.data_ptr(),
    )  # fmt: skip
    return stats


def test_build_info_describes_the_build():
    info = _native.build_info()
    assert {name: type(value) for name, value in info.items()} == {
        "cpu_isa": str,
        "openmp": bool,
        "cuda": bool,
        "cuda_archs": str,
        "why_no_cuda": str,
        "compiler": str,
    }
    assert re.fullmatch(r"(gcc|clang) \d+\..*", info["compiler"])
    assert info["cuda"] == bool(info["cuda_archs"])
    assert info["cuda"] != bool(info["why_no_cuda"])


def test_this_cpu_runs_what_was_compiled_for_it():
    assert _native.cpu_lacks() == ""


def test_module_does_not_link_torch():
    binary = Path(_native.__file__).read_bytes()
    assert b"libtorch" not in binary
    assert b"libc10" not in binary


def test_kernels_include_neither_torch_nor_python():
    for source in (ROOT / "csrc").rglob("*.*"):
        allowed = {"pybind11"} if source.name == "bindings.cpp" else set()
        included = set(re.findall(r'#include [<"](torch|ATen|c10|pybind11|Python)\b', source.read_text()))
        assert included <= allowed, source


@pytest.mark.parametrize("code", [-1, 2, 99])
def test_unknown_dtype_code_is_refused(code):
    with pytest.raises(ValueError, match=f"unknown dtype code {code}"):
        _native.token_scores_cpu(code, 0, 0, 0, 0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize("code", [-1, 5])
def test_unknown_activation_code_is_refused(code):
    with pytest.raises(ValueError, match=f"unknown activation code {code}"):
        _native.hidden_forward_cpu(FLOAT32, code, 0, 0, 0, 0, 0, 0, 0, 0)


def with_threads(count, function):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return function()
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not _native.build_info()["openmp"], reason="built without OpenMP: one thread")
def test_kernels_use_as_many_threads_as_torch():
    """Whichever OpenMP library the module uses: clang's is not torch's, nor is the system's where torch renames it."""
    runtime, x = ctypes.CDLL(_native.__file__), torch.randn(2, 3)

    def threads():
        ops.glu_forward(x, x, backend="native")
        return runtime.omp_get_max_threads()

    assert [with_threads(count, threads) for count in (3, 1)] == [3, 1]


def test_hidden_backward_does_not_depend_on_the_thread_count():
    gate, up, grad_h = torch.randn(3, 700, 1100)
    segments = torch.tensor([[0, 600], [650, 700]], dtype=torch.int32)
    one = with_threads(1, lambda: hidden_backward(0, gate, up, grad_h, segments))
    three = with_threads(3, lambda: hidden_backward(0, gate, up, grad_h, segments))
    for a, b in zip(one, three, strict=True):
        assert torch.equal(a, b)


def test_outputs_of_several_huge_pages():
    """Where huge pages are asked for: the memory of a fresh output, and of nothing else."""
    rows, cols = 1100, 8192  # over 32 MB
    gate, up, grad_h = torch.randn(3, rows, cols)
    around = torch.full((rows * cols + 2000,), 7.0)
    h = around[1000:-1000]
    _native.hidden_forward_cpu(
        FLOAT32, 0, rows, cols, gate.data_ptr(), cols, up.data_ptr(), cols, h.data_ptr(), cols
    )  # fmt: skip
    torch.testing.assert_close(h.view(rows, cols), torch.nn.functional.silu(gate) * up)
    assert around[:1000].eq(7).all()
    assert around[-1000:].eq(7).all()
    grad_gate, grad_up, _, _ = hidden_backward(0, gate, up, grad_h, torch.zeros(0, 2, dtype=torch.int32))
    inputs = [gate.requires_grad_(), up.requires_grad_()]
    expected = torch.autograd.grad(torch.nn.functional.silu(gate) * up, inputs, grad_h)
    torch.testing.assert_close((grad_gate, grad_up), tuple(expected))


def test_penalty_does_not_depend_on_the_thread_count_or_alignment():
    n = 100_003
    tensors = torch.randn(4, n)

    def run(offset):
        copies = [torch.empty(n + offset)[offset:].copy_(row) for row in tensors]
        return penalty(*copies), copies[1], copies[3]

    expected = with_threads(1, lambda: run(0))
    for threads, offset in [(3, 0), (1, 1), (2, 7)]:
        for a, b in zip(with_threads(threads, lambda offset=offset: run(offset)), expected, strict=True):
            assert torch.equal(a, b)


def test_penalty_counts_squares_too_small_for_float32():
    param, grad = torch.full((100,), -1.0), torch.zeros(100)
    target_grad, previous = torch.full((100,), 1e-25), torch.zeros(100)
    value = penalty(param, grad, target_grad, previous)[0]
    assert value == pytest.approx(100 * 1e-50, rel=1e-6)


def test_first_step_ignores_previous_attribution():
    param, target_grad, grad = torch.randn(3, 50)
    before = grad.clone()
    stats = penalty(param, grad, target_grad, torch.full((50,), math.nan), step=1)
    assert torch.equal(grad, before)
    assert stats[:2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("activation", "exact"),
    [
        (0, torch.nn.functional.silu),
        (1, torch.nn.functional.gelu),
        (2, lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
    ],
    ids=["silu", "gelu", "gelu_tanh"],
)
def test_activations_over_the_whole_range(activation, exact):
    """Value and slope of each activation against float64, from denormal to saturated arguments of either sign."""
    magnitudes = torch.cat([torch.logspace(-44, 3, 5000), torch.linspace(0, 20, 20_000)])
    x = torch.cat([magnitudes, -magnitudes]).reshape(1, -1)
    one, segments = torch.ones_like(x), torch.tensor([[0, 1]], dtype=torch.int32)
    slope, value, _, _ = hidden_backward(activation, x, one, one, segments)

    x64 = x.double().requires_grad_()
    value64 = exact(x64)
    value64.sum().backward()
    assert torch.allclose(value.double(), value64.detach(), rtol=4e-7, atol=4e-7)
    assert torch.allclose(slope.double(), x64.grad, rtol=4e-7, atol=4e-7)
