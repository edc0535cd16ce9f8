"""The unlearning loss, whose backward fills `param.grad` with `dL` and `param.target_grad` with `sum_b dP_b`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..distributed import refuse_more_processes
from ..gradients.one_backward.backward import OneBackward
from ..gradients.one_backward.checked import CheckedBackward
from ..gradients.one_backward.graph import (
    Part,
    claim,
    depends_on_more_than,
    follow,
    refuse_another_model,
    refuse_reentrant_checkpointing,
)
from ..gradients.one_backward.row_weights import RowWeights
from ..gradients.one_backward.targets import Targets
from ..gradients.path import CHECKED, ONE_BACKWARD, PLAIN, TWO_BACKWARD, GradientPath
from ..gradients.two_backward import TwoBackward
from ..log_probs import check_target
from .batches import (
    Batch,
    Tensors,
    check_gradient,
    checked_batches,
    log_probs_of,
    refuse_update_in_backward,
    target_weights,
)
from .neuron_level import NeuronLevel
from .objectives import Objective, resolve_objective
from .value import NoteScale, UnlearningLoss


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
        engine: "one-backward" where the graph can take it, "checked" (that, and held against the other), or
            "two-backward".
        model_params: all of the model's, by name.
    """
    refuse_more_processes()
    compute = resolve_objective(objective, reference_log_probs)
    batches = checked_batches(logits, labels, segments, forget)
    lengths = torch.cat([batch.answers.lengths for batch in batches])
    if target is None:
        refuse_update_in_backward(model_params, frozenset(), "target=None asks for none")
        value = compute(log_probs_of(batches), lengths, forget)
        return _checked_value(value), GradientPath(PLAIN, "no target gradient was asked for")
    check_target(target)
    targets, samples = Targets(params), int(forget.sum())
    refuse_update_in_backward(model_params, targets.params.keys(), "the handle's scope leaves it out")
    for batch in batches:
        check_gradient(batch.logits)
    reason = "engine='two-backward' was asked for"
    if engine != TWO_BACKWARD:
        names = {id(param): name for name, param in model_params.items()}
        parts = _parts(batches, forget)
        graphs, reason = follow(parts, names)
        if reason is None:
            versions = claim(graphs, parts, names, targets)
            if not any(param in targets for param in versions.params.values()):
                refuse_another_model([batch.logits for batch in batches], targets)
            versions.check()
            factor = target_weights(torch.cat([part.log_probs for part in parts]), lengths, forget, target)
            kind = CheckedBackward if engine == CHECKED else OneBackward
            backward = kind(parts, graphs, factor, samples, versions, targets)
            leaf = backward.attach()
            value = _checked_value(compute(leaf, lengths, forget))
            if depends_on_more_than(value, leaf):
                raise ValueError(
                    "the objective depends on more than the samples' log-likelihoods (its graph reaches other tensors "
                    "that require a gradient); detach them, or use ssiuu_kernels.patch(..., engine='two-backward')"
                )
            value = NoteScale.apply(value, backward).as_subclass(UnlearningLoss)
            return value, GradientPath(ONE_BACKWARD, "every trainable parameter in the graph is used row by row")
    for batch in batches:
        refuse_reentrant_checkpointing(batch.logits)
    refuse_another_model([batch.logits for batch in batches], targets)
    log_probs = log_probs_of(batches)
    factor = target_weights(log_probs, lengths, forget, target)
    backward = TwoBackward(log_probs, factor, samples, targets)
    value = _checked_value(compute(backward.attach(), lengths, forget))
    return NoteScale.apply(value, backward), GradientPath(TWO_BACKWARD, reason)


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
    batches = checked_batches(logits, labels, None, forget)
    log_probs, lengths = log_probs_of(batches), batches[0].answers.lengths
    if target is not None:
        check_gradient(log_probs)
        _check_sample_ids(sample_ids, forget, neurons.samples)
        weights = target_weights(log_probs, lengths, forget, target)
        log_probs = neurons.observe(logits, log_probs, weights, sample_ids, labels.shape[1])
    return compute(log_probs, lengths, forget)


def _checked_value(value: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.dim() != 0 or not value.requires_grad:
        came = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"the objective gave {came}{'' if getattr(value, 'requires_grad', True) else ' without a gradient'}; "
            "expected a scalar tensor, a function of the log-likelihoods"
        )
    return value


def _parts(batches: Sequence[Batch], forget: Tensor) -> list[Part]:
    forgotten = forget.split([len(batch.answers.lengths) for batch in batches])
    return [
        Part(batch.logits, RowWeights(batch.labels, batch.segments, batch.answers, chosen.tolist()))
        for batch, chosen in zip(batches, forgotten, strict=True)
    ]


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
