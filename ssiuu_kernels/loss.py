"""The unlearning loss, whose backward fills `param.grad` with `dL` and `param.target_grad` with `sum_b dP_b`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .log_probs import answer_lengths, check_target, sequence_log_probs, target_factor
from .neuron_level import NeuronLevel
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
    log_probs, lengths = _checked_log_probs(logits, labels, forget)
    if target is not None:
        weights = _target_weights(log_probs, lengths, forget, target)
        log_probs = _TargetGradient.apply(log_probs, _Graph(log_probs, weights, params))
    return compute(log_probs, lengths, forget)


def neuron_level_loss(
    logits: Tensor,
    labels: Tensor,
    forget: Tensor,
    neurons: NeuronLevel,
    sample_ids: Tensor | None,
    objective: str | Objective,
    target: str | None,
) -> Tensor:
    """See `PatchHandle.unlearning_loss`, level "neuron"; `neurons` holds the banks."""
    compute = resolve_objective(objective)
    log_probs, lengths = _checked_log_probs(logits, labels, forget)
    if target is not None:
        _check_sample_ids(sample_ids, forget, neurons.samples)
        weights = _target_weights(log_probs, lengths, forget, target)
        log_probs = neurons.observe(log_probs, weights, sample_ids, labels.shape[1])
    return compute(log_probs, lengths, forget)


def _checked_log_probs(logits: Tensor, labels: Tensor, forget: Tensor) -> tuple[Tensor, Tensor]:
    """Log-likelihoods and answer lengths, `[B]` each."""
    if forget.dtype != torch.bool or forget.shape != labels.shape[:1]:
        raise ValueError(f"forget is {forget.dtype} {list(forget.shape)}; expected a bool mask [{labels.shape[0]}]")
    if not bool(forget.any()):
        raise ValueError("forget marks no sample; expected at least one forget sample in the batch")
    return sequence_log_probs(logits, labels), answer_lengths(labels)


def _target_weights(log_probs: Tensor, lengths: Tensor, forget: Tensor, target: str) -> Tensor:
    """`d target_b / d s_b` of the forget samples, 0 for the others; `[B]`."""
    check_target(target)
    if not log_probs.requires_grad:
        raise ValueError("logits carry no gradient; call the model with gradients on and trainable parameters")
    return target_factor(log_probs, lengths, target) * forget


def _check_sample_ids(sample_ids: Tensor | None, forget: Tensor, samples: int) -> None:
    if sample_ids is None:
        raise ValueError("sample_ids is missing; level 'neuron' needs each sample's place in the forget set, int64 [B]")
    if sample_ids.dtype != torch.int64 or sample_ids.shape != forget.shape or sample_ids.device != forget.device:
        raise ValueError(
            f"sample_ids is {sample_ids.dtype} {list(sample_ids.shape)} on {sample_ids.device}; "
            f"expected int64 {list(forget.shape)} on {forget.device}"
        )
    if sample_ids.is_cuda:  # no host read
        return
    ids = sample_ids[forget]
    if bool(((ids < 0) | (ids >= samples)).any()) or len(ids.unique()) < len(ids):
        raise ValueError(
            f"sample_ids of the forget samples are {ids.tolist()}; expected different numbers from 0 to {samples - 1}"
        )


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
