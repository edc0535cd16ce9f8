"""Similarity of the states of two models: linear CKA, layer by layer."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..data.facts import Fact
from ..data.prompts import PromptFormat
from ..evaluation.states import at_last_prompt_token, states_of
from ..models.layers import decoder_layers

MOST = 512  # facts of a set
FEWEST = 4  # below that, the estimate is not defined


def drawn_facts(facts: Sequence[Fact]) -> list[Fact]:
    """The facts that are compared: all, or `MOST` of them, always the same."""
    return random.Random(0).sample(list(facts), MOST) if len(facts) > MOST else list(facts)


def prompt_states(
    model: PreTrainedModel,
    prompts: PromptFormat,
    facts: Sequence[Fact],
    *,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """The residual stream after every decoder layer at each prompt's last token, `[facts, layers, D]` on the CPU.

    Args:
        progress: called after every batch with its number of facts.

    Raises:
        ValueError: a model without one list of decoder layers.
    """
    found = []
    for batch, states, _ in states_of(model, decoder_layers(model), prompts, prompts.encode_facts(facts), progress):
        found.append(at_last_prompt_token(torch.stack(states, 2), batch["labels"]).cpu())
    return torch.cat(found)


def cka_by_layer(before: Tensor, after: Tensor) -> list[float | None]:
    """`linear_cka` of the states `[facts, layers, D]` of two models, layer by layer; None where it is not defined."""
    found = [linear_cka(*pair) for pair in zip(before.unbind(1), after.unbind(1), strict=True)]
    return [value if value == value else None for value in found]


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Debiased linear CKA of two representations of the same n inputs, at most 1; NaN where one has no variation.

        CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)),    K = X X^T and L = Y Y^T with their diagonals set to 0
        HSIC(K, L) = [tr(K L) + (1'K1)(1'L1) / ((n-1)(n-2)) - 2 (1'K L1) / (n-2)] / (n(n-3))

    This HSIC is unbiased (Song et al. 2012). The plain estimate of CKA (Kornblith et al. 2019) nears 1 for unrelated
    representations where inputs are fewer than dimensions, as they are here.

    Args:
        x: `[n, D]`, n at least 4.
        y: `[n, E]`.

    Raises:
        ValueError: other shapes.
    """
    if x.dim() != 2 or y.dim() != 2 or len(x) != len(y) or len(x) < FEWEST:
        raise ValueError(
            f"x and y have shapes {list(x.shape)} and {list(y.shape)}; expected [n, D] and [n, E], n at least {FEWEST}"
        )
    k, other = _centred_gram(x), _centred_gram(y)
    return ((k * other).sum() / (k.norm() * other.norm())).item()


def _centred_gram(x: Tensor) -> Tensor:
    """The U-centred Gram matrix, for which `HSIC(K, L) n(n-3)` is the inner product of K's and L's."""
    x = x.double()
    x = x - x.mean(0)  # changes nothing but rounding
    gram, n = (x @ x.T).fill_diagonal_(0), len(x)
    rows = gram.sum(1) / (n - 2)
    centred = gram - rows[:, None] - rows + gram.sum() / ((n - 1) * (n - 2))
    return centred.fill_diagonal_(0)
