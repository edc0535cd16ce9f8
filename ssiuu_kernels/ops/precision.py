"""The type in which the references compute."""

from __future__ import annotations

import torch


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 inputs, float32 for every narrower type."""
    return torch.float64 if dtype == torch.float64 else torch.float32
