"""Drift of attributions under an attack: are the neurons after it those of before? (The paper's Fig. 6.)"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .influence import Influence

BINS = 80
MODELS = ("original", "unlearned", "attacked")


def mean_attributions(influences: Mapping[str, Influence]) -> Tensor:
    """Of every neuron of every kind, `mean_b sum_k A`: over facts, of the sum over tokens; float64 `[neurons]`.

    The paper does not say how it reduces tokens and facts.
    """
    return torch.cat([influence.sum.flatten() for influence in influences.values()]).double()


def drift(original: Tensor, unlearned: Tensor, attacked: Tensor) -> dict:
    """How attributions change from the original to the unlearned model and under an attack.

    A model that forgot by hiding falls back: its attributions move under an attack, and towards the original's.

    Args:
        original, unlearned, attacked: attribution of the same neurons in the three models, `[neurons]`.

    Returns:
        {"pearson", "spearman": {"unlearned_attacked", "original_unlearned", "original_attacked"}, "histogram":
        {"edges": [BINS + 1], "original", "unlearned", "attacked": [BINS] shares of the neurons}}. Edges are
        symmetric, and logarithmic but in the middle. A correlation is None where a model has no variation.

    Raises:
        ValueError: other shapes.
    """
    found = dict(zip(MODELS, (original, unlearned, attacked), strict=True))
    if len({tuple(x.shape) for x in found.values()}) > 1 or original.dim() != 1 or len(original) < 2:
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in found.items())
        raise ValueError(f"attributions have the shapes {shapes}; expected one [neurons] of the same neurons")
    pairs = (("unlearned", "attacked"), ("original", "unlearned"), ("original", "attacked"))
    result = {
        name: {f"{a}_{b}": correlate(found[a], found[b]) for a, b in pairs}
        for name, correlate in (("pearson", pearson), ("spearman", spearman))
    }
    edges = _edges(torch.cat(list(found.values())))
    shares = {name: (torch.histogram(x.double(), edges).hist / len(x)).tolist() for name, x in found.items()}
    return result | {"histogram": {"edges": edges.tolist(), **shares}}


def pearson(x: Tensor, y: Tensor) -> float | None:
    """Pearson's correlation; None where x or y has no variation."""
    value = torch.corrcoef(torch.stack([x, y]).double())[0, 1].item()
    return value if value == value else None


def spearman(x: Tensor, y: Tensor) -> float | None:
    """Spearman's: Pearson's of the ranks, where equal values share the mean of theirs."""
    return pearson(_ranks(x), _ranks(y))


def _ranks(x: Tensor) -> Tensor:
    _, place, count = x.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count - 1) / 2)[place]


def _edges(values: Tensor) -> Tensor:
    """Of `BINS` bins: from the largest magnitude down to a millionth of it, and 0 in the two bins in the middle."""
    largest = values.abs().max().clamp(min=torch.finfo(torch.float64).tiny).item() * (1 + 1e-9)
    positive = largest * torch.logspace(-6, 0, BINS // 2, dtype=torch.float64)
    return torch.cat([-positive.flip(0), torch.zeros(1, dtype=torch.float64), positive])
