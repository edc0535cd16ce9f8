"""What neurons are credited with: one number per sample, and the factor that comes after its backward."""

from __future__ import annotations

import torch
from torch import Tensor

from ..log_probs import (
    IGNORE_INDEX,
    TARGETS,
    answer_lengths,
    check_labels,
    check_logits,
    find_answers,
    sequence_log_probs,
    target_factor,
)

ATTRIBUTION_TARGETS = (*TARGETS, "logit", "margin")


def check_attribution_target(target: str) -> str:
    """`target` if it is known; a ValueError that lists the names otherwise."""
    if target not in ATTRIBUTION_TARGETS:
        raise ValueError(f"target={target!r} is unknown; expected one of {', '.join(ATTRIBUTION_TARGETS)}")
    return target


def check_answers(labels: Tensor, other_labels: Tensor | None, target: str) -> None:
    """Raise a ValueError or TypeError for labels that have not what the target needs; see `target_values`."""
    find_answers(labels)
    if target != "margin":
        return
    if other_labels is None:
        raise ValueError(
            "target='margin' needs other_labels in the batch: int64 [B, S], the tokens of a wrong answer in place of "
            f"the answer's, {IGNORE_INDEX} elsewhere"
        )
    check_labels(other_labels, "other_labels")
    if other_labels.shape != labels.shape:
        raise ValueError(
            f"other_labels has shape {list(other_labels.shape)} and labels {list(labels.shape)}; expected one"
        )
    _first_difference(labels, other_labels)


def target_values(logits: Tensor, labels: Tensor, other_labels: Tensor | None, target: str) -> tuple[Tensor, Tensor]:
    """Values `v_b` to send back, and factors `f_b > 0` such that `d target_b = f_b dv_b`; float32 `[B]` each.

    With `z_t` the logits that predict token t, `y` the answer's tokens and `o` those of a wrong answer:

        prob, geometric_mean_prob, log_prob    v = log P(y|x), f as in `log_probs.target_factor`
        logit      v = sum_t z_t[y_t],            f = 1
        margin     v = z_t[y_t] - z_t[o_t],       f = 1, at the first t where `y_t` and `o_t` differ

    `prob` vanishes with P, and `log_prob` grows as a model becomes sure of something else. These two do neither.

    Args:
        logits: `[B, S, V]`.
        labels: int64 `[B, S]`; -100 is ignored.
        other_labels: int64 `[B, S]`, for "margin": the wrong answer's tokens in place of the answer's.
    """
    if target in TARGETS:
        log_probs = sequence_log_probs(logits, labels)
        return log_probs, target_factor(log_probs, answer_lengths(labels), target)
    check_logits(logits, labels)
    values = _answer_logits(logits, labels) if target == "logit" else _margins(logits, labels, other_labels)
    return values, torch.ones_like(values)


def _answer_logits(logits: Tensor, labels: Tensor) -> Tensor:
    answers = find_answers(labels)
    found = _wide(logits.flatten(0, 1)[answers.rows, answers.tokens])
    # A masked row sum, rather than an index_add, keeps the sum deterministic on a GPU.
    sample = torch.arange(len(labels), device=logits.device)[:, None]
    return torch.where(answers.samples == sample, found, 0).sum(1)


def _margins(logits: Tensor, labels: Tensor, other_labels: Tensor) -> Tensor:
    check_logits(logits, other_labels)
    place = _first_difference(labels, other_labels)
    sample = torch.arange(len(labels), device=logits.device)
    tokens = (answer[sample, place] for answer in (labels, other_labels))
    answer, other = (_wide(logits[sample, place - 1, token]) for token in tokens)
    return answer - other


def _first_difference(labels: Tensor, other_labels: Tensor) -> Tensor:
    """Where the two answers part, int64 `[B]`; column 0 is never predicted."""
    differ = labels != other_labels
    differ[:, 0] = False
    place = differ.int().argmax(1)
    sample = torch.arange(len(labels), device=labels.device)
    both = (labels[sample, place] != IGNORE_INDEX) & (other_labels[sample, place] != IGNORE_INDEX)
    wrong = (~(both & differ.any(1))).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"other_labels of samples {wrong} do not part from labels at a token of both; expected the tokens of a "
            "wrong answer that starts where the answer does, and differs before either ends"
        )
    return place


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
