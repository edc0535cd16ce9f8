"""Influence variation: whether unlearning removed the neurons that gave the answer, or grew neurons that hide it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

import ssiuu_kernels as sk
from ssiuu_kernels import NeuronScores

KINDS = ("q", "k", "v", "o", "gate", "up", "down")
TOP = 100  # neurons in the reported sums, as in the paper


class Influence(NamedTuple):
    """Attribution of neurons at their strongest token, as means over samples; each float64 `[..., width]`.

    Attributes:
        max: mean over samples of `max_k A`.
        positive_max: mean of `max_k max(A, 0)`.
        min: mean of `min_k A`.
    """

    max: Tensor
    positive_max: Tensor
    min: Tensor


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
    return _variation(_mean_influence(before), _mean_influence(after))


def _mean_influence(scores: NeuronScores) -> Influence:
    largest, smallest = scores.max.double(), scores.min.double()
    return Influence(largest.mean(-2), largest.clamp(min=0).mean(-2), smallest.mean(-2))


def _variation(before: Influence, after: Influence) -> Variation:
    # The mean is linear, so the means over samples are all that has to be kept of either model.
    d_plus = (before.max - after.positive_max).clamp(min=0)
    d_minus = (before.min - after.min).clamp(min=0)
    return Variation(d_plus.float(), d_minus.float())


def measure_influence(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    target: str = "prob",
    backend: str = "auto",
    progress: Callable[[int], None] | None = None,
) -> dict[str, Influence]:
    """The influence of every neuron of Q, K, V, O, gate, up and down over a set of samples, batch by batch.

    Memory is one batch's attribution and three vectors a module, whatever the number of samples.

    Args:
        model: a Hugging Face causal language model with gated MLPs, not patched; it is run in eval mode, and left so.
        batches: as for `PatchHandle.attribute`: input_ids, labels, attention_mask, each `[B, S]`, on any device.
        target: the quantity attributed; the paper's is "prob".
        backend: backend of the kernels.
        progress: called after every batch with its number of samples.

    Returns:
        kind -> `Influence` of `[layers, width]` on the CPU, for the kinds that the model has.

    Raises:
        ValueError: no batches, a model without gated MLPs or with layers of different widths, or attribution that is
            not finite.
    """
    totals: dict[tuple[str, str], Influence] = {}
    samples = 0
    model.eval()
    with sk.patch(model, scope="all", backend=backend, strict=True) as handle:
        for batch in batches:
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            size = len(batch["labels"])
            for name, kinds in handle.attribute(batch, target=target).items():
                for kind, scores in kinds.items():
                    part = Influence(*(mean * size for mean in _mean_influence(scores)))
                    old = totals.get((name, kind))
                    totals[name, kind] = part if old is None else Influence(*map(torch.add, old, part))
            samples += size
            if progress is not None:
                progress(size)
    if samples == 0:
        raise ValueError("batches is empty; expected at least one batch of forget samples")
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    layers: dict[str, list[Influence]] = {}
    for name, kind in sorted(totals, key=lambda key: order[key[0]]):
        means = Influence(*(total.cpu() / samples for total in totals[name, kind]))
        layers.setdefault("up" if kind == "h" else kind, []).append(means)  # up * dup = h * dh
    return {kind: _stack(kind, layers[kind]) for kind in KINDS if kind in layers}


def _stack(kind: str, layers: list[Influence]) -> Influence:
    widths = {layer.max.numel() for layer in layers}
    if len(widths) > 1:
        raise ValueError(f"{kind} has layers of widths {sorted(widths)}; expected layers of one width")
    stacked = Influence(*map(torch.stack, zip(*layers, strict=True)))
    if not all(part.isfinite().all() for part in stacked):
        raise ValueError(f"attribution of {kind} is not finite; expected a model whose probabilities are numbers")
    return stacked


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
