"""The unlearning loss, whose backward fills `param.grad` with `dL` and `param.target_grad` with `sum_b dP_b`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

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
from ..gradients.path import ENGINES as ENGINES  # the toolkit reads it here
from ..gradients.two_backward import TwoBackward
from ..log_probs import Answers, answer_log_probs, check_logits, check_target, find_answers, target_factor
from .neuron_level import NeuronLevel
from .objectives import Objective, resolve_objective
from .value import NoteScale, UnlearningLoss

Tensors = Tensor | Sequence[Tensor]


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
    batches = _checked_batches(logits, labels, segments, forget)
    lengths = torch.cat([batch.answers.lengths for batch in batches])
    if target is None:
        _refuse_update_in_backward(model_params, frozenset(), "target=None asks for none")
        value = compute(_log_probs(batches), lengths, forget)
        return _checked_value(value), GradientPath(PLAIN, "no target gradient was asked for")
    check_target(target)
    targets, samples = Targets(params), int(forget.sum())
    _refuse_update_in_backward(model_params, targets.params.keys(), "the handle's scope leaves it out")
    for batch in batches:
        _check_gradient(batch.logits)
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
            factor = _target_weights(torch.cat([part.log_probs for part in parts]), lengths, forget, target)
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
    log_probs = _log_probs(batches)
    factor = _target_weights(log_probs, lengths, forget, target)
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
    batches = _checked_batches(logits, labels, None, forget)
    log_probs, lengths = _log_probs(batches), batches[0].answers.lengths
    if target is not None:
        _check_gradient(log_probs)
        _check_sample_ids(sample_ids, forget, neurons.samples)
        weights = _target_weights(log_probs, lengths, forget, target)
        log_probs = neurons.observe(logits, log_probs, weights, sample_ids, labels.shape[1])
    return compute(log_probs, lengths, forget)


class _Batch(NamedTuple):
    """What one forward saw and gave."""

    logits: Tensor
    labels: Tensor
    segments: Tensor | None
    answers: Answers


def _checked_batches(logits: Tensors, labels: Tensors, segments: Tensors | None, forget: Tensor) -> list[_Batch]:
    """The forwards that make up a loss: one, or several whose samples follow one another in `forget`."""
    several = isinstance(logits, Sequence)
    logits, labels = (list(given) if several else [given] for given in (logits, labels))
    segments = [None] * len(logits) if segments is None else list(segments) if several else [segments]
    if not len(logits) == len(labels) == len(segments) or not logits:
        raise ValueError(
            f"{len(logits)} logits, {len(labels)} labels and {len(segments)} segments; expected one of each per forward"
        )
    for part_logits, part_labels in zip(logits, labels, strict=True):
        check_logits(part_logits, part_labels)
    samples = sum(len(part if packed is None else packed) for part, packed in zip(labels, segments, strict=True))
    _check_forget(forget, samples, logits[0].device)
    return [
        _Batch(part_logits, part_labels, packed, find_answers(part_labels, packed))
        for part_logits, part_labels, packed in zip(logits, labels, segments, strict=True)
    ]


def _check_forget(forget: Tensor, samples: int, device: torch.device) -> None:
    if not isinstance(forget, Tensor):
        raise TypeError(f"forget is a {type(forget).__name__}; expected a bool tensor [{samples}] on {device}")
    if forget.dtype != torch.bool or forget.shape != (samples,) or forget.device != device:
        raise ValueError(
            f"forget is {forget.dtype} {list(forget.shape)} on {forget.device}; expected a bool mask [{samples}] on "
            f"{device}, true for forget samples"
        )


def _check_gradient(logits: Tensor) -> None:
    if not logits.requires_grad:
        raise ValueError("logits carry no gradient; call the model with gradients on and trainable parameters")


def _checked_value(value: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.dim() != 0 or not value.requires_grad:
        came = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"the objective gave {came}{'' if getattr(value, 'requires_grad', True) else ' without a gradient'}; "
            "expected a scalar tensor, a function of the log-likelihoods"
        )
    return value


def _refuse_update_in_backward(model_params: Mapping[str, nn.Parameter], targets: Collection[int], why: str) -> None:
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
