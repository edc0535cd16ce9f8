"""What the native kernels of every op need to know of a tensor."""

from __future__ import annotations

import torch
from torch import Tensor

# The codes of csrc/include/ssiuu/types.h.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}


def why_not(*tensors: Tensor | None) -> str | None:
    """The reason for which the native kernels cannot take these tensors, or None."""
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            return f"no native kernel for device {tensor.device}"
        if tensor.dtype not in DTYPE_CODES and tensor.dtype != torch.int32:
            return f"dtype {tensor.dtype} is not supported (float32 and bfloat16 are)"
    return None


def dense_rows(tensor: Tensor) -> Tensor:
    """`tensor` `[T, D]` with neighbouring columns next to each other; only rows may be strided."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()
