"""Finished run folders as records for a report, with None for what was not run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..analysis.influence import Variation
from ..attacks.earlier import with_pool
from ..pairs import appearance
from .folder import Run

OTHER_COLORS = ("#56b4e9", "#7f6a3f", "#5e3c99", "#444444")  # of methods that are not installed here


@dataclass
class RunRecord:
    """One finished run.

    Attributes:
        path: the run folder.
        config: config.json.
        split: name of a set of facts (forget, retain, test) -> number of facts in it.
        metrics: the lines of metrics.jsonl, one per step.
        evaluation: evaluation.json, {"before": {...}, "after": {...}}; None where not run.
        attacks: attacks/*.json, in the order of kind, fraction, learning rate and seed; those of earlier versions in
            today's form.
        diagnosis: the part influence of diagnosis.json; None where not run.
        variations: kind -> `Variation` of `[layers, width]`; None where not run.
        lens, ablation, cka, drift: the other parts; None where not run.
        label: what tables and legends call the run: its method, and its folder where several share a method.
        color: of the run's method, the same in every figure and table.
        style: 0 for the first run of a colour, 1 for the second...
    """

    path: Path
    config: dict
    split: dict[str, int]
    metrics: list[dict]
    evaluation: dict | None
    attacks: list[dict]
    diagnosis: dict | None
    variations: dict[str, Variation] | None
    lens: dict | None
    ablation: dict | None
    cka: dict | None
    drift: dict | None
    label: str = field(default="")
    color: str = field(default="")
    style: int = 0

    @property
    def method(self) -> str:
        return self.config["method"]

    @property
    def steps(self) -> int | None:
        """Number of the last step; None where none was logged."""
        return self.metrics[-1]["step"] if self.metrics else None

    @property
    def seconds(self) -> float | None:
        """Of all steps, evaluation left out; None where none was logged."""
        return sum(line["seconds"] for line in self.metrics) if self.metrics else None


def read_runs(run_dirs: Iterable[str | Path]) -> list[RunRecord]:
    """Read finished runs that started from the same model.

    Raises:
        ValueError: no run, a folder that is not a finished run, a file in it that cannot be read, or runs of different
            base models.
    """
    records = [_read_run(Path(path)) for path in run_dirs]
    if not records:
        raise ValueError("run_dirs is empty; expected at least one run folder that `ssiuu unlearn` wrote")
    bases = {_base(record.config): record.path for record in records}
    if len(bases) > 1:
        described = ", ".join(f"{path} from {model}" for model, path in bases.items())
        raise ValueError(f"runs start from different models ({described}); report runs of one model together")
    shown = [appearance(record.config) for record in records]
    shared = Counter(label for label, _ in shown)
    seen: Counter[str] = Counter()
    for record, (label, color) in zip(records, shown, strict=True):
        record.label = label if shared[label] == 1 else f"{label} ({record.path.name})"
        record.color = color or OTHER_COLORS[sum(map(ord, label)) % len(OTHER_COLORS)]
        record.style = seen[record.color]
        seen[record.color] += 1
    return records


def _base(config: dict) -> str:
    model, revision = config["model"], config.get("revision")
    return model if revision is None else f"{model} at {revision}"


def _read_run(path: Path) -> RunRecord:
    run = Run.open(path)
    config, diagnosis = run.read("config.json"), run.diagnosis()
    split = {name: len(facts) for name, facts in (_read_json(path / "split.json") or {}).items()}
    attacks = [with_pool(_read_json(file), split.get("forget", 0)) for file in (path / "attacks").glob("*.json")]
    attacks.sort(key=lambda a: (a["kind"], a["fraction"] or 0, a["learning_rate"] or 0, a["seed"]))
    return RunRecord(
        path=path,
        config=config,
        split=split,
        metrics=_read_metrics(path / "metrics.jsonl"),
        evaluation=_read_json(path / "evaluation.json"),
        attacks=attacks,
        diagnosis=diagnosis.get("influence"),
        variations=run.variations() if "influence" in diagnosis else None,
        lens=diagnosis.get("lens"),
        ablation=diagnosis.get("ablation"),
        cka=diagnosis.get("cka"),
        drift=diagnosis.get("drift"),
    )


def _read_json(path: Path) -> dict | None:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); remove it and run that step again") from None


def _read_metrics(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise ValueError(f"{path} is not JSON lines ({error})") from None
