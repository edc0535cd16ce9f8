"""Sequence log-likelihoods `s_b = log P(y_b | x_b)`, and the factor that turns `ds_b` into the target's gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100
TARGETS = ("prob", "geometric_mean_prob", "log_prob")


def check_target(target: str) -> str:
    """`target` if it is known; a ValueError that lists the names otherwise."""
    if target not in TARGETS:
        raise ValueError(f"target={target!r} is unknown; expected one of {', '.join(TARGETS)}")
    return target


def answer_lengths(labels: Tensor) -> Tensor:
    """Predicted tokens of each sample, `[B, S]` -> int64 `[B]`.

    A model predicts from the token before, so a label in column 0 is never predicted.

    Raises:
        ValueError: a sample has none.
    """
    lengths = (labels[:, 1:] != IGNORE_INDEX).sum(1)
    empty = (lengths == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"labels of samples {empty} have no answer token (all are {IGNORE_INDEX} after the first column); "
            "expected at least one: check the prompt mask and the truncation length"
        )
    return lengths


def sequence_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """`log P(y_b | x_b)`, the sum of the answer tokens' log-probabilities.

    Args:
        logits: `[B, S, V]`, any float type; position t predicts token t + 1 (the shift is made here).
        labels: int64 `[B, S]`; -100 is ignored. Only rows with a label are raised to float32.

    Returns:
        float32 `[B]` (float64 for float64 logits), differentiable.

    Raises:
        ValueError: shapes that do not fit, or a sample without an answer token.
    """
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"logits has shape {list(logits.shape)} and labels {list(labels.shape)}; expected [B, S, V] and [B, S]"
        )
    answer_lengths(labels)
    targets = labels[:, 1:]
    answered = targets != IGNORE_INDEX
    rows = logits[:, :-1][answered]
    rows = rows if rows.dtype == torch.float64 else rows.float()
    token_log_probs = -F.cross_entropy(rows, targets[answered], reduction="none")
    # A masked scatter and a row sum, rather than an index_add, keep the sum deterministic on a GPU.
    scattered = token_log_probs.new_zeros(answered.shape).masked_scatter(answered, token_log_probs)
    return scattered.sum(1)


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
