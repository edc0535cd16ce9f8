"""Diagnosis of finished runs: what unlearning did to the neurons and states of their models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ssiuu_kernels.attribution.targets import check_attribution_target

from ..analysis.ablation import COUNTS
from ..analysis.diagnosis import DiagnosedModel, ablation_of, cka_of, influence_of, lens_of
from ..analysis.similarity import drawn_facts
from ..data.facts import Fact
from ..evaluation.protocol import Protocol
from ..models.load import load_model
from ..options import DIAGNOSIS_PARTS, DiagnoseOptions, ModelOptions, ProtocolOptions, recorded_model, recorded_protocol
from ..progress import job
from ..runs.folder import Run

# What each part reads of a model, the original one and the unlearned one; what takes longest comes last.
READS = {"lens": "lens", "cka": "states", "influence": "influence"}


def diagnose_runs(run_dirs: Iterable[str | Path], options: DiagnoseOptions | None = None) -> list[dict]:
    """Diagnose finished runs; writes diagnosis.json and, for the part influence, diagnosis.safetensors.

    A part that is there already, made with the same options, is not measured again. One model is in memory at a time,
    and runs that share a base model and their sets share what is measured in it.

    Args:
        run_dirs: run folders.
        options: the defaults where None.

    Returns:
        For each run what its diagnosis.json holds, part by part, each with the "options" that it was made with:
        "influence" (`influence_of`), "lens" (`lens_of`), "ablation" (`ablation_of`) and "cka" (`cka_of`).

    Raises:
        ValueError: a folder without a finished run, or one that another process diagnoses; options out of range; facts
            or a model that a part cannot take.
        OSError: a run folder that cannot be written to, before any work.
    """
    options = options or DiagnoseOptions()
    options.check()
    check_attribution_target(options.target)
    runs = [Run.open(path) for path in run_dirs]
    tasks = list({run.path.resolve(): _Task(run, _Sets.of(run), _pending(run, options)) for run in runs}.values())
    with ExitStack() as held:
        for task in tasks:
            held.enter_context(task.run.work("diagnose"))
        originals: dict[_Sets, DiagnosedModel] = {}
        needs = {sets: _needs(sets, tasks) for sets in dict.fromkeys(task.sets for task in tasks)}
        total = sum(_amount(sets, parts, options) for sets, parts in needs.items())
        total += sum(_amount(task.sets, task.pending, options) for task in tasks)
        bar = held.enter_context(job("diagnose", total))
        for task in tasks:
            if task.sets not in originals and needs[task.sets]:
                originals[task.sets] = _original(task.sets, needs[task.sets], options, bar.advance)
            if task.pending:
                _diagnose(task, originals.get(task.sets), options, bar.advance)
    return [run.diagnosis() for run in runs]


class _Sets(NamedTuple):
    """The facts of runs, and all else that what is measured in their original model depends on."""

    base: ModelOptions
    asked: ProtocolOptions
    forget: tuple[Fact, ...]
    retain: tuple[Fact, ...]

    @classmethod
    def of(cls, run: Run) -> _Sets:
        config, split = run.read("config.json"), run.split()
        return cls(recorded_model(config), recorded_protocol(config), tuple(split.forget), tuple(split.retain))

    def model(
        self,
        options: DiagnoseOptions,
        advance: Callable[[float], None],
        original: DiagnosedModel | None = None,
        **changes: Any,
    ) -> DiagnosedModel:
        """The original model, or with changes of its options another."""
        loaded = replace(self.base, **changes)
        net, tokenizer = load_model(loaded.model, **loaded.loading())
        return DiagnosedModel(
            net, Protocol.of(self.asked, net, tokenizer), self.forget, self.retain,
            options.target, options.seed, options.batch_size, options.backend, advance, original,
        )  # fmt: skip


class _Task(NamedTuple):
    """A run, and the parts to measure, each with the options that its result depends on."""

    run: Run
    sets: _Sets
    pending: Mapping[str, dict[str, Any]]


def _pending(run: Run, options: DiagnoseOptions) -> dict[str, dict[str, Any]]:
    made = {
        "influence": {"target": options.target},
        "lens": {"seed": options.seed},
        "ablation": {"target": options.target, "neurons": _counts(options), "seed": options.seed},
        "cka": {},
    }
    chosen = set(options.part or DIAGNOSIS_PARTS)
    if "ablation" in chosen:  # it takes the neurons of largest D-
        chosen.add("influence")
    there = run.diagnosis()
    return {
        part: made[part]
        for part in DIAGNOSIS_PARTS
        if part in chosen and there.get(part, {}).get("options") != made[part]
    }


def _counts(options: DiagnoseOptions) -> list[int]:
    return list(options.neurons or COUNTS)


def _needs(sets: _Sets, tasks: Sequence[_Task]) -> list[str]:
    """The parts that read the original model of these sets, in the order of `READS`."""
    pending = {part for task in tasks if task.sets == sets for part in task.pending}
    return [part for part in READS if part in pending]


def _amount(sets: _Sets, parts: Iterable[str], options: DiagnoseOptions) -> int:
    """Facts to pass through a model for these parts."""
    forget = len(sets.forget)
    amounts = {
        "influence": forget,
        "lens": forget,
        "ablation": (1 + 2 * len(_counts(options))) * forget,
        "cka": len(drawn_facts(sets.forget)) + len(drawn_facts(sets.retain)),
    }
    return sum(amounts[part] for part in parts)


def _original(
    sets: _Sets, parts: Sequence[str], options: DiagnoseOptions, advance: Callable[[float], None]
) -> DiagnosedModel:
    found = sets.model(options, advance)
    for part in parts:
        with _named(part):
            getattr(found, READS[part])
    found.model = None
    return found


def _diagnose(
    task: _Task, before: DiagnosedModel | None, options: DiagnoseOptions, advance: Callable[[float], None]
) -> None:
    run = task.run
    after = task.sets.model(options, advance, before, model=str(run.model), revision=None)
    for part, made in task.pending.items():
        tensors = None
        with _named(part):
            if part == "influence":
                result, variations = influence_of(before, after)
                tensors = {f"{name}.{kind}": getattr(v, name) for kind, v in variations.items() for name in v._fields}
            elif part == "lens":
                result = lens_of(before, after)
            elif part == "ablation":
                result = ablation_of(after, run.variations(), made["neurons"], made["seed"])
            else:
                result = cka_of(before, after)
        run.write_diagnosis(part, {"options": made, **result}, tensors)


@contextmanager
def _named(part: str) -> Iterator[None]:
    """Refusals inside say which part it is that can be left out."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"part {part!r} of the diagnosis: {error}; choose others with --part") from error
