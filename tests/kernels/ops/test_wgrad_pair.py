"""wgrad_pair against the products written out, sample by sample."""

import pytest
import torch

import ssiuu_kernels as sk

from ...support.accuracy import assert_as_accurate_as_pytorch, assert_same_direction

ROWS, IN, OUT = 37, 19, 23
# Which rows are target rows, and as what they are handed over.
TARGET_ROWS = {
    "a slice": slice(5, 20),
    "the first rows": slice(0, 9),
    "places": torch.tensor([1, 2, 7, 30, 36]),
    "all": slice(None),
    "every third row": slice(4, 30, 3),
    "a step beyond the end": slice(30, None, 50),
    "counted from the end": slice(-9, -2),
    "start after stop": slice(20, 5),
    "no places": torch.tensor([], dtype=torch.int64),
}


def inputs(dtype, target_rows):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, grad_y = torch.randn(ROWS, IN).to(dtype), torch.randn(ROWS, OUT).to(dtype)
    loss_weights, target_weights = torch.randn(ROWS, dtype=wide), torch.zeros(ROWS, dtype=wide)
    target_weights[target_rows] = torch.rand(len(target_weights[target_rows]), dtype=wide)
    return x, grad_y, loss_weights, target_weights


def exact(x, grad_y, weights):
    return torch.einsum("to,t,ti->oi", grad_y.double(), weights.double(), x.double())


@pytest.mark.parametrize("widths", ["wider out", "wider in"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target_rows", TARGET_ROWS.values(), ids=TARGET_ROWS)
def test_both_products(target_rows, dtype, widths):
    x, grad_y, *weights = inputs(dtype, target_rows)
    if widths == "wider in":
        x, grad_y = grad_y, x
    pair = sk.ops.wgrad_pair(x, grad_y, *weights, target_rows=target_rows)
    for actual, weight in zip(pair, weights, strict=True):
        eager = (grad_y * weight[:, None].to(dtype)).t() @ x
        assert actual.dtype == dtype
        assert_as_accurate_as_pytorch(actual, exact(x, grad_y, weight), eager, dtype)
        assert_same_direction(actual, exact(x, grad_y, weight), dtype)


@pytest.mark.parametrize("target_rows", TARGET_ROWS.values(), ids=TARGET_ROWS)
def test_a_common_ratio_gives_the_same(target_rows):
    x, grad_y, loss_weights, target_weights = inputs(torch.float64, target_rows)
    target_weights[target_rows] = 0.3 * loss_weights[target_rows]
    pair = sk.ops.wgrad_pair(x, grad_y, loss_weights, target_weights, target_rows=target_rows, ratio=0.3)
    for actual, weight in zip(pair, (loss_weights, target_weights), strict=True):
        assert_same_direction(actual, exact(x, grad_y, weight), torch.float64)


def test_without_rows():
    x, grad_y, *weights = inputs(torch.float32, slice(None))
    pair = sk.ops.wgrad_pair(x[:0], grad_y[:0], *(weight[:0] for weight in weights))
    assert all(torch.equal(grad, torch.zeros(OUT, IN)) for grad in pair)


def test_compiles_without_a_break():
    arguments = inputs(torch.float32, slice(None))
    compiled = torch.compile(sk.ops.wgrad_pair, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(*arguments), sk.ops.wgrad_pair(*arguments), strict=True):
        assert torch.equal(actual, expected)


BAD = {
    "rows that differ": (r"expected \[T, in\] and \[T, out\]", {"grad_y": torch.randn(3, OUT)}),
    "types that differ": ("expected the same", {"grad_y": torch.randn(ROWS, OUT).double()}),
    "weights of another type": ("loss_weights is torch.float64", {"loss_weights": torch.ones(ROWS).double()}),
    "weights of another length": ("target_weights is", {"target_weights": torch.ones(2)}),
    "places that are no integers": ("target_rows is torch.float32", {"target_rows": torch.ones(2)}),
    "places elsewhere": ("target_rows is .* on meta", {"target_rows": torch.ones(2, dtype=torch.int64, device="meta")}),
    "a place named twice": ("no row twice", {"target_rows": torch.tensor([1, 1, 3])}),
    "places out of order": ("expected increasing places", {"target_rows": torch.tensor([3, 1])}),
    "a place before the start": ("from 0 to 36", {"target_rows": torch.tensor([-1, 3])}),
    "a place past the end": ("from 0 to 36", {"target_rows": torch.tensor([3, 37])}),
    "a slice that goes backwards": ("a positive step", {"target_rows": slice(20, 5, -1)}),
    "a ratio that is no number": ("ratio=nan", {"ratio": float("nan")}),
}


@pytest.mark.parametrize(("message", "changes"), BAD.values(), ids=BAD)
def test_bad_input(message, changes):
    names = ("x", "grad_y", "loss_weights", "target_weights")
    arguments = dict(zip(names, inputs(torch.float32, slice(None)), strict=True)) | changes
    for ratio in ({}, {"ratio": 0.5}):
        with pytest.raises(ValueError, match=message):
            sk.ops.wgrad_pair(**{**ratio, **arguments})


def test_bad_type():
    _, *others = inputs(torch.float32, slice(None))
    with pytest.raises(TypeError, match=r"x has dtype torch\.int64"):
        sk.ops.wgrad_pair(torch.ones(ROWS, IN, dtype=torch.int64), *others)
    with pytest.raises(TypeError, match="target_rows is a list"):
        sk.ops.wgrad_pair(*inputs(torch.float32, slice(None)), target_rows=[1, 2])
