"""Influence variation: whether unlearning removed the neurons that gave the answer, or grew neurons that hide it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ssiuu_kernels import NeuronScores

KINDS = ("q", "k", "v", "qkv", "o", "gate", "up", "down")
TOP = 100  # neurons in the reported sums, as in the paper


class Influence(NamedTuple):
    """Attribution of neurons at their strongest token and in all, as means over samples; each float64 `[..., width]`.

    Attributes:
        max: mean over samples of `max_k A`.
        positive_max: mean of `max_k max(A, 0)`.
        min: mean of `min_k A`.
        sum: mean of `sum_k A`.
    """

    max: Tensor
    positive_max: Tensor
    min: Tensor
    sum: Tensor


class Variation(NamedTuple):
    """Influence variation of neurons, float32 `[..., width]`: `d_plus` (Eq. 4, erased), `d_minus` (Eq. 5, hidden)."""

    d_plus: Tensor
    d_minus: Tensor


def influence_variation(before: NeuronScores, after: NeuronScores) -> Variation:
    """D+ and D- (Eq. 2, 4, 5) of neurons from their attribution before and after unlearning.

        D+ = max(0, mean_b [ max_k A - max_k max(A', 0) ])      positive influence removed
        D- = max(0, mean_b [ min_k A - min_k A' ])              negative influence added

    Args:
        before: attribution of the original model, `[..., B, width]`, the same samples in both.
        after: attribution of the unlearned model.

    Raises:
        ValueError: stacks of different shapes, or without samples.
    """
    if before.max.shape != after.max.shape or before.max.dim() < 2 or before.max.shape[-2] == 0:
        raise ValueError(
            f"before and after have shapes {list(before.max.shape)} and {list(after.max.shape)}; "
            "expected the same [..., B, width] with at least one sample"
        )
    return _variation(mean_influence(before), mean_influence(after))


def mean_influence(scores: NeuronScores) -> Influence:
    """Means over the samples of attribution `[..., B, width]`."""
    largest, smallest, total = (part.double() for part in scores)
    return Influence(largest.mean(-2), largest.clamp(min=0).mean(-2), smallest.mean(-2), total.mean(-2))


def _variation(before: Influence, after: Influence) -> Variation:
    # The mean is linear, so only the means over samples have to be kept of either model.
    d_plus = (before.max - after.positive_max).clamp(min=0)
    d_minus = (before.min - after.min).clamp(min=0)
    return Variation(d_plus.float(), d_minus.float())


def variation_by_kind(before: Mapping[str, Influence], after: Mapping[str, Influence]) -> dict[str, Variation]:
    """kind -> `Variation` of `[layers, width]`, from what `measure_influence` found in the two models.

    Raises:
        ValueError: models of different shapes.
    """
    shapes = [{kind: tuple(found[kind].max.shape) for kind in found} for found in (before, after)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"before and after are models of different shapes, {shapes[0]} and {shapes[1]}")
    return {kind: _variation(before[kind], after[kind]) for kind in before}


def summarise(variations: Mapping[str, Variation], top: int = TOP) -> dict:
    """Sum of D+ and of D- over their `top` neurons (all together, and by kind), and means of each module's `top`.

    Args:
        variations: kind -> `Variation` of `[layers, width]`.

    Returns:
        {"top": int, "sum": {"d_plus", "d_minus"}, "sum_by_kind": {kind: {"d_plus", "d_minus"}},
        "mean_top": {"d_plus": {kind: [layers]}, "d_minus": {kind: [layers]}}}
    """

    def largest(x: Tensor) -> Tensor:
        return x.double().topk(min(top, x.shape[-1])).values

    sums, means = {}, {}
    by_kind = {kind: {} for kind in variations}
    for name in Variation._fields:
        scores = {kind: getattr(variation, name) for kind, variation in variations.items()}
        sums[name] = largest(torch.cat([x.flatten() for x in scores.values()])).sum().item()
        means[name] = {kind: largest(x).mean(-1).tolist() for kind, x in scores.items()}
        for kind, x in scores.items():
            by_kind[kind][name] = largest(x.flatten()).sum().item()
    return {"top": top, "sum": sums, "sum_by_kind": by_kind, "mean_top": means}
