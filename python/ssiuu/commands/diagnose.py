"""Influence variation of finished runs over their forget sets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ..analysis.influence import Influence, summarise, variation_by_kind
from ..analysis.measure import measure_influence
from ..data.facts import Fact
from ..evaluation.protocol import Protocol
from ..models.load import load_model
from ..options import DiagnoseOptions, ModelOptions, ProtocolOptions, recorded_model, recorded_protocol
from ..progress import job
from ..runs.folder import Run


def diagnose_runs(run_dirs: Iterable[str | Path], options: DiagnoseOptions | None = None) -> list[dict]:
    """Influence variation over the forget set of finished runs; writes diagnosis.json and diagnosis.safetensors.

    One model is in memory at a time, and runs that share a base model and a forget set share its attribution.

    Args:
        run_dirs: run folders.
        options: the defaults where None.

    Returns:
        What was written to each diagnosis.json: `summarise`, "samples", "target", and "seconds" {"before", "after"}.

    Raises:
        ValueError: a folder without a finished run, or one that another process diagnoses; batch_size below 1, an
            unknown target or backend, or see `measure_influence`.
        OSError: a run folder that cannot be written to, before any work.
    """
    options = options or DiagnoseOptions()
    options.check()
    runs = [Run.open(path) for path in run_dirs]
    samples = [_Samples.of(run) for run in runs]
    summaries, originals = [], {}
    with ExitStack() as held, job("diagnose", sum(len(s.facts) for s in [*samples, *set(samples)])) as bar:
        for run in dict.fromkeys(run.path.resolve() for run in runs):
            held.enter_context(Run(run).work("diagnose"))
        for run, sample in zip(runs, samples, strict=True):
            if sample not in originals:
                originals[sample] = sample.measure(sample.base, options, bar.advance)
            before, seconds_before = originals[sample]
            after, seconds = sample.measure(sample.unlearned(run), options, bar.advance)
            variations = variation_by_kind(before, after)
            summary = summarise(variations) | {
                "samples": len(sample.facts),
                "target": options.target,
                "seconds": {"before": seconds_before, "after": seconds},
            }
            tensors = {f"{name}.{kind}": getattr(v, name) for kind, v in variations.items() for name in v._fields}
            run.write_diagnosis(summary, tensors)
            summaries.append(summary)
    return summaries


class _Samples(NamedTuple):
    """A run's forget samples, and all that the attribution of its original model depends on."""

    base: ModelOptions
    asked: ProtocolOptions
    facts: tuple[Fact, ...]

    @classmethod
    def of(cls, run: Run) -> _Samples:
        config = run.read("config.json")
        return cls(recorded_model(config), recorded_protocol(config), tuple(run.split().forget))

    def unlearned(self, run: Run) -> ModelOptions:
        """The model of the run, loaded as its base model is."""
        return replace(self.base, model=str(run.model), revision=None)

    def measure(
        self, model: ModelOptions, options: DiagnoseOptions, progress: Callable[[int], None]
    ) -> tuple[dict[str, Influence], float]:
        """Influence in this model, and the seconds that it took, without loading."""
        net, tokenizer = load_model(model.model, **model.loading())
        prompts = Protocol.of(self.asked, net, tokenizer).prompts
        encoded = prompts.encode_facts(self.facts)
        size = options.batch_size
        batches = (prompts.collate(encoded[i : i + size]) for i in range(0, len(encoded), size))
        start = time.perf_counter()
        found = measure_influence(net, batches, target=options.target, backend=options.backend, progress=progress)
        return found, time.perf_counter() - start
