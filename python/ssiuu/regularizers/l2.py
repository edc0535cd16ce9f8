"""L2: a pull to the original weights, the control for a penalty that looks at attribution."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.linalg import vector_norm

import ssiuu_kernels as sk
from ssiuu_kernels.ops.common.precision import LARGEST, compute_dtype

from ..methods.base import Method, UnlearnData
from ..optimizers import OptimizerOptions, adamw
from ..options import UnlearnOptions
from .base import Regularizer, trained
from .registry import register_regularizer


@register_regularizer
class L2(Regularizer):
    """`J = L + l2_weight ||W - W0||^2`, where W0 are the weights before unlearning.

    Its gradient, `2 l2_weight (W - W0)`, is added to `grad` right before the optimizer's step, so that it passes
    through AdamW's moments as the gradient of `L` does (decoupled weight decay does not). Li et al. 2018 (L2-SP,
    arXiv 1802.01483) have the same term with `alpha / 2` as its factor.

    Memory: W0 takes as much as the trained parameters, beside them on their device, as SSIUU's A_{t-1} does.
    """

    name, label, color = "l2", "L2", "#44aa99"
    summary = "pull to the original weights"
    source = "L2-SP (Li et al. 2018, alpha = 2 l2_weight); ours: as a control for unlearning, and the weight"

    @dataclass(frozen=True)
    class Options:
        """
        Attributes:
            l2_weight: factor of the squared distance from the original weights. Ours: 1e-2.
        """

        l2_weight: float = 1e-2

    def check(self, method: Method, run: UnlearnOptions) -> None:
        weight = self.options.l2_weight
        if not 0 <= weight < math.inf:
            raise ValueError(f"l2_weight={weight}; expected a finite number, at least 0")
        if weight > LARGEST:
            raise ValueError(f"l2_weight={weight}; expected at most {LARGEST:g}")

    def setup(self, model: nn.Module, handle: sk.PatchHandle, method: Method, data: UnlearnData) -> None:
        super().setup(model, handle, method, data)
        self.original = {param: param.detach().clone() for param in trained(model)}

    def optimizer(self, params: Iterable[nn.Parameter], options: OptimizerOptions) -> torch.optim.Optimizer:
        made = adamw(params, options)
        made.register_step_pre_hook(self._add_pull)
        return made

    @torch.no_grad()
    def _add_pull(self, *_) -> None:
        distances = []
        for param, original in self.original.items():
            moved = param - original
            distances.append(vector_norm(moved, dtype=compute_dtype(moved.dtype)))
            if param.grad is not None:  # without one, a parameter is not stepped
                param.grad.add_(moved, alpha=2 * self.options.l2_weight)
        self.distance = torch.stack(distances).norm()

    def metrics(self) -> dict[str, float]:
        weight, distance = self.options.l2_weight, self.distance.item()
        return {"penalty": weight * distance**2, "penalty_grad_norm": 2 * weight * distance}
