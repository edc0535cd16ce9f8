"""Sequence log-likelihoods `s_b = log P(y_b | x_b)`, and the factor that turns `ds_b` into the target's gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops.common.checks import check_segment_values, make_segments

IGNORE_INDEX = -100  # of a label that is no part of the answer
TARGETS = ("prob", "geometric_mean_prob", "log_prob")


def check_target(target: str) -> str:
    """`target` if it is known; a ValueError that lists the names otherwise."""
    if target not in TARGETS:
        raise ValueError(f"target={target!r} is unknown; expected one of {', '.join(TARGETS)}")
    return target


class Answers(NamedTuple):
    """The rows of a batch's logits that predict an answer token, in the order of the flattened `[B * S]`.

    Attributes:
        rows: int64 `[N]`, place in the flattened logits.
        tokens: int64 `[N]`, the token that is to be predicted there.
        samples: int64 `[N]`, the sample it belongs to.
        lengths: int64 `[samples]`, answer tokens of each sample.
    """

    rows: Tensor
    tokens: Tensor
    samples: Tensor
    lengths: Tensor


def sample_of_rows(labels: Tensor, segments: Tensor | None) -> Tensor:
    """The sample of each row of the flattened `[B * S]`, int64; -1 where a row is in no segment."""
    count, width = labels.shape
    if segments is None:
        return torch.arange(count, device=labels.device).repeat_interleave(width)
    position = torch.arange(count * width, device=labels.device)
    inside = (position >= segments[:, :1]) & (position < segments[:, 1:])
    return torch.where(inside.any(0), inside.int().argmax(0), -1)


def find_answers(labels: Tensor, segments: Tensor | None = None) -> Answers:
    """Where the answers of a batch stand. A model predicts from the token before, so a sample's first is no answer.

    Args:
        labels: int64 `[B, S]`; -100 is ignored.
        segments: int32 `[N, 2]`, start and end row of each packed sample in the flattened `[B * S]`; None: one a row.

    Raises:
        ValueError: a sample without an answer token, or segments that do not fit.
    """
    check_labels(labels)
    if segments is not None:
        segments = make_segments(labels, segments)
        check_segment_values(segments, labels.numel())
    sample = sample_of_rows(labels, segments)
    following = labels.flatten()[1:]
    answered = (following != IGNORE_INDEX) & (sample[1:] == sample[:-1]) & (sample[1:] >= 0)
    rows = answered.nonzero().flatten()
    samples = sample[rows]
    lengths = torch.bincount(samples, minlength=len(labels) if segments is None else len(segments))
    empty = (lengths == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"labels of samples {empty} have no answer token (all are {IGNORE_INDEX} after the first column); "
            "expected at least one: check the prompt mask and the truncation length"
        )
    return Answers(rows, following[rows], samples, lengths)


def answer_lengths(labels: Tensor) -> Tensor:
    """Predicted tokens of each sample, `[B, S]` -> int64 `[B]`; a ValueError where a sample has none."""
    return find_answers(labels).lengths


def sequence_log_probs(logits: Tensor, labels: Tensor, segments: Tensor | None = None) -> Tensor:
    """`log P(y_b | x_b)`, the sum of the answer tokens' log-probabilities.

    Args:
        logits: `[B, S, V]`, any float type; position t predicts token t + 1 (the shift is made here).
        labels: int64 `[B, S]`; -100 is ignored. Only rows with a label are raised to float32.
        segments: int32 `[N, 2]`, start and end row of each packed sample in the flattened `[B * S]`; None: one sample
            a row.

    Returns:
        float32 `[B]`, packed `[N]` (float64 for float64 logits), differentiable.

    Raises:
        ValueError: shapes that do not fit, or a sample without an answer token.
    """
    check_logits(logits, labels)
    answers = find_answers(labels, segments)
    return answer_log_probs(logits.flatten(0, 1).index_select(0, answers.rows), answers)


def check_logits(logits: Tensor, labels: Tensor) -> None:
    """Raise a ValueError or TypeError where logits and labels are not tensors that fit together."""
    if not isinstance(logits, Tensor):
        hint = "; pass its .logits" if hasattr(logits, "logits") else ""
        raise TypeError(f"logits is a {type(logits).__name__}; expected a tensor [B, S, V]{hint}")
    check_labels(labels)
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"logits has shape {list(logits.shape)} and labels {list(labels.shape)}; expected [B, S, V] and [B, S]"
        )
    if not logits.is_floating_point():
        raise TypeError(f"logits is {logits.dtype}; expected a floating type")
    if labels.device != logits.device:
        raise ValueError(f"labels is on {labels.device} and logits on {logits.device}; move them to one device")
    # On a GPU the values are trusted: cross_entropy reports one out of range there.
    if not labels.is_cuda and labels.numel():
        wrong = labels[(labels != IGNORE_INDEX) & ((labels < 0) | (labels >= logits.shape[-1]))]
        if len(wrong):
            raise ValueError(
                f"labels has the token {int(wrong[0])}; expected {IGNORE_INDEX}, or 0 to {logits.shape[-1] - 1}: the "
                "logits have no other tokens"
            )


def check_labels(labels: Tensor, name: str = "labels") -> None:
    """Raise a ValueError or TypeError where labels are not an int64 tensor `[B, S]`."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} is a {type(labels).__name__}; expected an int64 tensor [B, S]")
    if labels.dtype != torch.int64:
        raise TypeError(f"{name} is {labels.dtype}; expected int64: convert with {name}.long()")
    if labels.dim() != 2:
        raise ValueError(f"{name} has shape {list(labels.shape)}; expected [B, S]")


def answer_log_probs(rows: Tensor, answers: Answers) -> Tensor:
    """`sequence_log_probs` from the logits of the answers' rows, `[N, V]`."""
    rows = rows if rows.dtype == torch.float64 else rows.float()
    token_log_probs = -F.cross_entropy(rows, answers.tokens, reduction="none")
    # A masked row sum, rather than an index_add, keeps the sum deterministic on a GPU.
    sample = torch.arange(len(answers.lengths), device=rows.device)[:, None]
    return torch.where(answers.samples == sample, token_log_probs, 0).sum(1)


def target_factor(log_probs: Tensor, lengths: Tensor, target: str) -> Tensor:
    """`d target_b / d s_b`: `P_b` for "prob", `P_b^(1/T_b) / T_b` for "geometric_mean_prob", 1 for "log_prob".

    Args:
        log_probs: `[B]`, detached here.
        lengths: `[B]`, answer tokens of each sample.
    """
    s = log_probs.detach()
    if check_target(target) == "prob":
        return s.exp()
    if target == "geometric_mean_prob":
        return (s / lengths).exp() / lengths
    return torch.ones_like(s)
