"""Triton kernels of an MLP's activation, gated (`h = act(x) * up`) or not (`h = act(x)`), and of its backward.

A program owns a (column stripe, sample, split of the sample's rows) tile of `[T, F]`, and goes down its rows with the
scores in registers. What the ops hand over is described in glu.py and act.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.activations import CODES
from ..common.checks import dense_rows
from ..common.results import absent
from ..common.triton_host import split_count
from ..common.triton_kernels import (
    act_value,
    act_value_and_grad,
    finish_scores,
    running_max,
    running_min,
    sample_rows,
    split_rows,
)
from .arguments import BackwardArguments
from .neuron_penalty import NeuronPenalty
from .outputs import empty_grads, empty_scores, grad_views

# A thread moves 16 bytes of a tensor at once; 4 warps make a stripe of 128 or 256 columns and 8 or 4 rows.
BLOCK_D = {torch.float32: 128, torch.bfloat16: 256, torch.float16: 256}
BLOCK_T, NUM_WARPS = 4, 4
# The penalty's tile of 64 columns stays in registers up to this many rows, with 16 elements of a tensor a thread.
# Scores need registers too, of which 512 threads have too few.
RESIDENT_ROWS, RESIDENT_ROWS_WITH_SCORES, RESIDENT_COLS = 128, 64, 64
BLOCK_B = 64  # segments that `sample_rows` looks at at once


@triton.jit(do_not_specialize=["rows"])
def mlp_fwd_kernel(
    x,  # [T, F], gate where gated
    up,  # [T, F], not read unless gated
    h,  # [T, F]
    x_stride,
    up_stride,
    h_stride,
    rows,
    cols,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    col = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    present = (row < rows) & (col < cols)
    value = act_value(tl.load(x + row * x_stride + col, mask=present, other=0.0).to(tl.float32), ACT)
    if GATED:
        value *= tl.load(up + row * up_stride + col, mask=present, other=0.0).to(tl.float32)
    tl.store(h + row * h_stride + col, value.to(h.dtype.element_ty), mask=present)


@triton.jit
def mlp_grads(x, up, grad_h, ACT: tl.constexpr, GATED: tl.constexpr):
    """h, grad_x and grad_up of a tile, float32."""
    if GATED:
        value, grad_x = act_value_and_grad(x, grad_h * up, ACT)
        h = value * up
        grad_up = value * grad_h
    else:
        h, grad_x = act_value_and_grad(x, grad_h, ACT)
        grad_up = grad_h
    return h, grad_x, grad_up


@triton.jit(do_not_specialize=["samples", "rows"])
def mlp_bwd_kernel(
    x,  # [T, F], gate where gated
    up,  # [T, F], not read unless gated
    grad_h,  # [T, F]
    grad_x,  # [T, F]
    grad_up,  # [T, F], not written unless gated
    h,  # [T, F], not written unless WRITE_H
    segments,  # int32 [B, 2], not read unless SCORES
    h_partials,  # float32 [S, 3, B, F], not written unless SCORES
    x_partials,  # the same of x * grad_x
    x_stride,
    up_stride,
    grad_h_stride,
    grad_x_stride,
    grad_up_stride,
    h_stride,
    samples,
    rows,
    cols,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    WRITE_H: tl.constexpr,
    SCORES: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b = tl.program_id(0)
    split = tl.program_id(2)
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = col < cols
    if SCORES:
        start, end, first, last = sample_rows(segments, samples, rows, b, BLOCK_B)
        first, last = split_rows(first, last, split, SPLITS)
        h_max = tl.full([BLOCK_T, BLOCK_D], float("-inf"), tl.float32)
        h_min = tl.full([BLOCK_T, BLOCK_D], float("inf"), tl.float32)
        h_sum = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        x_max, x_min, x_sum = h_max, h_min, h_sum
    else:  # no sample, and nothing to carry from one block of rows to the next
        first = b * BLOCK_T
        last = tl.minimum(first + BLOCK_T, rows)
    for base in range(first, last, BLOCK_T):
        row = (base + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
        present = (row < last) & inside[None, :]
        x_tile = tl.load(x + row * x_stride + col[None, :], mask=present, other=0.0).to(tl.float32)
        grad_tile = tl.load(grad_h + row * grad_h_stride + col[None, :], mask=present, other=0.0).to(tl.float32)
        up_tile = grad_tile
        if GATED:
            up_tile = tl.load(up + row * up_stride + col[None, :], mask=present, other=0.0).to(tl.float32)
        h_tile, dx, dup = mlp_grads(x_tile, up_tile, grad_tile, ACT, GATED)
        tl.store(grad_x + row * grad_x_stride + col[None, :], dx.to(grad_x.dtype.element_ty), mask=present)
        if GATED:
            tl.store(grad_up + row * grad_up_stride + col[None, :], dup.to(grad_up.dtype.element_ty), mask=present)
        if WRITE_H:
            tl.store(h + row * h_stride + col[None, :], h_tile.to(h.dtype.element_ty), mask=present)
        if SCORES:
            scored = present & (row >= start) & (row < end)
            product = h_tile * grad_tile
            h_max = running_max(h_max, tl.where(scored, product, float("-inf")))
            h_min = running_min(h_min, tl.where(scored, product, float("inf")))
            h_sum += tl.where(scored, product, 0.0)
            product = x_tile * dx
            x_max = running_max(x_max, tl.where(scored, product, float("-inf")))
            x_min = running_min(x_min, tl.where(scored, product, float("inf")))
            x_sum += tl.where(scored, product, 0.0)
    if SCORES:
        plane = samples.to(tl.int64) * cols
        place = split * 3 * plane + b.to(tl.int64) * cols + col
        tl.store(h_partials + place, tl.reduce(h_max, 0, running_max), mask=inside)
        tl.store(h_partials + place + plane, tl.reduce(h_min, 0, running_min), mask=inside)
        tl.store(h_partials + place + 2 * plane, tl.sum(h_sum, 0), mask=inside)
        tl.store(x_partials + place, tl.reduce(x_max, 0, running_max), mask=inside)
        tl.store(x_partials + place + plane, tl.reduce(x_min, 0, running_min), mask=inside)
        tl.store(x_partials + place + 2 * plane, tl.sum(x_sum, 0), mask=inside)


@triton.jit
def penalty_factor(h_sum, ratio, bank, bank_row, col, inside, cols, twice_weight):
    """Factor of the backward signal of one sample's neurons (neuron-level penalty); stores A_t in the bank."""
    attribution = ratio * h_sum
    factor = tl.full(h_sum.shape, 1.0, tl.float32)
    if bank_row >= 0:
        place = bank + bank_row * cols + col
        before = tl.load(place, mask=inside, other=0.0)
        penalised = (attribution < 0) & (before == before)
        factor = tl.where(penalised, 1.0 + twice_weight * ratio * (attribution - before), 1.0)
        factor = tl.where(twice_weight > 0, factor, 1.0)
        # Several threads hold the same neuron: all must have read before one of them writes.
        tl.debug_barrier()
        tl.store(place, attribution, mask=inside)
    return factor


