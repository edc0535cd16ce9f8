"""`penalty_` and `penalty_adamw_` in Triton: a program takes one chunk of one of a launch's parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .scalars import FIELDS, StepScalars
from .tensors import PenaltyTensors

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
    """A, its growth where it is penalised, and the penalty gradient; csrc/include/ssiuu/penalty.h."""
    attribution = w * target_grad
    penalised = (attribution < threshold) & (before == before)
    growth = tl.where(penalised, attribution - before, 0.0)
    grad = tl.where(penalised, twice_weight * growth * target_grad, 0.0)
    return attribution, growth, tl.where(twice_weight > 0, grad, 0.0)


@triton.jit
def sum_of_squares(x):
    # In double: attributions of 1e-20 and less are common, and their float squares would be 0.
    wide = x.to(tl.float64)
    return tl.sum(wide * wide, 0)


@triton.jit
def rounding_key(seed, step):
    step = (tl.zeros([], tl.float32) + step).to(tl.uint32)
    return mix_bits(mix_bits((tl.zeros([], tl.int64) + seed).to(tl.uint32)) ^ step)


@triton.jit
def penalty_chunk(
    param, grad, target_grad, prev_attribution, exp_avg, exp_avg_sq, n, chunk, sums, device_scalars, seed,
    decay, one_minus_beta1, beta2, one_minus_beta2, step_size, inv_sqrt_bias_correct2, eps, twice_weight,
    threshold, step,
    ADAMW: tl.constexpr, STOCHASTIC: tl.constexpr, DEVICE_SCALARS: tl.constexpr, KEEP_ANCHOR: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Scalars [chunk * CHUNK, (chunk + 1) * CHUNK) of one parameter; see `penalty_kernel`."""
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
    key = rounding_key(seed, step)
    value = tl.zeros([], tl.float64)
    penalty_square = tl.zeros([], tl.float64)
    loss_square = tl.zeros([], tl.float64)
    outweighed = tl.zeros([], tl.int32)
    negative = tl.zeros([], tl.int32)
    for start in range(0, CHUNK, BLOCK):
        index = chunk.to(tl.int64) * CHUNK + start + tl.arange(0, BLOCK)
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
        anchor = attribution
        if KEEP_ANCHOR:  # but not at the first step
            anchor = tl.where(threshold == 0, tl.where(before == before, before, attribution), attribution)
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
            store_rounded(prev_attribution + index, anchor, first >> 16, inside, STOCHASTIC)
            store_rounded(exp_avg + index, m, second, inside, STOCHASTIC)
            store_rounded(exp_avg_sq + index, v, second >> 16, inside, STOCHASTIC)
        else:
            tl.store(grad + index, total.to(grad.dtype.element_ty), mask=inside)
            tl.store(prev_attribution + index, anchor.to(prev_attribution.dtype.element_ty), mask=inside)
    row = sums + tl.program_id(0) * 5
    tl.store(row, value)
    tl.store(row + 1, penalty_square)
    tl.store(row + 2, loss_square)
    tl.store(row + 3, outweighed.to(tl.float64))
    tl.store(row + 4, negative.to(tl.float64))


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
    decay, one_minus_beta1, beta2, one_minus_beta2, step_size, inv_sqrt_bias_correct2, eps, twice_weight,
    threshold, step,
    ADAMW: tl.constexpr, STOCHASTIC: tl.constexpr, DEVICE_SCALARS: tl.constexpr, KEEP_ANCHOR: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    penalty_chunk(
        param, grad, target_grad, prev_attribution, exp_avg, exp_avg_sq, n, tl.program_id(0), sums, device_scalars,
        seed, decay, one_minus_beta1, beta2, one_minus_beta2, step_size, inv_sqrt_bias_correct2, eps, twice_weight,
        threshold, step, ADAMW, STOCHASTIC, DEVICE_SCALARS, KEEP_ANCHOR, CHUNK, BLOCK,
    )  # fmt: skip


