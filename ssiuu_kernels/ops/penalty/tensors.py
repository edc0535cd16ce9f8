"""The tensors of one launch of `penalty_` or `penalty_adamw_`, which every backend takes as one record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class PenaltyTensors(NamedTuple):
    """Lists with one entry per parameter; checked.

    Attributes:
        params: phi.
        grads: `dL`.
        target_grads: `gP`.
        prev_attributions: `A_{t-1}`, NaN where it was never measured.
        exp_avgs, exp_avg_sqs: AdamW's moments; None for the penalty alone.
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    target_grads: Sequence[Tensor]
    prev_attributions: Sequence[Tensor]
    exp_avgs: Sequence[Tensor] | None = None
    exp_avg_sqs: Sequence[Tensor] | None = None
