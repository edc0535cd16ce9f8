"""`penalty_` and `penalty_adamw_` in Triton: a program takes one chunk of one parameter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .scalars import FIELDS, StepScalars

# 8 scalars a thread: 16 bytes of a tensor at once in bfloat16. A program does CHUNK scalars, for fewer partial sums.
BLOCK, CHUNK, NUM_WARPS = 1024, 4096, 4


@triton.jit
def mix_bits(x):
    x ^= x >> 16
    x *= tl.full([], 0x7FEB352D, tl.uint32)
    x ^= x >> 15
    x *= tl.full([], 0x846CA68B, tl.uint32)
    x ^= x >> 16
    return x


@triton.jit
def random_bits(key, index, STREAM: tl.constexpr):
    """32 random bits of each element; csrc/include/ssiuu/rounding.h."""
    low = (index & 0xFFFFFFFF).to(tl.uint32)
    high = (index >> 32).to(tl.uint32)
    return mix_bits(mix_bits(key ^ low) ^ (high * 2 + STREAM))


@triton.jit
def store_rounded(pointer, x, bits, mask, STOCHASTIC: tl.constexpr):
    if STOCHASTIC and pointer.dtype.element_ty == tl.bfloat16:
        exact = x.to(tl.uint32, bitcast=True)
        finite = (exact & 0x7F800000) != 0x7F800000
        rounded = tl.where(finite, exact + (bits & 0xFFFF), exact) >> 16
        rounded = tl.where(x != x, rounded | 0x40, rounded)
        tl.store(pointer, rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(pointer, x.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def penalty_terms(w, loss_grad, target_grad, before, twice_weight, threshold):
    """A, its growth where it is penalised, and the penalty gradient (Algorithm 1)."""
    attribution = w * target_grad
    penalised = attribution < threshold
    growth = tl.where(penalised, attribution - before, 0.0)
    return attribution, growth, tl.where(penalised, twice_weight * growth * target_grad, 0.0)


@triton.jit
def sum_of_squares(x):
    # In double: attributions of 1e-20 and less are common, and their float squares would be 0.
    wide = x.to(tl.float64)
    return tl.sum(wide * wide, 0)


@triton.jit
def penalty_kernel(
    param,  # [N]
    grad,  # [N]
    target_grad,  # [N]
    prev_attribution,  # [N]
    exp_avg,  # [N], not used unless ADAMW
    exp_avg_sq,  # [N], not used unless ADAMW
    sums,  # float64 [programs, 5]
    device_scalars,  # float64 [10], read if DEVICE_SCALARS
    n,
    seed,
    decay,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    step_size,
    inv_sqrt_bias_correct2,
    eps,
    twice_weight,
    threshold,
    step,
    ADAMW: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    DEVICE_SCALARS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if DEVICE_SCALARS:
        decay = tl.load(device_scalars).to(tl.float32)
        one_minus_beta1 = tl.load(device_scalars + 1).to(tl.float32)
        beta2 = tl.load(device_scalars + 2).to(tl.float32)
        one_minus_beta2 = tl.load(device_scalars + 3).to(tl.float32)
        step_size = tl.load(device_scalars + 4).to(tl.float32)
        inv_sqrt_bias_correct2 = tl.load(device_scalars + 5).to(tl.float32)
        eps = tl.load(device_scalars + 6).to(tl.float32)
        twice_weight = tl.load(device_scalars + 7).to(tl.float32)
        threshold = tl.load(device_scalars + 8).to(tl.float32)
        step = tl.load(device_scalars + 9).to(tl.float32)
    key = mix_bits(mix_bits(tl.full([], seed, tl.uint32)) ^ (tl.zeros([], tl.float32) + step).to(tl.uint32))
    program = tl.program_id(0)
    value = tl.zeros([], tl.float64)
    penalty_square = tl.zeros([], tl.float64)
    loss_square = tl.zeros([], tl.float64)
    outweighed = tl.zeros([], tl.int32)
    negative = tl.zeros([], tl.int32)
    for start in range(0, CHUNK, BLOCK):
        index = program.to(tl.int64) * CHUNK + start + tl.arange(0, BLOCK)
        inside = index < n
        w = tl.load(param + index, mask=inside, other=0.0).to(tl.float32)
        loss_grad = tl.load(grad + index, mask=inside, other=0.0).to(tl.float32)
        target = tl.load(target_grad + index, mask=inside, other=0.0).to(tl.float32)
        before = tl.load(prev_attribution + index, mask=inside, other=0.0).to(tl.float32)
        attribution, growth, penalty_grad = penalty_terms(w, loss_grad, target, before, twice_weight, threshold)
        # Behind the tensor's end A is 0, which is never penalised.
        value += sum_of_squares(growth)
        penalty_square += sum_of_squares(penalty_grad)
        loss_square += sum_of_squares(loss_grad)
        outweighed += tl.sum((tl.abs(penalty_grad) > tl.abs(loss_grad)).to(tl.int32), 0)
        negative += tl.sum((attribution < 0).to(tl.int32), 0)
        total = loss_grad + penalty_grad
        if ADAMW:
            m = tl.load(exp_avg + index, mask=inside, other=0.0).to(tl.float32)
            v = tl.load(exp_avg_sq + index, mask=inside, other=0.0).to(tl.float32)
            m += one_minus_beta1 * (total - m)
            v = beta2 * v + one_minus_beta2 * total * total
            denominator = tl.sqrt(v) * inv_sqrt_bias_correct2 + eps
            w = w * decay - step_size * (m / denominator)
            first = index.to(tl.uint32)
            second = first
            if STOCHASTIC:
                first = random_bits(key, index, 0)
                second = random_bits(key, index, 1)
            store_rounded(param + index, w, first, inside, STOCHASTIC)
            store_rounded(prev_attribution + index, attribution, first >> 16, inside, STOCHASTIC)
            store_rounded(exp_avg + index, m, second, inside, STOCHASTIC)
            store_rounded(exp_avg_sq + index, v, second >> 16, inside, STOCHASTIC)
        else:
            tl.store(grad + index, total.to(grad.dtype.element_ty), mask=inside)
            tl.store(prev_attribution + index, attribution.to(prev_attribution.dtype.element_ty), mask=inside)
    row = sums + program * 5
    tl.store(row, value)
    tl.store(row + 1, penalty_square)
    tl.store(row + 2, loss_square)
    tl.store(row + 3, outweighed.to(tl.float64))
    tl.store(row + 4, negative.to(tl.float64))


def penalty_(
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    target_grads: Sequence[Tensor],
    prev_attributions: Sequence[Tensor],
    scalars: StepScalars,
) -> Tensor:
    return _run(params, grads, target_grads, prev_attributions, None, None, scalars, None)


def penalty_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    target_grads: Sequence[Tensor],
    prev_attributions: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    scalars: StepScalars,
    seeds: Sequence[int] | None,
) -> Tensor:
    return _run(params, grads, target_grads, prev_attributions, exp_avgs, exp_avg_sqs, scalars, seeds)


def _run(params, grads, target_grads, prev_attributions, exp_avgs, exp_avg_sqs, scalars, seeds) -> Tensor:
    """One launch a parameter, and one reduction of all their partial sums."""
    programs = [triton.cdiv(param.numel(), CHUNK) for param in params]
    sums = torch.zeros((sum(programs), 5), dtype=torch.float64, device=params[0].device)
    device_scalars = sums if scalars.device is None else scalars.device
    done = 0
    for i, (param, count) in enumerate(zip(params, programs, strict=True)):
        if count == 0:
            continue
        states = (param, param) if exp_avgs is None else (exp_avgs[i], exp_avg_sqs[i])
        penalty_kernel[(count,)](
            param, grads[i], target_grads[i], prev_attributions[i], *states, sums[done:], device_scalars,
            param.numel(), 0 if seeds is None else seeds[i], **dict(zip(FIELDS, scalars.host, strict=True)),
            ADAMW=exp_avgs is not None, STOCHASTIC=seeds is not None, DEVICE_SCALARS=scalars.device is not None,
            CHUNK=CHUNK, BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
        done += count
    return sums.sum(0)
