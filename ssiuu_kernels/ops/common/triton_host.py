"""What the Triton kernels of every op need to know of tensors and shapes. Imports no triton: most runs need none."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from ..backends import triton_interprets

FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows after which a sample is split over several programs, and into how many at most: enough to fill a device with few
# long samples, and short enough for running float32 sums to be as accurate as PyTorch's, while the partial scores stay
# under 3 / ROWS_PER_SPLIT of the rows that they summarise.
ROWS_PER_SPLIT, MAX_SPLITS = 128, 32


def lazily(package: str, function: str) -> Callable:
    """`function` of `package`'s module `triton`, imported when it is first called."""

    def run(*args):
        return getattr(importlib.import_module(".triton", package), function)(*args)

    return run


def why_not(*tensors: Tensor | None) -> str | None:
    """The reason for which the Triton kernels cannot take these tensors, or None. Availability is checked elsewhere."""
    device = "cpu" if triton_interprets() else "cuda"
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != device:
            return f"no Triton kernel for device {tensor.device}"
        if tensor.dtype.is_floating_point and tensor.dtype not in FLOAT_TYPES:
            return f"dtype {tensor.dtype} is not supported (float32, bfloat16 and float16 are)"
    return None


def split_count(rows: int, samples: int) -> int:
    """Programs that share a sample's rows. From sizes alone: the segments' values are on the device."""
    return max(1, min(MAX_SPLITS, rows // (max(samples, 1) * ROWS_PER_SPLIT)))
