"""Scores of a run's model, and of the model that it started from."""

from __future__ import annotations

from pathlib import Path

from ..evaluation.protocol import Protocol
from ..evaluation.sets import evaluate_extra, evaluate_split
from ..models.load import load_model
from ..options import recorded_model
from ..runs.folder import Run


def evaluate_run(run_dir: str | Path) -> dict:
    """Evaluate a finished run's model and the model it started from on all sets, by choice and by generation.

    Further sets of the run's data (`Run.extra`) are scored too.

    Returns:
        {"before": {...}, "after": {...}}, also written to the run's evaluation.json.

    Raises:
        ValueError: no finished run, or one that another process evaluates.
        OSError: a run folder that cannot be written to, before any work.
    """
    run = Run.open(run_dir)
    config, split, extra = run.read("config.json"), run.split(), run.extra()
    base, found = recorded_model(config), {}
    with run.work("evaluate"):
        for when, name, revision in (("before", base.model, base.revision), ("after", run.model, None)):
            model, tokenizer = load_model(name, **base.loading(revision=revision))
            protocol = Protocol.of(config, model, tokenizer)
            found[when] = evaluate_split(model, protocol, split, name=f"evaluate {when}", generation=True)
            found[when] |= evaluate_extra(model, protocol, extra, name=f"further sets {when}")
        run.write("evaluation.json", found)
    return found
