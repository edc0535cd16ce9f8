"""Attribution of every neuron of a model over a set of samples: the pass over the model that influence is made from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

import ssiuu_kernels as sk
from ssiuu_kernels import NeuronScores

from .influence import KINDS, Influence, mean_influence


def measure_influence(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    target: str = "prob",
    backend: str = "auto",
    progress: Callable[[int], None] | None = None,
) -> dict[str, Influence]:
    """The influence of every neuron of Q, K, V (or QKV), O, gate, up and down over a set of samples, batch by batch.

    Memory is one batch's attribution and four vectors per module, whatever the number of samples.

    Args:
        model: a Hugging Face causal language model, not patched; it is run in eval mode, and left so.
        batches: as for `PatchHandle.attribute`: input_ids, labels, attention_mask and, for "margin",
            other_labels, each `[B, S]`, on any device.
        target: the quantity attributed, of `ssiuu_kernels.ATTRIBUTION_TARGETS`; the paper's is "prob".
        backend: backend of the kernels.
        progress: called after every batch with its number of samples.

    Returns:
        kind -> `Influence` of `[layers, width]` on the CPU, for the kinds that the model has.

    Raises:
        ValueError: no batches, a model without MLPs that `patch` knows or with layers of different widths, or
            attribution that is not finite.
    """
    totals: dict[tuple[str, str], Influence] = {}
    samples = 0
    model.eval()
    with sk.patch(model, scope="all", backend=backend, strict=True) as handle:
        for batch in batches:
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            size = len(batch["labels"])
            for name, kinds in handle.attribute(batch, target=target).items():
                for kind, scores in _reported(kinds).items():
                    part = Influence(*(mean * size for mean in mean_influence(scores)))
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
        layers.setdefault(kind, []).append(means)
    return {kind: _stack(kind, layers[kind]) for kind in KINDS if kind in layers}


def _reported(kinds: Mapping[str, NeuronScores]) -> dict[str, NeuronScores]:
    """The kinds of a module without "h", whose scores are those of a gated MLP's up: `up * dup = h * dh`."""
    found = dict(kinds)
    h = found.pop("h", None)
    return found if h is None else {"up": h, **found}


def _stack(kind: str, layers: list[Influence]) -> Influence:
    widths = {layer.max.numel() for layer in layers}
    if len(widths) > 1:
        raise ValueError(f"{kind} has layers of widths {sorted(widths)}; expected layers of one width")
    stacked = Influence(*map(torch.stack, zip(*layers, strict=True)))
    if not all(part.isfinite().all() for part in stacked):
        raise ValueError(f"attribution of {kind} is not finite; probabilities must be finite")
    return stacked
