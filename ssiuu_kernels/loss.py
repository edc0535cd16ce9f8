"""The unlearning loss, whose backward fills `param.grad` with `dL` and `param.target_grad` with `sum_b dP_b`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .log_probs import answer_lengths, check_target, sequence_log_probs, target_factor
from .objectives import Objective, resolve_objective


def unlearning_loss(
    logits: Tensor,
    labels: Tensor,
    forget: Tensor,
    params: Sequence[nn.Parameter],
    objective: str | Objective,
    target: str | None,
) -> Tensor:
    """See `PatchHandle.unlearning_loss`; `params` are those that get a `target_grad`."""
    compute = resolve_objective(objective)
    if forget.dtype != torch.bool or forget.shape != labels.shape[:1]:
        raise ValueError(f"forget is {forget.dtype} {list(forget.shape)}; expected a bool mask [{labels.shape[0]}]")
    if not bool(forget.any()):
        raise ValueError("forget marks no sample; expected at least one forget sample in the batch")
    log_probs = sequence_log_probs(logits, labels)
    lengths = answer_lengths(labels)
    if target is not None:
        check_target(target)
        if not log_probs.requires_grad:
            raise ValueError("logits carry no gradient; call the model with gradients on and trainable parameters")
        weights = target_factor(log_probs, lengths, target) * forget
        log_probs = _TargetGradient.apply(log_probs, _Graph(log_probs, weights, params))
    return compute(log_probs, lengths, forget)


class _Graph:
    """The log-likelihoods with their graph, hidden from autograd so that `_TargetGradient` can walk it itself."""

    def __init__(self, log_probs: Tensor, weights: Tensor, params: Sequence[nn.Parameter]):
        self.log_probs, self.weights, self.params = log_probs, weights, params


class _TargetGradient(torch.autograd.Function):
    """The identity; its backward first runs a second backward of `sum_b weights_b s_b` into `param.target_grad`.

    The nested backward's weights do not depend on the gradient that arrives, so scaling the loss scales `dL` alone.
    """

    @staticmethod
    def forward(ctx, log_probs: Tensor, graph: _Graph) -> Tensor:
        ctx.graph = graph
        return log_probs.view_as(log_probs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_log_probs: Tensor):
        graph = ctx.graph
        grads = torch.autograd.grad(graph.log_probs, graph.params, graph.weights, retain_graph=True, allow_unused=True)
        for param, grad in zip(graph.params, grads, strict=True):
            if grad is None:
                continue
            total = getattr(param, "target_grad", None)
            param.target_grad = grad if total is None else total.add_(grad)
        return grad_log_probs, None
