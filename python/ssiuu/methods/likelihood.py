"""Gradient ascent and gradient difference: the likelihood of the forget answers goes down."""

from __future__ import annotations

from ssiuu_kernels.loss.objectives import Objective, gradient_ascent, gradient_difference

from .base import Batch, LikelihoodMethod, over_the_step
from .registry import register_method


@register_method
class GradientAscent(LikelihoodMethod):
    """GA: minimise the mean log-probability per answer token of the forget set (Jang et al. 2023)."""

    name, label, color = "ga", "GA", "#cc79a7"
    summary = "gradient ascent on the forget set"
    source = "the paper (GA)"

    def objective(self, batch: Batch) -> Objective:
        return over_the_step(gradient_ascent, batch)


@register_method
class GradientDifference(LikelihoodMethod):
    """GD: GA, and descent on the mean negative log-likelihood per answer token of the retain set (Liu et al. 2022)."""

    name, label, color = "gd", "GD", "#d55e00"
    summary = "gradient difference: ascent on forget, descent on retain"
    source = "the paper (GD); the retain term has weight 1, which the paper leaves open"

    def objective(self, batch: Batch) -> Objective:
        return over_the_step(gradient_difference, batch)
