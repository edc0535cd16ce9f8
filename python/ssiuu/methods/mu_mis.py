"""MU-Mis: the forget answers' logits become insensitive to their inputs, without retain data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import ssiuu_kernels as sk
from ssiuu_kernels.log_probs import Answers, find_answers

from ..options import UnlearnOptions
from .base import Batch, Loss, Method, UnlearnData
from .registry import register_method

ATTENTIONS = ("sdpa", "eager")  # those that have second derivatives, "sdpa" in its plain form


class Sensitivities(NamedTuple):
    """Squared norm `[B]` of the gradient of each sample's mean logit with respect to its input embeddings.

    Attributes:
        answer: the logits are those of the answer's tokens.
        other: they are those of other tokens in their places.
    """

    answer: Tensor
    other: Tensor


@register_method
class MuMis(Method):
    """MU-Mis: minimise `mean_b |grad_x f_c|^2 - |grad_x f_c'|^2` over the forget samples; retain samples do not count.

    x are a sample's input embeddings; `f_c` is the mean, over the answer's positions, of the logit of the answer's
    token there; `f_c'` that of a random other token at each position, drawn again for every batch. The run stops once
    `|grad_x f_c'|^2` has fallen below delta times its value at the start and is back there: summed over the forget
    facts, each with its last value. Cheng et al. 2024, arXiv 2402.15109, for classifiers.

    The gradients of this loss are second derivatives: they take a forward on the model's own modules with plain
    attention, and three backwards. A penalty on top takes an ordinary forward and backward of the forget samples more.
    """

    name, label, color = "mu-mis", "MU-Mis", "#332288"
    summary = "make the forget answers' logits insensitive to their inputs; needs no retain data"
    source = (
        "Cheng et al. 2024 (MU-Mis), for classifiers; ours: logits averaged over an answer's positions, other tokens "
        "from the whole vocabulary, delta 0.9, stop only after a fall below delta"
    )

    @dataclass(frozen=True)
    class Options:
        """
        Attributes:
            mu_mis_delta: stop once the sensitivity of other tokens' logits, which falls first, is back at this fraction
                of its start. Ours: 0.9.
        """

        mu_mis_delta: float = 0.9

    def check(self, run: UnlearnOptions) -> None:
        delta = self.options.mu_mis_delta
        if not 0 < delta <= 1:
            raise ValueError(f"mu_mis_delta={delta}; expected a fraction of the start, above 0 and at most 1")
        _check_attention(run.attn_implementation)
        if run.gradient_checkpointing:
            raise ValueError(
                "gradient_checkpointing=True with method 'mu-mis', whose second derivatives cannot go through "
                "checkpointed layers; to save memory, use a smaller --forget-batch with --accumulate instead"
            )

    def setup(self, model: nn.Module, handle: sk.PatchHandle, data: UnlearnData) -> None:
        """As `Method.setup`.

        Raises:
            ValueError: an attention without second derivatives.
        """
        super().setup(model, handle, data)
        _check_attention(getattr(model.config, "_attn_implementation", None))
        self._draws = torch.Generator().manual_seed(data.seed)
        self._start = torch.full((len(data.forget_samples),), math.nan, dtype=torch.float64)
        self._last = self._start.clone()
        self._has_fallen = False

    def loss(self, batch: Batch) -> Loss:
        batch = batch.only(batch.forget)
        if not len(batch.ids):  # every gradient is 0
            return Loss(0.0 * sum(param.sum() for param in self.parameters(self.model)), None)
        answer, other = self.sensitivities(batch)
        self._note(batch.ids, other)
        return Loss(batch.forget_weight * (answer - other).mean(), None)

    def sensitivities(self, batch: Batch) -> Sensitivities:
        """Of every sample of the batch, with their graph; other tokens are drawn again with every call.

        Raises:
            ValueError: a model that runs its input embeddings more than once.
        """
        answers = find_answers(batch.labels)
        with self.handle.suspended(), sdpa_kernel(SDPBackend.MATH), _input_embeddings(self.model) as found:
            logits = self.forward(batch).flatten(0, 1)[answers.rows]
            if len(found) != 1:
                raise ValueError(
                    f"{type(self.model).__name__} ran its input embeddings {len(found)} times in a forward; method "
                    "'mu-mis' expects once"
                )
            others = self._other_tokens(answers.tokens, logits.shape[-1])
            return Sensitivities(
                answer=_sensitivity(logits, answers.tokens, answers, found[0]),
                other=_sensitivity(logits, others, answers, found[0]),
            )

    def _other_tokens(self, tokens: Tensor, vocabulary: int) -> Tensor:
        """For each of `tokens` a random one of the others."""
        drawn = torch.randint(vocabulary - 1, tokens.shape, generator=self._draws).to(tokens.device)
        return drawn + (drawn >= tokens)

    def _note(self, ids: Tensor, other: Tensor) -> None:
        ids, other = ids.cpu(), other.detach().double().cpu()
        self._start[ids] = torch.where(self._start[ids].isnan(), other, self._start[ids])
        self._last[ids] = other
        self._has_fallen |= self._level() < self.options.mu_mis_delta

    def _level(self) -> float:
        """The sensitivity of other tokens' logits, as a fraction of its start."""
        return (self._last.nansum() / self._start.nansum()).item()

    @property
    def finished(self) -> bool:
        return self._has_fallen and self._level() >= self.options.mu_mis_delta

    def state_dict(self) -> dict[str, Any]:
        return {
            "draws": self._draws.get_state(), "start": self._start, "last": self._last, "has_fallen": self._has_fallen,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._draws.set_state(state["draws"])
        self._start, self._last, self._has_fallen = state["start"], state["last"], state["has_fallen"]


def _check_attention(attention: str | None) -> None:
    if attention not in (None, *ATTENTIONS):
        raise ValueError(
            f"attn_implementation={attention!r} with method 'mu-mis', which needs second derivatives; expected "
            f"{' or '.join(map(repr, ATTENTIONS))}"
        )


@contextmanager
def _input_embeddings(model: nn.Module) -> Iterator[list[Tensor]]:
    """Those of every forward inside, `[B, S, D]`, with a gradient."""
    found: list[Tensor] = []

    def keep(_module: nn.Module, _args: tuple, embeddings: Tensor) -> Tensor:
        found.append(embeddings.requires_grad_())
        return embeddings.clone()  # a model may write to its embeddings in place

    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        yield found
    finally:
        hook.remove()


def _sensitivity(logits: Tensor, tokens: Tensor, answers: Answers, embeddings: Tensor) -> Tensor:
    """Squared norm `[B]` of each sample's `d mean logit / d embeddings`, with its graph.

    Args:
        logits: `[N, V]`, of the answers' rows.
        tokens: int64 `[N]`, one for each row.
    """
    means = logits.gather(1, tokens[:, None])[:, 0] / answers.lengths[answers.samples]
    # No sample depends on another's embeddings, so the gradient of the sum has every sample's own.
    (grad,) = torch.autograd.grad(means.sum(), embeddings, create_graph=True)
    return grad.to(torch.promote_types(grad.dtype, torch.float32)).square().sum((1, 2))
