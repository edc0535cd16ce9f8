"""The definition of `penalty_` and `penalty_adamw_`: Algorithm 1's penalty, and AdamW fed with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.precision import compute_dtype
from .rounding import random_bits, round_at_random
from .scalars import FIELDS, StepScalars
from .tensors import PenaltyTensors


def _as_dict(scalars: StepScalars, dtype: torch.dtype) -> dict[str, float | Tensor]:
    values = scalars.host if scalars.device is None else scalars.device.to(dtype).unbind()
    return dict(zip(FIELDS, values, strict=True))


def penalty_gradient(
    param: Tensor,
    grad: Tensor,
    target_grad: Tensor,
    prev_attribution: Tensor,
    s: dict[str, float | Tensor],
    keep_anchor: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`2 lambda (A_t - A_{t-1}) gP` where `A_t < 0` and `A_{t-1}` is known, else 0 (Eq. 6-14), with its sums.

    The masks keep 0 times infinity out: with lambda 0, and outside of what is penalised, the gradient is 0 whatever the
    attributions and gP are.

    Args:
        param, grad, target_grad: phi, dL and gP, any one shape, in the computing type.
        prev_attribution: `A_{t-1}`, NaN where it was never measured.
        s: the step's scalars; at the first step the threshold is -infinity, so that there is no penalty.

    Returns:
        The penalty gradient; what `prev_attribution` becomes; the float64 `[5]` of `PenaltyStats.from_sums`.
    """
    attribution, unknown = param * target_grad, prev_attribution.isnan()
    spared = ~(attribution < s["threshold"]) | unknown
    change = (attribution - prev_attribution.to(attribution.dtype)).masked_fill_(spared, 0)
    value = _sum_of_squares(change)
    penalty_grad = change.mul_(s["twice_weight"]).mul_(target_grad).masked_fill_(spared | (s["twice_weight"] == 0), 0)
    outweighed = penalty_grad.abs() > grad.abs()  # nowhere outside I-, where the penalty gradient is 0
    counts = (outweighed.count_nonzero().double(), (attribution < 0).count_nonzero().double())
    sums = torch.stack([value, _sum_of_squares(penalty_grad), _sum_of_squares(grad), *counts])
    if keep_anchor:  # but not at the first step
        attribution = torch.where(unknown | (s["threshold"] != 0), attribution, prev_attribution)
    return penalty_grad, attribution, sums


def _sum_of_squares(x: Tensor) -> Tensor:
    # In double, for attributions of 1e-20 and less are common; in pieces, so that no double copy of the whole is made.
    total = x.new_zeros((), dtype=torch.float64)
    for piece in x.flatten().split(1 << 18):
        piece = piece.double()
        total += torch.dot(piece, piece)
    return total


def penalty_(tensors: PenaltyTensors, scalars: StepScalars) -> Tensor:
    dtype = compute_dtype(tensors.params[0].dtype)
    s = _as_dict(scalars, dtype)
    total = torch.zeros(5, dtype=torch.float64, device=tensors.params[0].device)
    for param, grad, target_grad, prev_attribution in zip(*tensors[:4], strict=True):
        loss_grad = grad.to(dtype)
        penalty_grad, anchor, sums = penalty_gradient(
            param.to(dtype), loss_grad, target_grad.to(dtype), prev_attribution, s, scalars.keep_anchor
        )
        prev_attribution.copy_(anchor)
        grad.copy_(penalty_grad.add_(loss_grad))
        total += sums
    return total


def penalty_adamw_(tensors: PenaltyTensors, scalars: StepScalars, seeds: Sequence[int] | None) -> Tensor:
    dtype = compute_dtype(tensors.params[0].dtype)
    s = _as_dict(scalars, dtype)
    total = torch.zeros(5, dtype=torch.float64, device=tensors.params[0].device)
    for i, (param, grad, target_grad, prev_attribution, exp_avg, exp_avg_sq) in enumerate(zip(*tensors, strict=True)):
        loss_grad, old = grad.to(dtype), param.to(dtype)
        penalty_grad, anchor, sums = penalty_gradient(
            old, loss_grad, target_grad.to(dtype), prev_attribution, s, scalars.keep_anchor
        )
        update = penalty_grad.add_(loss_grad)
        # AdamW as torch.optim.AdamW: decay first, then the bias-corrected step. `to` is a no-op in float32.
        mean, square = exp_avg.to(dtype), exp_avg_sq.to(dtype)
        mean = mean.add_((update - mean).mul_(s["one_minus_beta1"]))
        square = square.mul_(s["beta2"]).add_(update.square_().mul_(s["one_minus_beta2"]))
        denominator = square.sqrt().mul_(s["inv_sqrt_bias_correct2"]).add_(s["eps"])
        new = old.mul_(s["decay"]).sub_((mean / denominator).mul_(s["step_size"]))
        results = (new, anchor, mean, square)
        bits = [None] * 4 if seeds is None else random_bits(seeds[i], s["step"], param.numel(), param.device)
        for target, result, draw in zip((param, prev_attribution, exp_avg, exp_avg_sq), results, bits, strict=True):
            _store(target, result, draw)
        total += sums
    return total


def _store(target: Tensor, result: Tensor, bits: Tensor | None) -> None:
    if bits is not None and target.dtype == torch.bfloat16:
        result = round_at_random(result, bits)
    if target is not result:
        target.copy_(result)
