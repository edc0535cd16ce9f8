"""Uniform: every scalar's step is damped alike, the control for a penalty that damps some."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..methods.base import Method
from ..optimizers import OptimizerOptions, adamw
from ..options import UnlearnOptions
from .base import Regularizer
from .registry import register_regularizer


@register_regularizer
class Uniform(Regularizer):
    """Every step is `1 - uniform_share` of what it would be: the control for SSIUU with penalty_share = uniform_share.

    A constant factor on gradients would change nothing, since AdamW divides by their size: it has to be on the step.
    AdamW's step is proportional to the learning rate, weight decay included, and the rate is constant here, so this is
    exactly a learning rate of `(1 - uniform_share) learning_rate`, and is implemented as such.
    """

    name, label, color = "uniform", "uniform", "#ddcc77"
    summary = "damp every scalar's step alike"
    source = "ours: the control for SSIUU's choice of parameters"

    @dataclass(frozen=True)
    class Options:
        """
        Attributes:
            uniform_share: every step is this fraction smaller. Ours: 0.25; as a control for SSIUU, its penalty_share.
        """

        uniform_share: float = 0.25

    def check(self, method: Method, run: UnlearnOptions) -> None:
        if not 0 <= self.options.uniform_share < 1:
            raise ValueError(f"uniform_share={self.options.uniform_share}; expected a fraction, at least 0 and below 1")

    def optimizer(self, params: Iterable[nn.Parameter], options: OptimizerOptions) -> torch.optim.Optimizer:
        return adamw(params, replace(options, learning_rate=(1 - self.options.uniform_share) * options.learning_rate))
