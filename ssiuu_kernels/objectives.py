"""Backbone objectives: the loss `L` as a function of the samples' log-likelihoods and lengths."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

# (log_probs [B], lengths [B], forget bool [B]) -> scalar to minimise.
Objective = Callable[[Tensor, Tensor, Tensor], Tensor]


def mean_token_log_prob(log_probs: Tensor, lengths: Tensor, chosen: Tensor) -> Tensor:
    """Mean log-probability per answer token over the chosen samples: long answers count by their tokens."""
    return log_probs[chosen].sum() / lengths[chosen].sum()


def gradient_ascent(log_probs: Tensor, lengths: Tensor, forget: Tensor) -> Tensor:
    """GA: the forget set's log-likelihood goes down; retain samples in the batch do not count."""
    return mean_token_log_prob(log_probs, lengths, forget)


def gradient_difference(log_probs: Tensor, lengths: Tensor, forget: Tensor) -> Tensor:
    """GD: GA plus the retain set's negative log-likelihood.

    Raises:
        ValueError: the batch has no retain sample.
    """
    if bool(forget.all()):
        raise ValueError("forget marks every sample, and objective 'gd' needs retain samples in each batch; add some")
    return gradient_ascent(log_probs, lengths, forget) - mean_token_log_prob(log_probs, lengths, ~forget)


OBJECTIVES: dict[str, Objective] = {"ga": gradient_ascent, "gd": gradient_difference}


def resolve_objective(objective: str | Objective) -> Objective:
    """A named objective, or the callable itself; a ValueError that lists the names otherwise."""
    if callable(objective):
        return objective
    if objective not in OBJECTIVES:
        raise ValueError(f"objective={objective!r} is unknown; expected a callable or one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[objective]
