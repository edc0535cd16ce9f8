"""`glu_forward` and `glu_backward` on the compiled CPU kernels (csrc/cpu)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import native_module
from ..activations import CODES
from ..checks import dense_rows
from ..native_support import DTYPE_CODES
from ..results import absent


def glu_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    gate, up = dense_rows(gate), dense_rows(up)
    rows, cols = gate.shape
    h = torch.empty((rows, cols), dtype=gate.dtype)
    native_module().glu_forward_cpu(
        DTYPE_CODES[gate.dtype], CODES[activation], rows, cols,
        gate.data_ptr(), gate.stride(0), up.data_ptr(), up.stride(0), h.data_ptr(), h.stride(0),
    )  # fmt: skip
    return h


def glu_backward(
    gate: Tensor,
    up: Tensor,
    grad_h: Tensor,
    segments: Tensor,
    activation: str,
    scores: bool,
    recompute_h: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gate, up, grad_h = dense_rows(gate), dense_rows(up), dense_rows(grad_h)
    rows, cols = gate.shape
    grad_gate = torch.empty((rows, cols), dtype=gate.dtype)
    grad_up = torch.empty_like(grad_gate)
    h = torch.empty_like(grad_gate) if recompute_h else absent(gate)
    score_shape = (3, len(segments), cols) if scores else (0,)
    h_scores = torch.empty(score_shape, dtype=torch.float32)
    gate_scores = torch.empty_like(h_scores)
    native_module().glu_backward_cpu(
        DTYPE_CODES[gate.dtype], CODES[activation], rows, cols,
        gate.data_ptr(), gate.stride(0), up.data_ptr(), up.stride(0), grad_h.data_ptr(), grad_h.stride(0),
        grad_gate.data_ptr(), cols, grad_up.data_ptr(), cols, h.data_ptr() if recompute_h else 0, cols,
        segments.data_ptr(), len(segments),
        h_scores.data_ptr() if scores else 0, gate_scores.data_ptr() if scores else 0,
    )  # fmt: skip
    return grad_gate, grad_up, h, h_scores, gate_scores
