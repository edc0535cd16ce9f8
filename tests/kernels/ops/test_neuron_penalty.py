"""The neuron-level penalty inside the MLP's backward: every backend against autograd of the penalised objective."""

import math

import pytest
import torch

import ssiuu_kernels as sk

from ...support import eager
from ...support.accuracy import assert_as_accurate_as_pytorch, assert_same_direction
from ...support.cases import BACKENDS, DTYPES, SEGMENTED, as_segments, random_rows

OPS = {"gated": (sk.ops.glu_backward, 2), "ungated": (sk.ops.act_backward, 1)}
NAN = float("nan")
ROWS = 40  # of the bank: more than a case has samples


def random_penalty(segments, cols, *, weight=0.1, dtype=torch.float32):
    """A bank with seen and unseen neurons, and a sample without a row.

    Ratios keep attributions near 1, whatever the samples' lengths. Otherwise the penalty multiplies the rounding errors
    of the sums, and a comparison of two such errors on a few columns is a matter of luck.
    """
    samples = len(segments)
    lengths = (segments[:, 1] - segments[:, 0]).clamp(min=1)
    bank = torch.randn(ROWS, cols, dtype=dtype)
    bank[torch.rand(ROWS, cols) < 0.2] = NAN
    rows = torch.randperm(ROWS)[:samples]
    if samples > 1:
        rows[0] = -1
    ratio = (torch.rand(samples) + 0.5) / lengths.sqrt()
    return sk.ops.NeuronPenalty(weight, ratio.to(dtype), bank, rows)


