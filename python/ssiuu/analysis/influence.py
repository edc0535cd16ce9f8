"""Influence variation: whether unlearning removed the neurons that gave the answer, or grew neurons that hide it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import ssiuu_kernels as sk
from ssiuu_kernels import NeuronScores

from ..data.facts import Fact
from ..data.prompts import PromptFormat
from ..models.load import load_model, position_limit
from ..progress import job
from ..runs.folder import Run

KINDS = ("q", "k", "v", "qkv", "o", "gate", "up", "down")
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
    """The influence of every neuron of Q, K, V (or QKV), O, gate, up and down over a set of samples, batch by batch.

    Memory is one batch's attribution and three vectors a module, whatever the number of samples.

    Args:
        model: a Hugging Face causal language model, not patched; it is run in eval mode, and left so.
        batches: as for `PatchHandle.attribute`: input_ids, labels, attention_mask, each `[B, S]`, on any device.
        target: the quantity attributed; the paper's is "prob".
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


def diagnose_run(run_dir: str | Path, **options) -> dict:
    """Diagnose one run; see `diagnose_runs`."""
    return diagnose_runs([run_dir], **options)[0]


def diagnose_runs(
    run_dirs: Iterable[str | Path],
    *,
    batch_size: int = 8,
    target: str = "prob",
    backend: str = "auto",
) -> list[dict]:
    """Influence variation over the forget set of finished runs; writes diagnosis.json and diagnosis.safetensors.

    One model is in memory at a time, and runs that share a base model and a forget set share its attribution.

    Args:
        run_dirs: run folders.
        batch_size: samples a forward and backward.
        target: as in `measure_influence`.
        backend: backend of the kernels.

    Returns:
        What was written to each diagnosis.json: `summarise`, "samples", "target", and "seconds" {"before", "after"}.

    Raises:
        ValueError: a folder without a finished run, or one that another process diagnoses; batch_size below 1, an
            unknown target or backend, or see `measure_influence`.
        OSError: a run folder that cannot be written to, before any work.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; expected at least 1")
    runs = [Run.open(path) for path in run_dirs]
    samples = [_Samples.of(run) for run in runs]
    summaries, originals = [], {}
    with ExitStack() as held, job("diagnose", sum(len(s.facts) for s in [*samples, *set(samples)])) as bar:
        for run in dict.fromkeys(run.path.resolve() for run in runs):
            held.enter_context(Run(run).work("diagnose"))
        for run, sample in zip(runs, samples, strict=True):
            if sample not in originals:
                originals[sample] = sample.measure(sample.model, batch_size, target, backend, bar.advance)
            before, seconds_before = originals[sample]
            after, seconds = sample.measure(run.model, batch_size, target, backend, bar.advance)
            variations = variation_by_kind(before, after)
            summary = summarise(variations) | {
                "samples": len(sample.facts),
                "target": target,
                "seconds": {"before": seconds_before, "after": seconds},
            }
            tensors = {f"{name}.{kind}": getattr(v, name) for kind, v in variations.items() for name in v._fields}
            run.write_diagnosis(summary, tensors)
            summaries.append(summary)
    return summaries


class _Samples(NamedTuple):
    """A run's forget samples, and all that the attribution of its original model depends on."""

    model: str
    dtype: str
    trust_remote_code: bool
    shots: int
    facts: tuple[Fact, ...]

    @classmethod
    def of(cls, run: Run) -> _Samples:
        config = run.read("config.json")
        trust = config.get("trust_remote_code", False)
        return cls(config["model"], config["dtype"], trust, config["shots"], tuple(run.split().forget))

    def measure(
        self, name: str | Path, batch_size: int, target: str, backend: str, progress: Callable[[int], None]
    ) -> tuple[dict[str, Influence], float]:
        """Influence in the model of this name, and the seconds that it took, loading aside."""
        model, tokenizer = load_model(name, dtype=self.dtype, trust_remote_code=self.trust_remote_code)
        prompts = PromptFormat(tokenizer, self.shots, position_limit(model))
        encoded = prompts.encode_facts(self.facts)
        batches = (prompts.collate(encoded[i : i + batch_size]) for i in range(0, len(encoded), batch_size))
        start = time.perf_counter()
        found = measure_influence(model, batches, target=target, backend=backend, progress=progress)
        return found, time.perf_counter() - start
