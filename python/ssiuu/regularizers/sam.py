"""SAM: the gradient at the weights nearby where the loss is highest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm

from ssiuu_kernels.ops.common.precision import compute_dtype

from ..methods.base import Method
from ..options import UnlearnOptions
from .base import Regularizer, refuse_bfloat16, trained
from .registry import register_regularizer


@register_regularizer
class Sam(Regularizer):
    """The gradient of a micro-batch's loss is that at `W + sam_radius g / |g|`, where g is its gradient at W.

    Foret et al. 2021, arXiv 2010.01412; for unlearning Fan et al. 2025, arXiv 2502.05374, who ascend the forget loss:
    here the ascent is on the whole loss of the method. The norm is over all trained parameters. Every micro-batch
    ascends by itself. Both passes draw the same dropout. Where g is 0 or not finite there is no ascent. The loss that
    is logged is that at W, the gradient norm that of what the optimizer gets.

    Memory: a copy of the trained parameters during the second pass, and with accumulation one more gradient.
    """

    name, label, color = "sam", "SAM", "#88ccee"
    summary = "take the gradient at the ascended weights (sharpness-aware minimization)"
    source = (
        "Foret et al. 2021, and Fan et al. 2025 for unlearning; ours: the ascent is on the whole loss, not on the "
        "forget loss, of each micro-batch by itself"
    )

    @dataclass(frozen=True)
    class Options:
        """
        Attributes:
            sam_radius: Euclidean distance of the ascent, over all trained parameters. Foret et al.: 0.05.
        """

        sam_radius: float = 0.05

    def check(self, method: Method, run: UnlearnOptions) -> None:
        if not 0 < self.options.sam_radius < math.inf:
            raise ValueError(f"sam_radius={self.options.sam_radius}; expected a finite number above 0")
        refuse_bfloat16(self.name, run, "ascents")

    def forward_backward(self, run: Callable[[], Tensor]) -> Tensor:
        params = trained(self.model)
        earlier = _take_gradients(params)  # of the step's micro-batches before this one
        with torch.random.fork_rng({param.device for param in params if param.is_cuda}):
            loss = run()
        with self._ascended(params) as moved:
            if moved:
                _take_gradients(params)
                run()
        for param, grad in zip(params, earlier, strict=True):
            if grad is not None:
                param.grad = grad if param.grad is None else grad.add_(param.grad)
        return loss

    @contextmanager
    def _ascended(self, params: Sequence[nn.Parameter]) -> Iterator[bool]:
        """Inside, the weights at the end of the ascent; yields whether there was one."""
        reached = [param for param in params if param.grad is not None]
        norms = [vector_norm(param.grad, dtype=compute_dtype(param.grad.dtype)) for param in reached]
        norm = torch.stack(norms).norm().item() if norms else 0.0
        if not 0 < norm < math.inf:
            yield False
            return
        original = [param.detach().clone() for param in reached]
        try:
            with torch.no_grad():
                for param in reached:
                    param.add_(param.grad / norm, alpha=self.options.sam_radius)
            yield True
        finally:
            with torch.no_grad():
                for param, value in zip(reached, original, strict=True):
                    param.copy_(value)


def _take_gradients(params: Sequence[nn.Parameter]) -> list[Tensor | None]:
    taken = [param.grad for param in params]
    for param in params:
        param.grad = None
    return taken
