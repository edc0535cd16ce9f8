"""The definition of `penalty_` and `penalty_adamw_`: Algorithm 1's penalty, and AdamW fed with it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..precision import compute_dtype


def penalty_gradient(
    param: Tensor, grad: Tensor, target_grad: Tensor, prev_attribution: Tensor, weight: float, step: int
) -> tuple[Tensor, Tensor]:
    """`2 lambda (A_t - A_{t-1}) gP` where `A_t < 0`, else 0 (Eq. 6-14), with its sums; stores `A_t`.

    Args:
        param, grad, target_grad: phi, dL and gP, any one shape, in the computing type.
        prev_attribution: `A_{t-1}`, overwritten with `A_t`.
        weight: lambda.
        step: 1 for the first, which has no `A_{t-1}` and so no penalty.

    Returns:
        The penalty gradient, and the float64 `[5]` of `PenaltyStats.from_sums`.
    """
    attribution = param * target_grad
    negative = attribution < 0
    if step == 1:
        change = torch.zeros_like(attribution)
    else:
        change = (attribution - prev_attribution.to(attribution.dtype)).masked_fill_(~negative, 0)
    prev_attribution.copy_(attribution)
    value = _sum_of_squares(change)
    penalty_grad = change.mul_(2 * weight).mul_(target_grad)
    outweighed = penalty_grad.abs() > grad.abs()  # nowhere outside I-, where the penalty gradient is 0
    counts = (outweighed.count_nonzero().double(), negative.count_nonzero().double())
    return penalty_grad, torch.stack([value, _sum_of_squares(penalty_grad), _sum_of_squares(grad), *counts])


def _sum_of_squares(x: Tensor) -> Tensor:
    # In double, for attributions of 1e-20 and less are common; in pieces, so that no double copy of the whole is made.
    total = x.new_zeros((), dtype=torch.float64)
    for piece in x.flatten().split(1 << 18):
        piece = piece.double()
        total += torch.dot(piece, piece)
    return total


def penalty_(
    grad: Tensor, param: Tensor, target_grad: Tensor, prev_attribution: Tensor, weight: float, step: int
) -> Tensor:
    dtype = compute_dtype(param.dtype)
    loss_grad = grad.to(dtype)
    penalty_grad, sums = penalty_gradient(
        param.to(dtype), loss_grad, target_grad.to(dtype), prev_attribution, weight, step
    )
    grad.copy_(penalty_grad.add_(loss_grad))
    return sums


def penalty_adamw_(
    param: Tensor,
    grad: Tensor,
    target_grad: Tensor,
    prev_attribution: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    weight: float,
) -> Tensor:
    dtype = compute_dtype(param.dtype)
    loss_grad, old = grad.to(dtype), param.to(dtype)
    penalty_grad, sums = penalty_gradient(old, loss_grad, target_grad.to(dtype), prev_attribution, weight, step)
    total = penalty_grad.add_(loss_grad)
    # AdamW as torch.optim.AdamW: decay first, then the bias-corrected step. `to` is a no-op in float32.
    mean = exp_avg.to(dtype).lerp_(total, 1 - beta1)
    square = exp_avg_sq.to(dtype).mul_(beta2).addcmul_(total, total, value=1 - beta2)
    denominator = square.sqrt().div_(math.sqrt(1 - beta2**step)).add_(eps)
    new = old.mul_(1 - lr * weight_decay).addcdiv_(mean, denominator, value=-lr / (1 - beta1**step))
    for stored, computed in ((param, new), (exp_avg, mean), (exp_avg_sq, square)):
        if stored is not computed:
            stored.copy_(computed)
    return sums
