"""The definition of `glu_forward` and `glu_backward`: float32 inside, float64 for float64 inputs."""

from __future__ import annotations

from torch import Tensor

from ..activations import ACTIVATIONS
from ..precision import compute_dtype
from ..results import absent
from ..token_scores.reference import segment_scores


def glu_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:  # [T, F], [T, F] -> [T, F]
    dtype = compute_dtype(gate.dtype)
    return (ACTIVATIONS[activation].value(gate.to(dtype)) * up.to(dtype)).to(gate.dtype)


def glu_backward(
    gate: Tensor,  # [T, F]
    up: Tensor,  # [T, F]
    grad_h: Tensor,  # [T, F]
    segments: Tensor,  # int32 [B, 2]
    activation: str,
    scores: bool,
    recompute_h: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    value, derivative = ACTIVATIONS[activation]
    dtype = compute_dtype(gate.dtype)
    g, u, dh = gate.to(dtype), up.to(dtype), grad_h.to(dtype)
    activated = value(g)
    grad_gate = dh * u * derivative(g)
    grad_up = dh * activated
    h = activated * u if recompute_h or scores else None
    return (
        grad_gate.to(gate.dtype),
        grad_up.to(gate.dtype),
        h.to(gate.dtype) if recompute_h else absent(gate),
        segment_scores(h * dh, segments) if scores else absent(gate),
        segment_scores(g * grad_gate, segments) if scores else absent(gate),
    )
