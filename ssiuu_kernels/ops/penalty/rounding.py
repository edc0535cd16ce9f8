"""Stochastic rounding to bfloat16, in PyTorch; the formulas are those of csrc/include/ssiuu/rounding.h."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def _mix_bits(x: Tensor) -> Tensor:
    """32 bits in an int64 tensor, spread over all 32."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def random_bits(seed: int, step: float | Tensor, size: int, device: torch.device) -> tuple[Tensor, ...]:
    """Four independent draws of 16 bits for each of `size` elements, int64; from seed, step and place alone."""
    step = torch.as_tensor(step, device=device).to(torch.int64)
    key = _mix_bits(_mix_bits(torch.tensor(seed & _MASK, device=device)) ^ step)
    index = torch.arange(size, device=device)
    inner = _mix_bits(key ^ (index & _MASK))
    first, second = (_mix_bits(inner ^ (2 * (index >> 32) + stream)) for stream in range(2))
    return first & 0xFFFF, first >> 16, second & 0xFFFF, second >> 16


def round_at_random(x: Tensor, bits: Tensor) -> Tensor:
    """float32 `x` as bfloat16, up or down so that the mean is kept; `bits` int64 of `x`'s size decide."""
    exact = x.contiguous().view(torch.int32).to(torch.int64) & _MASK
    rounded = torch.where(x.isfinite(), exact + bits.view(x.shape), exact) >> 16
    rounded = torch.where(x.isnan(), rounded | 0x40, rounded)
    return rounded.to(torch.int32).to(torch.uint16).view(torch.bfloat16)
