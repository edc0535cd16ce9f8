"""`token_scores` in Triton: one program a (column stripe, sample, split of its rows)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.checks import dense_rows
from ..common.triton_host import split_count
from ..common.triton_kernels import finish_scores, running_max, running_min, split_rows

# 8 rows of 256 columns a step: each of the 128 threads loads 16 bytes twice from either tensor in bfloat16.
BLOCK_T, BLOCK_D, NUM_WARPS = 8, 256, 4


@triton.jit(do_not_specialize=["samples"])
def token_scores_kernel(
    z,  # [T, D]
    grad_z,  # [T, D]
    segments,  # int32 [B, 2]
    partials,  # float32 [S, 3, B, D]
    z_stride,
    grad_z_stride,
    samples,
    cols,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b = tl.program_id(0)
    split = tl.program_id(2)
    col = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = col < cols
    first, last = split_rows(tl.load(segments + 2 * b), tl.load(segments + 2 * b + 1), split, SPLITS)
    highest = tl.full([BLOCK_T, BLOCK_D], float("-inf"), tl.float32)
    lowest = tl.full([BLOCK_T, BLOCK_D], float("inf"), tl.float32)
    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for base in range(first, last, BLOCK_T):
        row = (base + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
        present = (row < last) & inside[None, :]
        z_tile = tl.load(z + row * z_stride + col[None, :], mask=present, other=0.0).to(tl.float32)
        grad_tile = tl.load(grad_z + row * grad_z_stride + col[None, :], mask=present, other=0.0).to(tl.float32)
        product = z_tile * grad_tile
        highest = running_max(highest, tl.where(present, product, float("-inf")))
        lowest = running_min(lowest, tl.where(present, product, float("inf")))
        total += product
    plane = samples.to(tl.int64) * cols
    partial = partials + split * 3 * plane + b.to(tl.int64) * cols + col
    tl.store(partial, tl.reduce(highest, 0, running_max), mask=inside)
    tl.store(partial + plane, tl.reduce(lowest, 0, running_min), mask=inside)
    tl.store(partial + 2 * plane, tl.sum(total, 0), mask=inside)


def token_scores(z: Tensor, grad_z: Tensor, segments: Tensor) -> Tensor:
    z, grad_z = dense_rows(z), dense_rows(grad_z)
    rows, cols = z.shape
    samples, splits = len(segments), split_count(rows, len(segments))
    partials = torch.empty((splits, 3, samples, cols), dtype=torch.float32, device=z.device)
    if partials.numel():
        token_scores_kernel[samples, triton.cdiv(cols, BLOCK_D), splits](
            z, grad_z, segments, partials, z.stride(0), grad_z.stride(0), samples, cols,
            SPLITS=splits, BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_D, num_warps=NUM_WARPS,
        )  # fmt: skip
    return finish_scores(partials, segments)
