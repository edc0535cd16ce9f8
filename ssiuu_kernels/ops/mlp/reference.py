"""The definition of an MLP's activation and its backward: float32 inside, float64 for float64 inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.activations import ACTIVATIONS
from ..common.precision import compute_dtype
from ..common.results import absent
from ..token_scores.reference import segment_scores
from .arguments import BackwardArguments
from .neuron_penalty import NeuronPenalty
from .outputs import empty_grads, grad_views


def mlp_forward(x: Tensor, up: Tensor | None, activation: str) -> Tensor:  # [T, F], [T, F] -> [T, F]
    dtype = compute_dtype(x.dtype)
    h = ACTIVATIONS[activation].value(x.to(dtype))
    return (h if up is None else h * up.to(dtype)).to(x.dtype).contiguous()


def mlp_backward(a: BackwardArguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, segments = a.x, a.segments
    dtype = compute_dtype(x.dtype)
    value, gradient = ACTIVATIONS[a.activation]
    z, dh = x.to(dtype), a.grad_h.to(dtype)
    factor = None if a.up is None else a.up.to(dtype)

    def gated(signal: Tensor) -> Tensor:
        return signal if factor is None else signal * factor

    activated, grad_z = value(z), gradient(z, gated(dh))
    h = gated(activated)
    h_scores = segment_scores(h * dh, segments) if a.scores or a.penalty is not None else None
    x_scores = segment_scores(z * grad_z, segments) if a.scores else absent(x)
    if a.penalty is not None:
        dh = dh * penalty_factor(h_scores[2], segments, len(x), a.penalty)
        grad_z = gradient(z, gated(dh))
    grads = empty_grads(x, a.up, a.packed)
    grad_x, grad_up = grad_views(grads, a.packed)
    grad_x.copy_(grad_z)
    if grad_up is not None:
        grad_up.copy_(dh * activated)
    h = h.to(x.dtype).contiguous() if a.recompute_h else absent(x)
    return *grads, h, h_scores if a.scores else absent(x), x_scores


def penalty_factor(h_sum: Tensor, segments: Tensor, rows: int, penalty: NeuronPenalty) -> Tensor:
    """The factor of the backward signal of every row and neuron, `[T, F]`; stores `A_t` in the bank.

    `1 + 2 lambda ratio_b (A_t - A_{t-1})` where `A_t = ratio_b * h_sum < 0` and `A_{t-1}` is known, else 1: the
    gradient of `lambda * sum (A_t - A_{t-1})^2` with `dP/dh = ratio_b * grad_h` held constant. With lambda 0 it is 1
    whatever `A_{t-1}` is.

    Args:
        h_sum: `[B, F]`, sum over each sample's rows of `h * grad_h`.
    """
    factor = h_sum.new_ones((rows, h_sum.shape[1]))
    for b, ((start, end), bank_row) in enumerate(zip(segments.tolist(), penalty.rows.tolist(), strict=True)):
        if bank_row < 0:
            continue
        attribution, before = penalty.ratio[b] * h_sum[b], penalty.bank[bank_row]
        penalised = (attribution < 0) & ~before.isnan() & (penalty.weight > 0)
        growth = torch.where(penalised, attribution - before, 0)
        factor[start:end] = 1 + 2 * penalty.weight * penalty.ratio[b] * growth
        penalty.bank[bank_row] = attribution
    return factor