def compare(op, inputs, grad_h, segments, penalty, *, activation="silu", backend):
    """Gradients, bank, and the untouched rows of the bank.

    Gradients are compared as vectors: the penalty multiplies the rounding error of a sum, and the largest of a few such
    errors, against the largest that PyTorch makes, is a matter of luck.
    """
    backward, _ = OPS[op]
    weight, ratio, bank, rows = penalty
    before = bank.clone()
    stored = before[rows]  # row -1 is ignored by the definition
    result = backward(*inputs, grad_h, activation=activation, segments=segments, penalty=penalty, backend=backend)
    exact, attribution = eager.neuron_penalty(
        [x.double() for x in inputs], grad_h.double(), segments, activation, weight, ratio, stored, rows
    )
    _, single_attribution = eager.neuron_penalty(
        [x.float() for x in inputs], grad_h.float(), segments, activation, weight, ratio, stored, rows
    )
    dtype = grad_h.dtype
    for actual, wanted in zip(result[: len(inputs)], exact, strict=True):
        assert_same_direction(actual, wanted, dtype)
    known = rows >= 0
    stored = torch.cat([bank[rows[known]].flatten(), single_attribution[-1:]])
    assert_as_accurate_as_pytorch(stored, attribution, single_attribution, torch.float32)
    before[rows[known]] = bank[rows[known]]
    assert torch.equal(bank.nan_to_num(nan=7.0), before.nan_to_num(nan=7.0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [case for case in SEGMENTED if case != "no samples"])
@pytest.mark.parametrize("op", OPS)
def test_every_shape(op, case, dtype, backend):
    rows, cols, pairs = SEGMENTED[case]
    *inputs, grad_h = (random_rows(rows, cols, dtype) for _ in range(OPS[op][1] + 1))
    segments = as_segments(pairs)
    compare(op, inputs, grad_h, segments, random_penalty(segments, cols), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", eager.ACTIVATIONS)
@pytest.mark.parametrize("op", OPS)
def test_every_activation(op, activation, backend):
    *inputs, grad_h = (random_rows(23, 45, torch.float32, sliced=True) for _ in range(OPS[op][1] + 1))
    segments = as_segments([(2, 9), (11, 23)])
    compare(op, inputs, grad_h, segments, random_penalty(segments, 45), activation=activation, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
# Rows that do and do not fit on the chip, columns that are and are not a multiple of 16 bytes.
@pytest.mark.parametrize("shape", [(3, 5, 37), (2, 21, 72), (2, 140, 8)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_samples_of_equal_length(op, shape, dtype, backend):
    """Three dimensions and no segments: a kernel knows every sample's length beforehand."""
    backward, count = OPS[op]
    samples, rows, cols = shape
    *inputs, grad_h = (torch.randn(shape).to(dtype) for _ in range(count + 1))
    segments = as_segments([(b * rows, (b + 1) * rows) for b in range(samples)])
    penalty = random_penalty(segments, cols)
    flat = penalty._replace(bank=penalty.bank.clone())
    actual = backward(*inputs, grad_h, scores=True, penalty=penalty, backend=backend)
    expected = backward(
        *(x.flatten(0, 1) for x in inputs), grad_h.flatten(0, 1), segments=segments, scores=True, penalty=flat,
        backend="reference",
    )  # fmt: skip
    for left, right in zip(actual[:count], expected[:count], strict=True):
        torch.testing.assert_close(left.flatten(0, 1), right)
    for left, right in zip(actual[-2:], expected[-2:], strict=True):
        torch.testing.assert_close(torch.stack(left), torch.stack(right), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(penalty.bank, flat.bank, equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_the_weight_may_be_a_tensor(op, backend):
    backward, count = OPS[op]
    tensors = [torch.randn(9, 21) for _ in range(count + 1)]
    penalty = random_penalty(as_segments([(0, 9)]), 21, weight=0.25)
    same = penalty._replace(weight=torch.tensor(0.25), bank=penalty.bank.clone())
    number = backward(*tensors, penalty=penalty, backend=backend)
    tensor = backward(*tensors, penalty=same, backend=backend)
    assert torch.equal(number[0], tensor[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_scores_and_h_are_those_without_it(op, backend):
    backward, count = OPS[op]
    tensors = [torch.randn(30, 21) for _ in range(count + 1)]
    segments = as_segments([(0, 13), (15, 30)])
    options = {"segments": segments, "scores": True, "recompute_h": True, "backend": backend}
    with_it = backward(*tensors, penalty=random_penalty(segments, 21), **options)
    without = backward(*tensors, **options)
    assert not torch.equal(with_it[0], without[0])
    assert torch.equal(with_it.h, without.h)
    for scores, expected in zip(with_it[-2:], without[-2:], strict=True):
        assert torch.equal(scores.max, expected.max)
        assert torch.equal(scores.min, expected.min)
        torch.testing.assert_close(scores.sum, expected.sum, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_samples_without_rows_score_0_and_are_stored(op, backend):
    backward, count = OPS[op]
    tensors = [torch.randn(0, 7) for _ in range(count + 1)]
    penalty = sk.ops.NeuronPenalty(0.1, torch.ones(2), torch.ones(3, 7), torch.tensor([2, 0]))
    options = {"segments": as_segments([(0, 0), (0, 0)]), "scores": True, "penalty": penalty, "backend": backend}
    for scores in backward(*tensors, **options)[-2:]:
        assert torch.equal(torch.stack(scores), torch.zeros(3, 2, 7))
    assert penalty.bank[:, 0].tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_a_ratio_of_0_changes_no_gradient(op, backend):
    backward, count = OPS[op]
    tensors = [torch.randn(8, 21) for _ in range(count + 1)]
    penalty = random_penalty(as_segments([(0, 8)]), 21)._replace(ratio=torch.zeros(1))
    with_it, without = (backward(*tensors, penalty=p, backend=backend) for p in (penalty, None))
    assert torch.equal(with_it[0], without[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_nan_reaches_the_bank(op, backend):
    backward, count = OPS[op]
    *inputs, grad_h = (torch.randn(6, 21) for _ in range(count + 1))
    grad_h[3, 17] = NAN
    bank = torch.zeros(2, 21)
    penalty = sk.ops.NeuronPenalty(0.1, torch.ones(1), bank, torch.tensor([1]))
    grad = backward(*inputs, grad_h, penalty=penalty, backend=backend)[0]
    assert bank.isnan().nonzero().tolist() == [[1, 17]]
    assert grad.isnan().nonzero().tolist() == [[3, 17]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("weight", [0.0, *(torch.tensor(x) for x in (0.0, NAN, math.inf, -1.0))], ids=str)
def test_without_a_usable_weight_there_is_no_penalty(weight, op, backend):
    """Whatever the bank holds: 0 times infinity is NaN."""
    backward, count = OPS[op]
    tensors = [torch.randn(8, 21) for _ in range(count + 1)]
    bank = torch.tensor([math.inf, -math.inf, 1.0])[:, None].expand(3, 21).contiguous()
    segments = as_segments([(0, 3), (3, 5), (5, 8)])
    penalty = sk.ops.NeuronPenalty(weight, torch.ones(3), bank, torch.arange(3))
    with_it, without = (backward(*tensors, segments=segments, penalty=p, backend=backend) for p in (penalty, None))
    assert torch.equal(with_it[0], without[0])


@pytest.mark.parametrize("op", OPS)
def test_reference_in_float64(op):
    *inputs, grad_h = (torch.randn(17, 9, dtype=torch.float64) for _ in range(OPS[op][1] + 1))
    segments = as_segments([(0, 6), (6, 9), (9, 17)])
    penalty = random_penalty(segments, 9, dtype=torch.float64)
    weight, ratio, bank, rows = penalty
    exact, _ = eager.neuron_penalty(inputs, grad_h, segments, "gelu", weight, ratio, bank[rows], rows)
    options = {"segments": segments, "activation": "gelu", "penalty": penalty}
    actual = OPS[op][0](*inputs, grad_h, **options)
    for value, wanted in zip(actual, exact, strict=False):
        torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", OPS)
def test_compiles_into_one_graph(op):
    """The bank's update is part of the graph."""
    tensors = [torch.randn(9, 21) for _ in range(OPS[op][1] + 1)]
    penalty = random_penalty(as_segments([(0, 9)]), 21)

    def run(bank):
        return OPS[op][0](*tensors, penalty=penalty._replace(bank=bank))[0]

    eagerly, compiled = penalty.bank.clone(), penalty.bank.clone()
    graph = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(graph(compiled), run(eagerly))
    assert torch.equal(compiled.nan_to_num(), eagerly.nan_to_num())


BAD = {
    "a float64 bank": (TypeError, "bank", {"bank": torch.zeros(2, 5, dtype=torch.float64)}),
    "another width": (ValueError, "bank", {"bank": torch.zeros(2, 4)}),
    "a strided bank": (ValueError, "contiguous", {"bank": torch.zeros(5, 2).t()}),
    "int32 rows": (TypeError, "rows", {"rows": torch.zeros(1, dtype=torch.int32)}),
    "more ratios than samples": (ValueError, "ratio", {"ratio": torch.ones(2)}),
    "a negative weight": (ValueError, "weight", {"weight": -1.0}),
    "NaN for a weight": (ValueError, "weight", {"weight": NAN}),
    "a weight that overflows": (ValueError, "weight", {"weight": 1e39}),
    "a list of ratios": (TypeError, "ratio", {"ratio": [1.0]}),
    "weights": (ValueError, "weight", {"weight": torch.ones(1)}),
    "a row past the end": (ValueError, "rows", {"rows": torch.tensor([2])}),
    "row -2": (ValueError, "rows", {"rows": torch.tensor([-2])}),
    "another device": (ValueError, "ratio", {"ratio": torch.ones(1, device="meta")}),
}


@pytest.mark.parametrize(("error", "message", "changes"), BAD.values(), ids=BAD)
def test_bad_input(error, message, changes):
    penalty = sk.ops.NeuronPenalty(0.1, torch.ones(1), torch.zeros(2, 5), torch.tensor([0]))._replace(**changes)
    with pytest.raises(error, match=message):
        sk.ops.act_backward(torch.randn(3, 5), torch.randn(3, 5), penalty=penalty)


def test_a_row_named_twice():
    penalty = sk.ops.NeuronPenalty(0.1, torch.ones(2), torch.zeros(2, 5), torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="different"):
        sk.ops.act_backward(torch.randn(2, 3, 5), torch.randn(2, 3, 5), penalty=penalty)
