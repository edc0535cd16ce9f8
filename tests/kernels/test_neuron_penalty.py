"""The penalty on neurons inside glu_backward and act_backward, against autograd with dP/dh held constant."""

import math

import pytest
import torch

import ssiuu_kernels as sk

from . import eager
from .accuracy import RELATIVE_L2
from .cases import BACKENDS, DTYPES, as_segments, random_rows

WEIGHT = 0.3
# (rows, columns, segments): of one sample (whose rows fit on chip, or do not), and of several.
SHAPES = {
    "one sample": (9, 70, None),
    "a long sample": (301, 5, None),
    "two samples of a row": (2, 33, [(0, 1), (1, 2)]),
    "padding and an empty sample": (30, 41, [(18, 27), (2, 9), (9, 9), (9, 15)]),
}


def make_case(shape, dtype):
    """Inputs, segments, and (ratio, bank, rows): samples that were seen, one that was not, one without a row."""
    rows, cols, pairs = SHAPES[shape]
    inputs = [random_rows(rows, cols, dtype, sliced=True) for _ in range(3)]
    segments = as_segments([(0, rows)] if pairs is None else pairs)
    samples = len(segments)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    ratio = torch.rand(samples, dtype=state) + 0.5
    bank = torch.randn(samples + 2, cols, dtype=state)
    bank_rows = torch.arange(samples) + 1
    if samples > 1:
        bank[bank_rows[1]] = math.nan
        bank_rows[-1] = -1
    return inputs, None if pairs is None else segments, segments, (ratio, bank, bank_rows)


def definition(gate, up, grad_h, segments, activation, ratio, bank, bank_rows):
    """grad_gate, grad_up and the new bank of `sum <h, grad_h> + WEIGHT * sum (A - bank)^2`, float64."""
    gate, up = gate.double().requires_grad_(), up.double().requires_grad_()
    h = eager.ACTIVATIONS[activation](gate) * up
    total, new_bank = (h * grad_h.double()).sum(), bank.double().clone()
    for b, (start, end) in enumerate(segments.tolist()):
        if bank_rows[b] < 0:
            continue
        constant = ratio[b].double() * grad_h[start:end].double()  # dP/dh
        attribution, before = (h[start:end] * constant).sum(0), bank[bank_rows[b]].double()
        growth = torch.where((attribution < 0) & ~before.isnan(), attribution - before.nan_to_num(), 0)
        total = total + WEIGHT * growth.square().sum()
        new_bank[bank_rows[b]] = attribution.detach()
    return *torch.autograd.grad(total, (gate, up)), new_bank


def relative(actual, expected):
    known = ~expected.isnan()
    assert torch.equal(actual.isnan(), ~known)
    return (actual.double() - expected)[known].norm() / expected[known].norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gated(shape, dtype, backend):
    inputs, given, segments, (ratio, bank, rows) = make_case(shape, dtype)
    expected = definition(*inputs, segments, "silu", ratio, bank, rows)
    penalty = sk.ops.NeuronPenalty(WEIGHT, ratio, bank, rows)
    grads = sk.ops.glu_backward(*inputs, segments=given, penalty=penalty, backend=backend)
    for actual, wanted in zip((grads.grad_gate, grads.grad_up), expected, strict=False):
        assert relative(actual, wanted) < RELATIVE_L2[dtype]
    assert relative(bank, expected[2]) < RELATIVE_L2[torch.float32]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_ungated(shape, backend):
    (x, _, grad_h), given, segments, (ratio, bank, rows) = make_case(shape, torch.float32)
    grad_x, _, new_bank = definition(x, torch.ones_like(x), grad_h, segments, "gelu", ratio, bank, rows)
    penalty = sk.ops.NeuronPenalty(torch.tensor(WEIGHT), ratio, bank, rows)
    grads = sk.ops.act_backward(x, grad_h, activation="gelu", segments=given, penalty=penalty, backend=backend)
    assert relative(grads.grad_x, grad_x) < RELATIVE_L2[torch.float32]
    assert relative(bank, new_bank) < RELATIVE_L2[torch.float32]


def test_definition_in_float64():
    inputs, given, segments, (ratio, bank, rows) = make_case("padding and an empty sample", torch.float64)
    expected = definition(*inputs, segments, "silu", ratio, bank, rows)
    penalty = sk.ops.NeuronPenalty(WEIGHT, ratio, bank, rows)
    grads = sk.ops.glu_backward(*inputs, segments=given, penalty=penalty)
    for actual, wanted in zip((grads.grad_gate, grads.grad_up, bank), expected, strict=True):
        assert relative(actual, wanted) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", ["one sample", "padding and an empty sample"])
def test_scores_and_h_are_those_without_the_penalty(shape, backend):
    inputs, given, _, (ratio, bank, rows) = make_case(shape, torch.float32)
    options = {"segments": given, "scores": True, "recompute_h": True, "backend": backend}
    plain = sk.ops.glu_backward(*inputs, **options)
    grads = sk.ops.glu_backward(*inputs, **options, penalty=sk.ops.NeuronPenalty(WEIGHT, ratio, bank, rows))
    assert torch.equal(grads.h, plain.h)
    for actual, expected in ((grads.h_scores, plain.h_scores), (grads.gate_scores, plain.gate_scores)):
        assert torch.allclose(torch.stack(actual), torch.stack(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_equals_separate(backend):
    gate_up, grad_h, bank = torch.randn(4, 6, 22), torch.randn(4, 6, 11), torch.randn(4, 11)
    ratio, rows, twin = torch.ones(4), torch.tensor([1, 0, 3, 2]), bank.clone()
    options = {"backend": backend}
    packed = sk.ops.packed_glu_backward(
        gate_up, grad_h, penalty=sk.ops.NeuronPenalty(WEIGHT, ratio, bank, rows), **options
    )
    separate = sk.ops.glu_backward(
        *gate_up.chunk(2, dim=-1), grad_h, penalty=sk.ops.NeuronPenalty(WEIGHT, ratio, twin, rows), **options
    )
    assert torch.equal(packed.grad_gate_up, torch.cat([separate.grad_gate, separate.grad_up], dim=-1))
    assert torch.equal(bank, twin)


BAD = {
    "penalty.ratio is torch.float64": {"ratio": torch.ones(2, dtype=torch.float64)},
    r"penalty.ratio is torch.float32 \[3\]": {"ratio": torch.ones(3)},
    r"penalty.bank is torch.float32 \[3, 5\]": {"bank": torch.zeros(3, 5)},
    "penalty.bank is not contiguous": {"bank": torch.zeros(8, 3).t()},
    "penalty.rows is torch.int32": {"rows": torch.tensor([0, 1], dtype=torch.int32)},
    r"penalty.rows is \[0, 3\]": {"rows": torch.tensor([0, 3])},
    r"penalty.rows is \[1, 1\]": {"rows": torch.tensor([1, 1])},
    r"penalty.weight is \[1\]": {"weight": torch.ones(1)},
}


@pytest.mark.parametrize(("message", "wrong"), BAD.items(), ids=BAD)
def test_bad_penalty(message, wrong):
    fields = {"weight": 1.0, "ratio": torch.ones(2), "bank": torch.zeros(3, 8), "rows": torch.tensor([0, 1])}
    x = torch.randn(2, 4, 8)
    with pytest.raises(ValueError, match=message):
        sk.ops.glu_backward(x, x, x, penalty=sk.ops.NeuronPenalty(**{**fields, **wrong}))
