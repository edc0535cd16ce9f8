"""Spurious-neuron ablation: does a fact come back when the neurons that grew to hide it are taken away?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data.facts import Fact
from ..evaluation.protocol import Protocol
from ..models.layers import neuron_places
from .influence import Variation

COUNTS = (10, 100, 1000)
Neurons = dict[str, Tensor]  # kind -> int64 [n], places in the flattened [layers, width]


def ablation(
    model: PreTrainedModel,
    protocol: Protocol,
    facts: Sequence[Fact],
    variations: Mapping[str, Variation],
    *,
    counts: Sequence[int] = COUNTS,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> dict:
    """Scores of facts with the neurons of largest D- at zero, and, as a control, with as many random ones at zero.

    Where knowledge was hidden, zeroing the neurons that hide it brings it back, and zeroing random ones does not.

    Args:
        model: the unlearned model, patched or not.
        protocol: how its facts are asked and scored.
        variations: kind -> `Variation` of `[layers, width]`, as `variation_by_kind` gives for this model.
        counts: how many neurons, over all kinds together; fewer where fewer have a D- above 0.
        seed: of the random neurons.
        progress: called with the number of facts scored since the last call, `(1 + 2 len(counts)) len(facts)` in all.

    Returns:
        {"none": scores, "ablated": [{"count", "hidden": scores, "random": scores}, ...]}, where scores are
        {"neurons", "score", "probability", "margin"}: neurons set to zero and `FactScores.means`.

    Raises:
        ValueError: a count below 1; variations of another model.
    """
    if not counts or min(counts) < 1:
        raise ValueError(f"counts={list(counts)}; expected numbers of neurons, each at least 1")

    def scores(neurons: Neurons) -> dict[str, float]:
        with zeroed(model, neurons):
            means = protocol.score(model, facts, progress=progress).means()
        return {"neurons": sum(map(len, neurons.values())), **means}

    _check_places(model, variations)
    found = {"none": scores({}), "ablated": []}
    for count in counts:
        hidden = hidden_most(variations, count)
        random = random_neurons(variations, hidden, seed)
        found["ablated"].append({"count": count, "hidden": scores(hidden), "random": scores(random)})
    return found


def hidden_most(variations: Mapping[str, Variation], count: int) -> Neurons:
    """The neurons with the largest D- over all kinds; those without any are never among them."""
    sizes = [variation.d_minus.numel() for variation in variations.values()]
    scores = torch.cat([variation.d_minus.flatten() for variation in variations.values()])
    top = scores.topk(min(count, int((scores > 0).sum()))).indices
    starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
    return {
        kind: top[(top >= start) & (top < start + size)] - start
        for kind, start, size in zip(variations, starts, sizes, strict=False)
    }


def random_neurons(variations: Mapping[str, Variation], other_than: Neurons, seed: int) -> Neurons:
    """As many random neurons of each kind, none of them among `other_than`; fewer where no more are left."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for kind, chosen in other_than.items():
        order = torch.randperm(variations[kind].d_minus.numel(), generator=generator)
        found[kind] = order[~torch.isin(order, chosen)][: len(chosen)]
    return found


@contextmanager
def zeroed(model: nn.Module, neurons: Neurons) -> Iterator[None]:
    """The outputs of these neurons are 0 inside.

    Args:
        model: patched or not; its kinds, layers and widths are those that the neurons were chosen from.
    """
    places, handles = neuron_places(model), []
    try:
        for kind, chosen in neurons.items():
            layers = chosen // places[kind][0].width
            for layer in layers.unique().tolist():
                module, start, width = places[kind][layer]
                columns = start + chosen[layers == layer] % width
                handles.append(module.register_forward_hook(_zero(columns)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _zero(columns: Tensor) -> Callable:
    return lambda _module, _inputs, output: output.index_fill(-1, columns.to(output.device), 0)


def _check_places(model: nn.Module, variations: Mapping[str, Variation]) -> None:
    shapes = {kind: (len(places), places[0].width) for kind, places in neuron_places(model).items()}
    given = {kind: tuple(variation.d_minus.shape) for kind, variation in variations.items()}
    if not given.items() <= shapes.items():
        raise ValueError(
            f"variations have layers and widths {given}, and the model {shapes}; expected those of the model"
        )
