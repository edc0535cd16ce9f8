"""Backbone objectives: the loss `L` as a function of the samples' log-likelihoods and lengths."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

# (log_probs [B], lengths [B], forget bool [B]) -> scalar to minimise.
Objective = Callable[[Tensor, Tensor, Tensor], Tensor]

BETA = 0.1  # of NPO and DPO, as in Zhang et al. 2024 (arXiv 2404.05868)
# Of SimNPO (Fan et al. 2024, arXiv 2410.07163), as in its authors' code for TOFU forget05.
SIMPLE_BETA, SIMPLE_GAMMA = 2.5, 0.0


def mean_token_log_prob(log_probs: Tensor, lengths: Tensor, chosen: Tensor) -> Tensor:
    """Mean log-probability per answer token over the chosen samples: long answers count by their tokens. 0 of none."""
    tokens = lengths[chosen].sum()
    return log_probs[chosen].sum() / torch.where(tokens == 0, 1, tokens)


def gradient_ascent(log_probs: Tensor, lengths: Tensor, forget: Tensor) -> Tensor:
    """GA: the forget set's log-likelihood goes down; retain samples in the batch do not count."""
    return mean_token_log_prob(log_probs, lengths, forget)


def gradient_difference(log_probs: Tensor, lengths: Tensor, forget: Tensor) -> Tensor:
    """GD: GA plus the retain set's negative log-likelihood. A batch without samples of one of them lacks that term."""
    return gradient_ascent(log_probs, lengths, forget) - mean_token_log_prob(log_probs, lengths, ~forget)


def negative_preference(
    log_probs: Tensor, lengths: Tensor, forget: Tensor, reference_log_probs: Tensor, beta: float = BETA
) -> Tensor:
    """NPO (Zhang et al. 2024): `-2/beta mean log sigmoid(-beta (s - s_reference))` over the forget samples.

    Retain samples, where the batch has some, add their mean-token negative log-likelihood.
    """
    growth = (log_probs - reference_log_probs)[forget]
    loss = -2 / beta * _mean_log_sigmoid(-beta * growth)
    return loss - mean_token_log_prob(log_probs, lengths, ~forget)


def simple_negative_preference(
    log_probs: Tensor,
    lengths: Tensor,
    forget: Tensor,
    beta: float = SIMPLE_BETA,
    gamma: float = SIMPLE_GAMMA,
) -> Tensor:
    """SimNPO (Fan et al. 2024): `-2/beta mean log sigmoid(-beta s / |y| - gamma)` over the forget samples.

    Unlike NPO it needs no reference, and counts per token: `|y|` is the length of a sample's answer. Retain samples,
    where the batch has some, add their mean-token negative log-likelihood.
    """
    per_token = (log_probs / lengths)[forget]
    loss = -2 / beta * _mean_log_sigmoid(-beta * per_token - gamma)
    return loss - mean_token_log_prob(log_probs, lengths, ~forget)


def direct_preference(
    log_probs: Tensor, lengths: Tensor, forget: Tensor, reference_log_probs: Tensor, beta: float = BETA
) -> Tensor:
    """DPO: `-1/beta mean log sigmoid(beta (growth of the preferred answer - growth of the one to forget))`.

    The first samples that are no forget samples, as many as there are forget samples and in their order, are the
    answers preferred to them ("I don't know", say, to the same prompt). Further ones are retain samples, and add their
    mean-token negative log-likelihood.

    Raises:
        ValueError: fewer of them than forget samples.
    """
    growth = log_probs - reference_log_probs
    others = (~forget).nonzero().flatten()
    pairs = int(forget.sum())
    if len(others) < pairs:
        raise ValueError(
            f"forget marks {pairs} of {len(forget)} samples, and objective 'dpo' needs a preferred answer for each of "
            f"them among the others, of which there are {len(others)}; add them in the forget samples' order"
        )
    loss = -1 / beta * _mean_log_sigmoid(beta * (growth[others[:pairs]] - growth[forget]))
    retain = torch.zeros_like(forget)
    retain[others[pairs:]] = True
    return loss - mean_token_log_prob(log_probs, lengths, retain)


def _mean_log_sigmoid(values: Tensor) -> Tensor:
    """Mean of `log sigmoid` of these values; 0 of none."""
    return F.logsigmoid(values).sum() / max(len(values), 1)


OBJECTIVES: dict[str, Objective] = {
    "ga": gradient_ascent,
    "gd": gradient_difference,
    "simnpo": simple_negative_preference,
}
# They compare with the model before unlearning: a fourth argument, its log-likelihoods of the same samples.
REFERENCED = {"npo": negative_preference, "dpo": direct_preference}


def resolve_objective(objective: str | Objective, reference_log_probs: Tensor | None = None) -> Objective:
    """A named objective, or the callable itself.

    Raises:
        ValueError: an unknown name, whose message lists the names; a reference that is missing, or that nothing reads.
    """
    if objective in REFERENCED:
        if reference_log_probs is None:
            raise ValueError(
                f"reference_log_probs is missing, and objective {objective!r} compares with the model before "
                "unlearning; pass its ssiuu_kernels.sequence_log_probs of the same samples, [B]"
            )
        return partial(_against, REFERENCED[objective], reference_log_probs)
    if reference_log_probs is not None:
        raise ValueError(f"reference_log_probs was given, and objective={objective!r} does not read it; leave it out")
    if callable(objective):
        return objective
    if objective not in OBJECTIVES:
        names = ", ".join([*OBJECTIVES, *REFERENCED])
        raise ValueError(f"objective={objective!r} is unknown; expected a callable or one of {names}")
    return OBJECTIVES[objective]


def _against(objective, reference_log_probs: Tensor, log_probs: Tensor, lengths: Tensor, forget: Tensor) -> Tensor:
    if reference_log_probs.shape != log_probs.shape or reference_log_probs.requires_grad:
        raise ValueError(
            f"reference_log_probs has shape {list(reference_log_probs.shape)}"
            f"{' and requires a gradient' if reference_log_probs.requires_grad else ''}; "
            f"expected {list(log_probs.shape)}, computed under torch.no_grad()"
        )
    return objective(log_probs, lengths, forget, reference_log_probs)