@triton.jit(do_not_specialize=["samples", "rows"])
def mlp_bwd_penalty_kernel(
    x,  # [T, F], gate where gated
    up,  # [T, F], not read unless gated
    grad_h,  # [T, F]
    grad_x,  # [T, F]
    grad_up,  # [T, F], not written unless gated
    h,  # [T, F], not written unless WRITE_H
    segments,  # int32 [B, 2]
    h_scores,  # float32 [3, B, F], not written unless SCORES
    x_scores,  # the same of x * grad_x
    weight,  # float32 [1], lambda
    ratio,  # float32 [B]
    bank,  # float32 [N, F]
    bank_rows,  # int64 [B]
    x_stride,
    up_stride,
    grad_h_stride,
    grad_x_stride,
    grad_up_stride,
    h_stride,
    samples,
    rows,
    cols,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    WRITE_H: tl.constexpr,
    SCORES: tl.constexpr,
    RESIDENT: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b = tl.program_id(0)
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = col < cols
    start, end, first, last = sample_rows(segments, samples, rows, b, BLOCK_B)
    h_max = tl.full([BLOCK_D], float("-inf"), tl.float32)
    h_min = tl.full([BLOCK_D], float("inf"), tl.float32)
    h_sum = tl.zeros([BLOCK_D], tl.float32)
    h_error = h_sum
    x_max, x_min, x_sum = h_max, h_min, h_sum
    # RESIDENT: the sample fits in one block, which stays in registers for the second half.
    x_tile = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    up_tile, grad_tile = x_tile, x_tile
    for base in range(start, end, BLOCK_T):
        row = (base + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
        scored = (row < end) & inside[None, :]
        x_tile = tl.load(x + row * x_stride + col[None, :], mask=scored, other=0.0).to(tl.float32)
        grad_tile = tl.load(grad_h + row * grad_h_stride + col[None, :], mask=scored, other=0.0).to(tl.float32)
        if GATED:
            up_tile = tl.load(up + row * up_stride + col[None, :], mask=scored, other=0.0).to(tl.float32)
        h_tile, dx, dup = mlp_grads(x_tile, up_tile, grad_tile, ACT, GATED)
        product = h_tile * grad_tile
        # Compensated (Kahan): nothing splits this sum, and the gradients depend on it.
        term = tl.sum(product, 0) - h_error
        longer = h_sum + term
        h_error = (longer - h_sum) - term
        h_sum = longer
        if SCORES:
            h_max = running_max(h_max, tl.reduce(tl.where(scored, product, float("-inf")), 0, running_max))
            h_min = running_min(h_min, tl.reduce(tl.where(scored, product, float("inf")), 0, running_min))
            product = x_tile * dx
            x_max = running_max(x_max, tl.reduce(tl.where(scored, product, float("-inf")), 0, running_max))
            x_min = running_min(x_min, tl.reduce(tl.where(scored, product, float("inf")), 0, running_min))
            x_sum += tl.sum(product, 0)
    bank_row = tl.load(bank_rows + b)
    factor = penalty_factor(h_sum, tl.load(ratio + b), bank, bank_row, col, inside, cols, 2.0 * tl.load(weight))
    for base in range(first, last, BLOCK_T):
        row = (base + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
        present = (row < last) & inside[None, :]
        scored = (row >= start) & (row < end)
        if not RESIDENT:
            x_tile = tl.load(x + row * x_stride + col[None, :], mask=present, other=0.0).to(tl.float32)
            grad_tile = tl.load(grad_h + row * grad_h_stride + col[None, :], mask=present, other=0.0).to(tl.float32)
            if GATED:
                up_tile = tl.load(up + row * up_stride + col[None, :], mask=present, other=0.0).to(tl.float32)
        rescaled = grad_tile * tl.where(scored, factor[None, :], 1.0)
        h_tile, dx, dup = mlp_grads(x_tile, up_tile, rescaled, ACT, GATED)
        tl.store(grad_x + row * grad_x_stride + col[None, :], dx.to(grad_x.dtype.element_ty), mask=present)
        if GATED:
            tl.store(grad_up + row * grad_up_stride + col[None, :], dup.to(grad_up.dtype.element_ty), mask=present)
        if WRITE_H:
            tl.store(h + row * h_stride + col[None, :], h_tile.to(h.dtype.element_ty), mask=present)
    if SCORES:
        plane = samples.to(tl.int64) * cols
        place = b.to(tl.int64) * cols + col
        filled = start < end
        tl.store(h_scores + place, tl.where(filled, h_max, 0.0), mask=inside)
        tl.store(h_scores + place + plane, tl.where(filled, h_min, 0.0), mask=inside)
        tl.store(h_scores + place + 2 * plane, h_sum, mask=inside)
        tl.store(x_scores + place, tl.where(filled, x_max, 0.0), mask=inside)
        tl.store(x_scores + place + plane, tl.where(filled, x_min, 0.0), mask=inside)
        tl.store(x_scores + place + 2 * plane, x_sum, mask=inside)


def _rows(tensor: Tensor | None, stand_in: Tensor) -> tuple[Tensor, int]:
    """A tensor and its row stride; for an absent one another that the kernel does not touch."""
    tensor = stand_in if tensor is None else tensor
    return tensor, tensor.stride(0)


def mlp_forward(x: Tensor, up: Tensor | None, activation: str) -> Tensor:
    x, up = dense_rows(x), None if up is None else dense_rows(up)
    rows, cols = x.shape
    h = torch.empty((rows, cols), dtype=x.dtype, device=x.device)
    if h.numel():
        up_rows, up_stride = _rows(up, x)
        block_d = BLOCK_D[x.dtype]
        mlp_fwd_kernel[triton.cdiv(rows, BLOCK_T), triton.cdiv(cols, block_d)](
            x, up_rows, h, x.stride(0), up_stride, h.stride(0), rows, cols,
            ACT=CODES[activation], GATED=up is not None, BLOCK_T=BLOCK_T, BLOCK_D=block_d, num_warps=NUM_WARPS,
        )  # fmt: skip
    return h


def mlp_backward(a: BackwardArguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, grad_h, up = dense_rows(a.x), dense_rows(a.grad_h), None if a.up is None else dense_rows(a.up)
    segments, scores, penalty = a.segments, a.scores, a.penalty
    grads = empty_grads(x, up, a.packed)
    grad_x, grad_up = grad_views(grads, a.packed)
    h = torch.empty(x.shape, dtype=x.dtype, device=x.device) if a.recompute_h else None
    tensors, strides = zip(*(_rows(t, x) for t in (x, up, grad_h, grad_x, grad_up, h)), strict=True)
    constants = {"ACT": CODES[a.activation], "GATED": up is not None, "WRITE_H": a.recompute_h, "BLOCK_B": BLOCK_B}
    samples = len(segments)
    if penalty is not None and samples:
        h_scores, x_scores = (empty_scores(x, segments) if scores else None for _ in range(2))
        _launch_penalised(tensors, strides, segments, h_scores, x_scores, a.longest, penalty, constants)
    elif scores and samples:
        h_scores, x_scores = _launch_scored(tensors, strides, segments, constants)
    else:
        _launch_plain(tensors, strides, constants)
        h_scores, x_scores = (empty_scores(x, segments) if scores else None for _ in range(2))
    found = (h_scores, x_scores) if scores else (absent(x), absent(x))
    return *grads, absent(x) if h is None else h, *found


def _launch_plain(tensors, strides, constants) -> None:
    rows, cols = tensors[0].shape
    if rows == 0:
        return
    x, block_d = tensors[0], BLOCK_D[tensors[0].dtype]
    mlp_bwd_kernel[triton.cdiv(rows, BLOCK_T), triton.cdiv(cols, block_d)](
        *tensors, x, x, x, *strides, 1, rows, cols,
        **constants, SCORES=False, SPLITS=1, BLOCK_T=BLOCK_T, BLOCK_D=block_d, num_warps=NUM_WARPS,
    )  # fmt: skip


def _launch_scored(tensors, strides, segments, constants) -> tuple[Tensor, Tensor]:
    rows, cols = tensors[0].shape
    samples, block_d = len(segments), BLOCK_D[tensors[0].dtype]
    splits = split_count(rows, samples)
    h_partials, x_partials = torch.empty((2, splits, 3, samples, cols), dtype=torch.float32, device=segments.device)
    if h_partials.numel():
        mlp_bwd_kernel[samples, triton.cdiv(cols, block_d), splits](
            *tensors, segments, h_partials, x_partials, *strides, samples, rows, cols,
            **constants, SCORES=True, SPLITS=splits, BLOCK_T=BLOCK_T, BLOCK_D=block_d, num_warps=NUM_WARPS,
        )  # fmt: skip
    return finish_scores(h_partials, segments), finish_scores(x_partials, segments)


def _launch_penalised(
    tensors, strides, segments, h_scores, x_scores, longest: int, penalty: NeuronPenalty, constants
) -> None:
    rows, cols = tensors[0].shape
    if cols == 0:
        return
    scores = h_scores is not None
    resident = 0 < longest <= (RESIDENT_ROWS_WITH_SCORES if scores else RESIDENT_ROWS)
    if resident:
        block_t, block_d, warps = resident_blocks(longest)
    else:
        block_t, block_d, warps = BLOCK_T, BLOCK_D[tensors[0].dtype], NUM_WARPS
    mlp_bwd_penalty_kernel[len(segments), triton.cdiv(cols, block_d)](
        *tensors, segments, *(segments if part is None else part for part in (h_scores, x_scores)),
        *penalty, *strides, len(segments), rows, cols,
        **constants, SCORES=scores, RESIDENT=resident, BLOCK_T=block_t, BLOCK_D=block_d, num_warps=warps,
    )  # fmt: skip


def resident_blocks(longest: int) -> tuple[int, int, int]:
    """Rows, columns and warps of a program that keeps a sample of up to `longest` rows in registers."""
    block_t = triton.next_power_of_2(max(longest, 8))
    return block_t, RESIDENT_COLS, block_t * RESIDENT_COLS // (16 * 32)
