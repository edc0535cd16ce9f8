"""The unlearning loss, whose backward fills `param.grad` with `dL` and `param.target_grad` with `sum_b dP_b`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .log_probs import Answers, answer_log_probs, check_logits, check_target, find_answers, target_factor
from .neuron_level import NeuronLevel
from .objectives import Objective, resolve_objective
from .one_backward.backward import OneBackward
from .one_backward.graph import Part, depends_on_more_than, inspect_graph, refuse_reentrant_checkpointing
from .one_backward.row_weights import RowWeights
from .target_grad import add_target_grad

ONE_BACKWARD, TWO_BACKWARD = ENGINES = ("one-backward", "two-backward")
Tensors = Tensor | Sequence[Tensor]


class GradientPath(NamedTuple):
    """How the gradients of the last unlearning loss are made.

    Attributes:
        engine: "one-backward", "two-backward", or "plain" where no target gradient is asked for.
        reason: why, in one sentence.
    """

    engine: str
    reason: str


def unlearning_loss(
    logits: Tensors,
    labels: Tensors,
    forget: Tensor,
    *,
    params: Sequence[nn.Parameter],
    objective: str | Objective,
    target: str | None,
    segments: Tensors | None,
    reference_log_probs: Tensor | None,
    engine: str,
    model_params: Mapping[str, nn.Parameter],
) -> tuple[Tensor, GradientPath]:
    """See `PatchHandle.unlearning_loss`.

    Args:
        params: those that get a `target_grad`.
        engine: "one-backward" where the graph can take it, or "two-backward".
        model_params: all of the model's, by name.
    """
    compute = resolve_objective(objective, reference_log_probs)
    batches = _checked_batches(logits, labels, segments, forget)
    lengths = torch.cat([batch.answers.lengths for batch in batches])
    if target is None:
        _refuse_update_in_backward(model_params, frozenset(), "target=None asks for none")
        value = compute(_log_probs(batches), lengths, forget)
        return _checked_value(value), GradientPath("plain", "no target gradient was asked for")
    check_target(target)
    targets = frozenset(id(param) for param in params)
    _refuse_update_in_backward(model_params, targets, "the handle's scope leaves it out")
    for batch in batches:
        if not batch.logits.requires_grad:
            raise ValueError("logits carry no gradient; call the model with gradients on and trainable parameters")
    reason = "engine='two-backward' was asked for"
    if engine == ONE_BACKWARD:
        parts = _parts(batches, forget)
        versions, reason = inspect_graph(parts, {id(param): name for name, param in model_params.items()}, targets)
        if reason is None:
            versions.check()
            factor = _target_weights(torch.cat([part.log_probs for part in parts]), lengths, forget, target)
            leaf = OneBackward(parts, factor, versions).attach()
            value = _checked_value(compute(leaf, lengths, forget))
            if depends_on_more_than(value, leaf):
                raise ValueError(
                    "the objective depends on more than the samples' log-likelihoods (its graph reaches other tensors "
                    "that require a gradient); detach them, or use ssiuu_kernels.patch(..., engine='two-backward')"
                )
            return value, GradientPath(ONE_BACKWARD, "every trainable parameter in the graph is used row by row")
    for batch in batches:
        refuse_reentrant_checkpointing(batch.logits)
    log_probs = _log_probs(batches)
    factor = _target_weights(log_probs, lengths, forget, target)
    log_probs = _TargetGradient.apply(log_probs, _Graph(log_probs, factor, params))
    return _checked_value(compute(log_probs, lengths, forget)), GradientPath(TWO_BACKWARD, reason)


def neuron_level_loss(
    logits: Tensor,
    labels: Tensor,
    forget: Tensor,
    neurons: NeuronLevel,
    sample_ids: Tensor | None,
    objective: str | Objective,
    target: str | None,
    reference_log_probs: Tensor | None,
) -> Tensor:
    """See `PatchHandle.unlearning_loss`, level "neuron"; `neurons` holds the banks."""
    compute = resolve_objective(objective, reference_log_probs)
    batches = _checked_batches(logits, labels, None, forget)
    log_probs, lengths = _log_probs(batches), batches[0].answers.lengths
    if target is not None:
        if not log_probs.requires_grad:
            raise ValueError("logits carry no gradient; call the model with gradients on and trainable parameters")
        _check_sample_ids(sample_ids, forget, neurons.samples)
        weights = _target_weights(log_probs, lengths, forget, target)
        log_probs = neurons.observe(log_probs, weights, sample_ids, labels.shape[1])
    return compute(log_probs, lengths, forget)


class _Batch(NamedTuple):
    """What one forward saw and gave."""

    logits: Tensor
    labels: Tensor
    segments: Tensor | None
    answers: Answers


def _checked_batches(logits: Tensors, labels: Tensors, segments: Tensors | None, forget: Tensor) -> list[_Batch]:
    """The forwards that make up a loss: one, or several whose samples follow one another in `forget`."""
    several = not isinstance(logits, Tensor)
    logits, labels = (list(given) if several else [given] for given in (logits, labels))
    segments = [None] * len(logits) if segments is None else list(segments) if several else [segments]
    if not len(logits) == len(labels) == len(segments):
        raise ValueError(
            f"{len(logits)} logits, {len(labels)} labels and {len(segments)} segments; expected one each a forward"
        )
    samples = sum(len(part if packed is None else packed) for part, packed in zip(labels, segments, strict=True))
    if forget.dtype != torch.bool or forget.shape != (samples,):
        raise ValueError(f"forget is {forget.dtype} {list(forget.shape)}; expected a bool mask [{samples}]")
    if not bool(forget.any()):
        raise ValueError("forget marks no sample; expected at least one forget sample in the batch")
    batches = []
    for part_logits, part_labels, packed in zip(logits, labels, segments, strict=True):
        check_logits(part_logits, part_labels)
        batches.append(_Batch(part_logits, part_labels, packed, find_answers(part_labels, packed)))
    return batches


def _checked_value(value: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.dim() != 0 or not value.requires_grad:
        came = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"the objective gave {came}{'' if getattr(value, 'requires_grad', True) else ' without a gradient'}; "
            "expected a scalar tensor, a function of the log-likelihoods"
        )
    return value


def _refuse_update_in_backward(model_params: Mapping[str, nn.Parameter], targets: frozenset[int], why: str) -> None:
    """A parameter that is updated in its backward needs both gradients there."""
    for name, param in model_params.items():
        if id(param) not in targets and getattr(param, "updated_in_backward", False):
            raise ValueError(
                f"{name} is updated in backward and would get no target_grad: {why}; patch with scope='all' and give "
                "a target, or leave the parameter to an optimizer without update_in_backward"
            )


def _log_probs(batches: Sequence[_Batch]) -> Tensor:
    """Of all samples, `[N]`, with the model's graph."""
    found = []
    for batch in batches:
        rows = batch.logits.flatten(0, 1).index_select(0, batch.answers.rows)
        found.append(answer_log_probs(rows, batch.answers))
    return torch.cat(found)


def _parts(batches: Sequence[_Batch], forget: Tensor) -> list[Part]:
    forgotten = forget.split([len(batch.answers.lengths) for batch in batches])
    return [
        Part(batch.logits, RowWeights(batch.labels, batch.segments, batch.answers, chosen.tolist()))
        for batch, chosen in zip(batches, forgotten, strict=True)
    ]


def _target_weights(log_probs: Tensor, lengths: Tensor, forget: Tensor, target: str) -> Tensor:
    """`d target_b / d s_b` of the forget samples, 0 for the others; `[B]`."""
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
            if grad is not None:
                add_target_grad(param, grad)
        return grad_log_probs, None
