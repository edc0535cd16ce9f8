"""The type in which the references compute, and the largest number that every kernel can compute with."""

from __future__ import annotations

import torch
from torch import Tensor

# The largest lambda or learning rate. What is derived from it stays finite in float32, which ends at 3e38, with room
# for the attribution and the gradient that 2 lambda multiplies.
LARGEST = 1e30


def usable(*values: Tensor) -> Tensor:
    """Whether 0-dim tensors are all from 0 to `LARGEST`, on their device; 0-dim bool."""
    stacked = torch.stack(values)
    return (stacked.clamp(0, LARGEST) == stacked).all()  # clamp keeps NaN, which equals nothing


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 inputs, float32 for every narrower type."""
    return torch.float64 if dtype == torch.float64 else torch.float32
