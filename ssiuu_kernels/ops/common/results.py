"""What the ops return."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class NeuronScores(NamedTuple):
    """Per-sample statistics of an attribution `z * dz` over a sample's tokens; each float32 `[B, D]`.

    A sample without tokens has zeros. (float64 inputs give float64 scores, from the reference backend only.)
    """

    max: Tensor
    min: Tensor
    sum: Tensor


class GluGrads(NamedTuple):
    """What `glu_backward` returns; None where not asked for.

    Attributes:
        grad_gate: like gate.
        grad_up: like up.
        h: like gate, `act(gate) * up` formed again for the down projection's weight gradient.
        h_scores: `NeuronScores` of `h * grad_h`, which is also the attribution of `up`.
        gate_scores: `NeuronScores` of `gate * grad_gate`.
    """

    grad_gate: Tensor
    grad_up: Tensor
    h: Tensor | None
    h_scores: NeuronScores | None
    gate_scores: NeuronScores | None


class PackedGluGrads(NamedTuple):
    """What `packed_glu_backward` returns; None where not asked for.

    Attributes:
        grad_gate_up: like gate_up, `[.., 2F]`.
        h, h_scores, gate_scores: as in `GluGrads`.
    """

    grad_gate_up: Tensor
    h: Tensor | None
    h_scores: NeuronScores | None
    gate_scores: NeuronScores | None


class ActGrads(NamedTuple):
    """What `act_backward` returns; None where not asked for.

    Attributes:
        grad_x: like x.
        h: like x, `act(x)` formed again for the down projection's weight gradient.
        h_scores: `NeuronScores` of `h * grad_h`.
        x_scores: `NeuronScores` of `x * grad_x`.
    """

    grad_x: Tensor
    h: Tensor | None
    h_scores: NeuronScores | None
    x_scores: NeuronScores | None


class PenaltyStats(NamedTuple):
    """Statistics of one penalty step; each a float64 scalar tensor, so that nothing waits for the device.

    Attributes:
        value: `R_t`, the sum over I- of `(prev_attribution - A_t)^2`, where `prev_attribution` is known.
        penalty_grad_norm: 2-norm of the penalty gradient, lambda included.
        loss_grad_norm: 2-norm of `dL`, over all scalars.
        share: of the scalars in I-, the fraction whose penalty gradient outweighs their loss gradient.
        negative: the number of scalars in I-.
    """

    value: Tensor
    penalty_grad_norm: Tensor
    loss_grad_norm: Tensor
    share: Tensor
    negative: Tensor

    @classmethod
    def from_sums(cls, sums: Tensor) -> PenaltyStats:
        """From the additive form that kernels write.

        Args:
            sums: float64 `[5]`: `R_t`, squared penalty and loss gradient norms, scalars of I- whose penalty gradient
                outweighs their loss gradient, scalars in I-. Sums of several parameters add up.
        """
        value, penalty_square, loss_square, outweighed, negative = sums.unbind()
        share = outweighed / negative.clamp(min=1)
        return cls(value, penalty_square.sqrt(), loss_square.sqrt(), share, negative)

    @classmethod
    def total(cls, parts: Sequence[PenaltyStats]) -> PenaltyStats:
        """The statistics of several parameters taken as one."""
        device = parts[0].value.device  # of a model on several devices, the parts are on several
        value, penalty_norm, loss_norm, share, negative = (
            torch.stack([part.to(device) for part in field]) for field in zip(*parts, strict=True)
        )
        outweighed = share * negative
        return cls.from_sums(
            torch.stack([part.sum() for part in (value, penalty_norm**2, loss_norm**2, outweighed, negative)])
        )


def neuron_scores(stacked: Tensor) -> NeuronScores | None:
    """`[3, B, D]` as `NeuronScores`; an empty 1-D tensor, a kernel's sign for "not asked for", as None."""
    return None if stacked.dim() == 1 else NeuronScores(*stacked.unbind())


def absent(like: Tensor) -> Tensor:
    """The empty 1-D tensor by which a registered op says that an optional output was not asked for."""
    return torch.empty(0, dtype=like.dtype, device=like.device)
