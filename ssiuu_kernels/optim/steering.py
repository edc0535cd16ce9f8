"""How lambda is steered from step to step, so that the measured share stays at the one asked for."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops import PenaltyStats

# Bounds of the steered lambda, which grows as 1 / P^2. 2 lambda takes 24 of the 38 decades of float32 and leaves 14 to
# what it multiplies.
SMALLEST, LARGEST = 1e-24, 1e24
# Bounds of one step: a share read as 0 or 1 says only "far", and early ones are noisy.
_SHARE_FLOOR = 1e-6
_MAX_LOG_STEP = math.log(1000)


def steered_weight(weight: Tensor, measured_share: Tensor, wanted_share: float) -> Tensor:
    """The next lambda, from the share measured with this one; without a host read.

    The log-odds of the share grow about linearly with log lambda (slope 0.6 to 1 in the figures of the project's
    design notes), so moving log lambda by the difference in log-odds is close to a Newton step, and does not overshoot.

    Args:
        weight: lambda, > 0, with which the share was measured; 0-dim.
        measured_share, wanted_share: fractions of I- whose penalty gradient outweighs their loss gradient.
    """
    wanted = math.log(wanted_share / (1 - wanted_share))
    move = wanted - torch.logit(measured_share, eps=_SHARE_FLOOR)
    return (weight * move.clamp(-_MAX_LOG_STEP, _MAX_LOG_STEP).exp()).clamp(SMALLEST, LARGEST)


def next_weight(weight: Tensor, stats: PenaltyStats, wanted_share: float) -> Tensor:
    """The steered lambda, or the same one where the step says nothing about it; does not synchronize with the host.

    It says nothing where the lambda at which both gradients have the same norm is not finite or outside the bounds: I-
    is empty, A did not change, the loss gradient is 0, something overflowed, or P is so small that no lambda within the
    bounds makes up for it (below about 1e-10; at P = 0 the penalty is 0). The share then reads 0 or 1 whatever lambda
    is. lambda keeps its last value over all such steps. When P comes back, the first step penalises with that value,
    and steering goes on from the share of that step.

    Args:
        weight: as in `steered_weight`.
        stats: of the step that was taken with it.
    """
    balanced = weight * stats.loss_grad_norm / stats.penalty_grad_norm
    told = (stats.negative > 0) & (balanced >= SMALLEST) & (balanced <= LARGEST)
    return torch.where(told, steered_weight(weight, stats.share, wanted_share), weight)
