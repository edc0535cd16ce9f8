"""Formulas and loops that the Triton kernels share; the counterpart of csrc/include/ssiuu."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# The codes of `activations.CODES`, for comparison with a kernel's `ACT`.
SILU, GELU, GELU_TANH, RELU, RELU_SQUARED = (tl.constexpr(code) for code in range(5))


@triton.jit
def running_max(running, value):
    return tl.maximum(running, value, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def running_min(running, value):
    return tl.minimum(running, value, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sigmoid_and_slope(x):
    # The slope from both tails, so that no 1 - s cancels.
    e = tl.exp(-tl.abs(x))
    larger = 1.0 / (1.0 + e)
    smaller = e * larger
    return tl.where(x < 0, smaller, larger), smaller * larger


@triton.jit
def act_value(x, ACT: tl.constexpr):
    """act(x), float32."""
    if ACT == SILU:
        s, _ = sigmoid_and_slope(x)
        return x * s
    if ACT == GELU:
        return x * 0.5 * (1.0 + tl.erf(x * 0.70710678118654752))
    if ACT == GELU_TANH:
        # 0.5 x (1 + tanh(y)) = x sigmoid(2 y)
        s, _ = sigmoid_and_slope(1.5957691216057308 * (x + 0.044715 * x * x * x))
        return x * s
    if ACT == RELU:
        return tl.where(x < 0, 0.0, x)
    return tl.where(x < 0, 0.0, x * x)


@triton.jit
def act_value_and_grad(x, grad, ACT: tl.constexpr):
    """act(x), and grad * act'(x); float32."""
    if ACT == SILU:
        s, slope = sigmoid_and_slope(x)
        value = x * s
        grad_x = grad * (s + x * slope)
    elif ACT == GELU:
        cdf = 0.5 * (1.0 + tl.erf(x * 0.70710678118654752))
        pdf = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        value = x * cdf
        grad_x = grad * (cdf + x * pdf)
    elif ACT == GELU_TANH:
        s, slope = sigmoid_and_slope(1.5957691216057308 * (x + 0.044715 * x * x * x))
        value = x * s
        grad_x = grad * (s + x * slope * 1.5957691216057308 * (1.0 + 3.0 * 0.044715 * x * x))
    elif ACT == RELU:
        value = tl.where(x < 0, 0.0, x)
        grad_x = tl.where(x <= 0, 0.0, grad)
    else:
        value = tl.where(x < 0, 0.0, x * x)
        grad_x = tl.where(x <= 0, 0.0, 2.0 * x * grad)
    return value, grad_x


@triton.jit
def sample_rows(segments, samples, rows, b, BLOCK_B: tl.constexpr):
    """Rows [start, end) that sample b scores, and rows [first, last) that its programs have to write.

    The latter are its own and the unscored ones up to the next sample's start; the first sample in row order also takes
    the rows before it, and sample 0 takes all where every sample is empty. So each row is written once.

    Args:
        segments: int32 [B, 2], disjoint, in any order.
    """
    start = tl.load(segments + 2 * b)
    end = tl.load(segments + 2 * b + 1)
    last = rows
    before = 0
    filled = 0
    for base in range(0, samples, BLOCK_B):
        other = base + tl.arange(0, BLOCK_B)
        known = other < samples
        other_start = tl.load(segments + 2 * other, mask=known, other=0)
        other_end = tl.load(segments + 2 * other + 1, mask=known, other=0)
        nonempty = other_start < other_end
        last = tl.minimum(last, tl.min(tl.where(nonempty & (other_start > start), other_start, rows), 0))
        before += tl.sum((nonempty & (other_start < start)).to(tl.int32), 0)
        filled += tl.sum(nonempty.to(tl.int32), 0)
    first = tl.where(before == 0, 0, start)
    if start >= end:
        first = 0
        last = tl.where((filled == 0) & (b == 0), rows, 0)
    return start, end, first, last


@triton.jit
def split_rows(first, last, split, SPLITS: tl.constexpr):
    """Part `split` of rows [first, last)."""
    size = tl.cdiv(last - first, SPLITS)
    return tl.minimum(first + split * size, last), tl.minimum(first + (split + 1) * size, last)


@triton.jit(do_not_specialize=["samples"])
def finish_scores_kernel(
    partials,  # float32 [S, 3, B, D] max, min, sum of each split's rows
    segments,  # int32 [B, 2]
    scores,  # float32 [3, B, D]
    samples,
    cols,
    SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b = tl.program_id(0)
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = col < cols
    plane = samples.to(tl.int64) * cols
    place = b.to(tl.int64) * cols + col
    highest = tl.full([BLOCK_D], float("-inf"), tl.float32)
    lowest = tl.full([BLOCK_D], float("inf"), tl.float32)
    total = tl.zeros([BLOCK_D], tl.float32)
    for split in range(SPLITS):
        partial = partials + split * 3 * plane + place
        highest = running_max(highest, tl.load(partial, mask=inside, other=0.0))
        lowest = running_min(lowest, tl.load(partial + plane, mask=inside, other=0.0))
        total += tl.load(partial + 2 * plane, mask=inside, other=0.0)
    empty = tl.load(segments + 2 * b) >= tl.load(segments + 2 * b + 1)
    tl.store(scores + place, tl.where(empty, 0.0, highest), mask=inside)
    tl.store(scores + plane + place, tl.where(empty, 0.0, lowest), mask=inside)
    tl.store(scores + 2 * plane + place, total, mask=inside)


def finish_scores(partials: Tensor, segments: Tensor) -> Tensor:
    """Scores `[3, B, D]` from those of each split, `[S, 3, B, D]`; a sample without rows has zeros."""
    splits, _, samples, cols = partials.shape
    scores = torch.empty((3, samples, cols), dtype=torch.float32, device=partials.device)
    if scores.numel():
        grid = (samples, triton.cdiv(cols, 256))
        finish_scores_kernel[grid](partials, segments, scores, samples, cols, SPLITS=splits, BLOCK_D=256, num_warps=2)
    return scores
