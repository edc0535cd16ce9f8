"""SSIUU's parameter-level penalty (Eq. 6-14, Algorithm 1) before any optimizer's step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..ops import PenaltyStats
from ..ops.penalty import run_penalty
from .penalised import PenalisedOptimizer


class SsiuuPenalty(PenalisedOptimizer):
    """The penalty alone, applied before any optimizer's step: `penalty.apply_(); optimizer.step()`.

    Args:
        params, penalty_weight, penalty_share, backend, anchor: as in `SsiuuAdamW`.

    Attributes:
        last_stats: `PenaltyStats` of the last call, all parameters together.
    """

    state_names = ("prev_attribution",)
    op = "penalty_"

    def __init__(
        self,
        params: Iterable,
        penalty_weight: float = 1e-3,
        penalty_share: float | None = None,
        backend: str = "auto",
        anchor: str = "previous",
    ):
        super().__init__(params, {}, penalty_weight, penalty_share, anchor, backend, capturable=False)

    @torch.no_grad()
    def apply_(self) -> PenaltyStats | None:
        """Add the penalty's gradient to every `param.grad`, and set `param.target_grad` to None.

        Where no batch since the last step had a forget sample, nothing is added, and `A_{t-1}` stays.

        Returns:
            `PenaltyStats` of all parameters together; None where no parameter has a gradient.

        Raises:
            ValueError: a parameter with a `grad` but no `target_grad`; nothing is changed then.
        """
        self.update_all()
        return self.last_stats

    def _tensors(self, params: list[nn.Parameter]) -> dict[str, list[Tensor]]:
        return {
            "grad": [param.grad for param in params],
            "param": params,
            "target_grad": [getattr(param, "target_grad", None) for param in params],
            "prev_attribution": self._states(params, "prev_attribution"),
        }

    def _run(self, params, tensors, scalars) -> PenaltyStats:
        return run_penalty(tensors, scalars, self.backend)
