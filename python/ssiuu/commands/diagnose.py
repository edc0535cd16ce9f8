"""Influence variation of finished runs over their forget sets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from ..analysis.influence import Influence, summarise, variation_by_kind
from ..analysis.measure import measure_influence
from ..data.facts import Fact
from ..data.prompts import PromptFormat
from ..models.load import load_model, position_limit
from ..progress import job
from ..runs.folder import Run


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
        batch_size: samples per forward and backward.
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
        """Influence in the model of this name, and the seconds that it took, without loading."""
        model, tokenizer = load_model(name, dtype=self.dtype, trust_remote_code=self.trust_remote_code)
        prompts = PromptFormat(tokenizer, self.shots, position_limit(model))
        encoded = prompts.encode_facts(self.facts)
        batches = (prompts.collate(encoded[i : i + batch_size]) for i in range(0, len(encoded), batch_size))
        start = time.perf_counter()
        found = measure_influence(model, batches, target=target, backend=backend, progress=progress)
        return found, time.perf_counter() - start
