"""`token_scores` on the compiled CPU kernels (csrc/cpu)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import native_module
from ..checks import dense_rows
from ..native_support import DTYPE_CODES


def token_scores(z: Tensor, grad_z: Tensor, segments: Tensor) -> Tensor:
    z, grad_z = dense_rows(z), dense_rows(grad_z)
    scores = torch.empty((3, len(segments), z.shape[1]), dtype=torch.float32)
    native_module().token_scores_cpu(
        DTYPE_CODES[z.dtype], z.shape[0], z.shape[1],
        z.data_ptr(), z.stride(0), grad_z.data_ptr(), grad_z.stride(0),
        segments.data_ptr(), len(segments), scores.data_ptr(),
    )  # fmt: skip
    return scores