@triton.jit
def penalty_many_kernel(
    table,  # int64 [9, parameters]: addresses of the six tensors, sizes, seeds, first programs
    parameters,
    sums,  # float64 [programs, 5]
    device_scalars,  # float64 [10], read if DEVICE_SCALARS
    decay, one_minus_beta1, beta2, one_minus_beta2, step_size, inv_sqrt_bias_correct2, eps, twice_weight,
    threshold, step,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, ALIGNED: tl.constexpr,
    ADAMW: tl.constexpr, STOCHASTIC: tl.constexpr, DEVICE_SCALARS: tl.constexpr, KEEP_ANCHOR: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    low = 0
    high = parameters
    while high - low > 1:
        middle = (low + high) // 2
        started = tl.load(table + 8 * parameters + middle) <= program
        low = tl.where(started, middle, low)
        high = tl.where(started, high, middle)
    entry = table + low
    penalty_chunk(
        address(entry, PARAM, ALIGNED), address(entry + parameters, GRAD, ALIGNED),
        address(entry + 2 * parameters, GRAD, ALIGNED), address(entry + 3 * parameters, STATE, ALIGNED),
        address(entry + 4 * parameters, STATE, ALIGNED), address(entry + 5 * parameters, STATE, ALIGNED),
        tl.load(entry + 6 * parameters), program - tl.load(entry + 8 * parameters), sums, device_scalars,
        tl.load(entry + 7 * parameters), decay, one_minus_beta1, beta2, one_minus_beta2, step_size,
        inv_sqrt_bias_correct2, eps, twice_weight, threshold, step,
        ADAMW, STOCHASTIC, DEVICE_SCALARS, KEEP_ANCHOR, CHUNK, BLOCK,
    )  # fmt: skip


@triton.jit
def address(entry, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(entry).to(tl.pointer_type(TYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


def penalty_(tensors: PenaltyTensors, scalars: StepScalars) -> Tensor:
    return _run(tensors, scalars, None)


def penalty_adamw_(tensors: PenaltyTensors, scalars: StepScalars, seeds: Sequence[int] | None) -> Tensor:
    return _run(tensors, scalars, seeds)


def _run(tensors: PenaltyTensors, scalars: StepScalars, seeds: Sequence[int] | None) -> Tensor:
    params = tensors.params
    programs = [triton.cdiv(param.numel(), CHUNK) for param in params]
    sums = torch.zeros((sum(programs), 5), dtype=torch.float64, device=params[0].device)
    adamw = tensors.exp_avgs is not None
    lists = [params if entries is None else entries for entries in tensors]  # the moments are not read without AdamW
    numbers = dict(zip(FIELDS, scalars.host, strict=True))
    common = {
        "ADAMW": adamw, "STOCHASTIC": seeds is not None, "DEVICE_SCALARS": scalars.device is not None,
        "KEEP_ANCHOR": scalars.keep_anchor,
        "CHUNK": CHUNK, "BLOCK": BLOCK, "num_warps": NUM_WARPS,
    }  # fmt: skip
    device_scalars = sums if scalars.device is None else scalars.device
    seeds = [0] * len(params) if seeds is None else seeds
    if not len(sums):
        return sums.sum(0)
    if len(params) == 1:
        only = (entries[0] for entries in lists)
        penalty_kernel[(len(sums),)](*only, sums, device_scalars, params[0].numel(), seeds[0], **numbers, **common)
    else:
        table, aligned = _address_table(lists, seeds, programs)
        kinds = {"PARAM": params, "GRAD": tensors.grads, "STATE": tensors.prev_attributions}
        types = {name: _TYPES[entries[0].dtype] for name, entries in kinds.items()}
        penalty_many_kernel[(len(sums),)](
            table, table.shape[1], sums, device_scalars, **numbers, **types, ALIGNED=aligned, **common
        )
    return sums.sum(0)


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_captured_tables: list[Tensor] = []  # a captured graph reads its table again at every replay


def _address_table(lists, seeds, programs) -> tuple[Tensor, bool]:
    """The table of `penalty_many_kernel`, and whether all addresses are divisible by 16."""
    filled = [i for i, count in enumerate(programs) if count]
    addresses = [[tensors[i].data_ptr() for i in filled] for tensors in lists]
    first = [sum(programs[:i]) for i in filled]
    sizes = [lists[0][i].numel() for i in filled]
    table = torch.tensor([*addresses, sizes, [seeds[i] for i in filled], first], dtype=torch.int64, device="cpu")
    device = lists[0][0].device
    if device.type == "cuda":  # from pinned memory the copy waits for nothing
        table = table.pin_memory()
        if torch.cuda.is_current_stream_capturing():
            _captured_tables.append(table)
        table = table.to(device, non_blocking=True)
    return table, all(a % 16 == 0 for row in addresses for a in row)
