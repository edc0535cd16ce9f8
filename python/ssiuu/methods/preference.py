"""Preference methods: the model learns to prefer the forget answers less than it did, or less than a refusal."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from torch import nn

import ssiuu_kernels as sk
from ssiuu_kernels.loss.objectives import (
    BETA,
    SIMPLE_BETA,
    SIMPLE_GAMMA,
    Objective,
    direct_preference,
    negative_preference,
    simple_negative_preference,
)

from ..data.prompts import Encoded
from ..options import UnlearnOptions
from .base import Batch, LikelihoodMethod, UnlearnData, samples_over_the_step
from .reference import Reference
from .registry import register_method

REFUSAL = "I can't answer the question."


def _check_beta(beta: float) -> None:
    if not 0 < beta < math.inf:
        raise ValueError(f"beta={beta}; expected a finite number above 0")


class ReferencedMethod(LikelihoodMethod):
    """A method that compares the model with itself before unlearning."""

    def check(self, run: UnlearnOptions) -> None:
        _check_beta(self.options.beta)

    def setup(self, model: nn.Module, handle: sk.PatchHandle, data: UnlearnData) -> None:
        super().setup(model, handle, data)
        self.reference = Reference(model, data, self.companions(data))


@register_method
class NegativePreference(ReferencedMethod):
    """NPO: `-(2/beta) mean log sigmoid(-beta (s - s_reference))` over forget, plus mean-token NLL on retain.

    `s` is the log-probability of an answer, and `s_reference` that of the model before unlearning. Zhang et al. 2024,
    arXiv 2404.05868.
    """

    name, label, color = "npo", "NPO", "#009e73"
    summary = "negative preference: lower the forget answers relative to the model before unlearning"
    source = "the paper (NPO, Zhang et al. 2024); ours: weight 1 of the retain term, beta 0.1 of the paper's range"

    @dataclass(frozen=True)
    class Options:
        """
        Attributes:
            beta: the larger, the sooner a forget answer that became less likely stops counting. Paper: 0.1 to 0.5.
        """

        beta: float = BETA

    def objective(self, batch: Batch) -> Objective:
        reference = self.reference.log_probs(batch)
        npo = partial(negative_preference, reference_log_probs=reference, beta=self.options.beta)
        return samples_over_the_step(npo, batch)


@register_method
class DirectPreference(ReferencedMethod):
    """DPO: prefer a refusal to the true answer, against the model before unlearning, plus mean-token NLL on retain.

    `-(1/beta) mean log sigmoid(beta (growth of the refusal - growth of the true answer))` over forget, where the growth
    of an answer is `s - s_reference`. Rafailov et al. 2023, arXiv 2305.18290; the factor 1/beta is from Zhang et al.
    2024.
    """

    name, label, color = "dpo", "DPO", "#e69f00"
    summary = "direct preference: prefer a refusal to the forget answers"
    source = (
        "the paper (DPO, Rafailov et al. 2023); ours: weight 1 of the retain term, the factor 1/beta (Zhang et al. "
        "2024), beta 0.1 of the paper's range"
    )

    @dataclass(frozen=True)
    class Options:
        """
        Attributes:
            beta: the larger, the sooner a preference that is reached stops counting. Paper: 0.1 to 0.5.
            refusal: the preferred answer to every forget question. Paper: "I can't answer the question."
        """

        beta: float = BETA
        refusal: str = REFUSAL

    def check(self, run: UnlearnOptions) -> None:
        super().check(run)
        refusal = self.options.refusal
        if not isinstance(refusal, str) or not refusal.strip():
            raise ValueError(
                f"refusal={refusal!r}; expected the text to prefer to the true answers, such as {REFUSAL!r}"
            )

    def companions(self, data: UnlearnData) -> list[Encoded]:
        return [data.prompts.encode(fact.question, self.options.refusal) for fact in data.forget]

    def objective(self, batch: Batch) -> Objective:
        reference = self.reference.log_probs(batch)
        dpo = partial(direct_preference, reference_log_probs=reference, beta=self.options.beta)
        return samples_over_the_step(dpo, batch)


@register_method
class SimpleNegativePreference(LikelihoodMethod):
    """SimNPO: `-(2/beta) mean log sigmoid(-beta s / |y| - gamma)` over forget, plus mean-token NLL on retain.

    `s / |y|` is the mean log-probability per token of an answer; there is no reference. Fan et al. 2024, arXiv
    2410.07163, and their code (OPTML-Group/Unlearn-Simple).
    """

    name, label, color = "simnpo", "SimNPO", "#882255"
    summary = "simple negative preference: NPO per token, without a reference"
    source = (
        "Fan et al. 2024 (SimNPO), with beta and gamma of their code for TOFU forget05; ours: weight 1 of both terms "
        "(theirs: 0.1375 of the forget term)"
    )

    @dataclass(frozen=True)
    class Options:
        """
        Attributes:
            beta: the larger, the sooner an unlikely forget answer stops counting. SimNPO's authors: 2.5 (TOFU
                forget05), 4.5 (TOFU forget10).
            gamma: margin by which forget answers have to be unlikely, at least 0. SimNPO's authors: 0.
        """

        beta: float = SIMPLE_BETA
        gamma: float = SIMPLE_GAMMA

    def check(self, run: UnlearnOptions) -> None:
        _check_beta(self.options.beta)
        if not 0 <= self.options.gamma < math.inf:
            raise ValueError(f"gamma={self.options.gamma}; expected a finite number, at least 0")

    def objective(self, batch: Batch) -> Objective:
        simnpo = partial(simple_negative_preference, beta=self.options.beta, gamma=self.options.gamma)
        return samples_over_the_step(simnpo, batch)
