"""`token_scores` on the compiled kernels (csrc/cpu, csrc/cuda)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.checks import dense_rows
from ..common.native_host import DTYPE_CODES, call


def token_scores(z: Tensor, grad_z: Tensor, segments: Tensor) -> Tensor:
    z, grad_z = dense_rows(z), dense_rows(grad_z)
    rows, cols = z.shape
    scores = torch.empty((3, len(segments), cols), dtype=torch.float32, device=z.device)
    call(
        "token_scores", z, DTYPE_CODES[z.dtype], rows, cols,
        z.data_ptr(), z.stride(0), grad_z.data_ptr(), grad_z.stride(0),
        segments.data_ptr(), len(segments), scores.data_ptr(), workspace=(rows, cols, len(segments)),
    )  # fmt: skip
    return scores
