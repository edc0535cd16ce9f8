"""Both gradients from two backwards of autograd's own: for what one backward cannot serve."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .compiled import refuse_donated_buffers
from .one_backward.graph import nodes_under
from .one_backward.targets import Targets
from .target_grad import gradient_dtype


class TwoBackward:
    """The log-likelihoods with their graph, kept from autograd so that the backward can walk it by itself.

    Args:
        log_probs: `[N]`, with the model's graph.
        factor: `d target_b / d s_b`, 0 for samples that are not penalised; `[N]`.
        samples: forget samples.
        targets: the parameters that get a target gradient.
    """

    def __init__(self, log_probs: Tensor, factor: Tensor, samples: int, targets: Targets):
        self._log_probs, self._factor, self._samples, self._targets = log_probs, factor, samples, targets
        nodes = nodes_under(log_probs)
        refuse_donated_buffers(nodes)
        self._in_float16 = any(output.dtype == torch.float16 for node in nodes for output in node._input_metadata)
        self.scale: Tensor | None = None  # by which the loss was multiplied; known once its backward begins

    def attach(self) -> Tensor:
        """The log-likelihoods, for the objective; their backward first fills `target_grad`."""
        return _FillTargets.apply(self._log_probs, self)

    def fill(self) -> None:
        """Run the backward of `sum_b factor_b s_b`, whose weights do not depend on the loss's own gradient."""
        self._targets.begin(self._samples, self.scale)
        if self._samples:
            self._targets.add_all(self._grads_of)

    def _grads_of(self, params: list[Tensor]) -> list[Tensor | None]:
        # Divided by a power of two, P(answer) fits into the float16 of activations; it comes back at the end.
        scale = torch.ones_like(self._factor[0])
        if self._in_float16:
            scale = torch.ldexp(scale, torch.frexp(self._factor.abs().max()).exponent)
        grads = torch.autograd.grad(self._log_probs, params, self._factor / scale, retain_graph=True, allow_unused=True)
        if not self._in_float16:
            return list(grads)
        wide = (grad if grad is None else grad.to(torch.promote_types(grad.dtype, torch.float32)) for grad in grads)
        return [
            grad if grad is None else (grad * scale.to(grad)).to(gradient_dtype(param))
            for param, grad in zip(params, wide, strict=True)
        ]


class _FillTargets(torch.autograd.Function):
    """The identity; its backward first runs `TwoBackward.fill`."""

    @staticmethod
    def forward(ctx, log_probs: Tensor, engine: TwoBackward) -> Tensor:
        ctx.engine = engine
        return log_probs.view_as(log_probs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_log_probs: Tensor):
        ctx.engine.fill()
        return grad_log_probs, None
