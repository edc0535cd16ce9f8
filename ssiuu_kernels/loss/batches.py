"""What a loss on log-likelihoods is given: the forwards that make it up, checked, and their log-likelihoods."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..log_probs import Answers, answer_log_probs, check_logits, find_answers, target_factor

Tensors = Tensor | Sequence[Tensor]


class Batch(NamedTuple):
    """What one forward saw and gave."""

    logits: Tensor
    labels: Tensor
    segments: Tensor | None
    answers: Answers


def checked_batches(logits: Tensors, labels: Tensors, segments: Tensors | None, forget: Tensor) -> list[Batch]:
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
        Batch(part_logits, part_labels, packed, find_answers(part_labels, packed))
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


def check_gradient(logits: Tensor) -> None:
    if not logits.requires_grad:
        raise ValueError("logits carry no gradient; call the model with gradients on and trainable parameters")


def refuse_update_in_backward(model_params: Mapping[str, nn.Parameter], targets: Collection[int], why: str) -> None:
    """A parameter that is updated in its backward needs both gradients there."""
    for name, param in model_params.items():
        if id(param) not in targets and getattr(param, "updated_in_backward", False):
            raise ValueError(
                f"{name} is updated in backward and would get no target_grad: {why}; patch with scope='all' and give "
                "a target, or leave the parameter to an optimizer without update_in_backward"
            )


def log_probs_of(batches: Sequence[Batch]) -> Tensor:
    """Of all samples, `[N]`, with the model's graph."""
    found = []
    for batch in batches:
        rows = batch.logits.flatten(0, 1).index_select(0, batch.answers.rows)
        found.append(answer_log_probs(rows, batch.answers))
    return torch.cat(found)


def target_weights(log_probs: Tensor, lengths: Tensor, forget: Tensor, target: str) -> Tensor:
    """`d target_b / d s_b` of the forget samples, 0 for the others; `[B]`."""
    return target_factor(log_probs, lengths, target) * forget
