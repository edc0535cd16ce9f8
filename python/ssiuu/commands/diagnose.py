"""Diagnosis of finished runs: what unlearning did to the neurons and states of their models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ssiuu_kernels.attribution.targets import check_attribution_target

from ..analysis.ablation import COUNTS
from ..analysis.diagnosis import DiagnosedModel, ablation_of, cka_of, drift_of, influence_of, lens_of
from ..analysis.similarity import drawn_facts
from ..attacks.attack import Attack
from ..attacks.attacked import Attacked
from ..attacks.execute import execute, length
from ..data.facts import Fact
from ..evaluation.protocol import Protocol
from ..models.load import load_model
from ..options import DIAGNOSIS_PARTS, DiagnoseOptions, ModelOptions, ProtocolOptions, recorded_model, recorded_protocol
from ..progress import Job, job
from ..runs.folder import Run
from ..training.trainer import refuse_launchers

# What each part reads of the original model and of the unlearned one; what takes longest comes last.
READS = {"lens": "lens", "cka": "states", "influence": "influence", "drift": "influence"}


def diagnose_runs(run_dirs: Iterable[str | Path], options: DiagnoseOptions | None = None) -> list[dict]:
    """Diagnose finished runs; writes diagnosis.json and, for the part influence, diagnosis.safetensors.

    A part that is there already, made with the same options, is not measured again. One model is in memory at a time,
    and runs that share a base model and their sets share what is measured in it.

    Args:
        run_dirs: run folders.
        options: the defaults where None.

    Returns:
        For each run what its diagnosis.json holds, part by part, each with the "options" that it was made with:
        "influence" (`influence_of`), "lens" (`lens_of`), "ablation" (`ablation_of`), "cka" (`cka_of`) and "drift"
        (`drift_of`).

    Raises:
        ValueError: a folder without a finished run, or one that another process diagnoses; options out of range; no
            attack that drift could repeat; facts or a model that a part cannot take.
        OSError: a run folder that cannot be written to, before any work.
    """
    options = options or DiagnoseOptions()
    options.check()
    check_attribution_target(options.target)
    runs = [Run.open(path) for path in run_dirs]
    tasks = list({run.path.resolve(): _Task.of(run, options) for run in runs}.values())
    needs = {task.sets: _needs(task.sets, tasks) for task in tasks}
    with ExitStack() as held:
        for task in tasks:
            held.enter_context(task.run.work("diagnose"))
        amounts = [_amount(sets, parts, options) for sets, parts in needs.items()]
        amounts += [_amount(task.sets, task.pending, options, task.attack) for task in tasks]
        bar = held.enter_context(job("diagnose", sum(amounts)))
        originals = {}
        for task in tasks:
            if task.sets not in originals:
                originals[task.sets] = _original(task.sets, needs[task.sets], options, bar)
            if task.pending:
                _diagnose(task, originals[task.sets], options, bar)
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

    def load(self, **changes: Any) -> tuple[Any, Protocol]:
        """The original model, or with changes of its options another, and how its facts are asked."""
        loaded = replace(self.base, **changes)
        model, tokenizer = load_model(loaded.model, **loaded.loading())
        return model, Protocol.of(self.asked, model, tokenizer)


class _Task(NamedTuple):
    """A run, and the parts to measure, each with the options that its result depends on.

    Attributes:
        attack: that drift repeats.
    """

    run: Run
    sets: _Sets
    pending: Mapping[str, dict[str, Any]]
    attack: Attack | None

    @classmethod
    def of(cls, run: Run, options: DiagnoseOptions) -> _Task:
        chosen = set(options.part or set(DIAGNOSIS_PARTS) - {"drift"})
        if "ablation" in chosen:  # it takes the neurons of largest D-
            chosen.add("influence")
        attack = _repeated(run, options.attack) if "drift" in chosen else None
        made = {
            "influence": {"target": options.target},
            "lens": {"seed": options.seed},
            "ablation": {"target": options.target, "neurons": _counts(options), "seed": options.seed},
            "cka": {},
            "drift": attack and {"target": options.target, "attack": attack.name, "attack_options": attack.options},
        }
        there = run.diagnosis()
        pending = {
            part: made[part]
            for part in DIAGNOSIS_PARTS
            if part in chosen and there.get(part, {}).get("options") != made[part]
        }
        return cls(run, _Sets.of(run), pending, attack if "drift" in pending else None)


def _counts(options: DiagnoseOptions) -> list[int]:
    return list(options.neurons or COUNTS)


def _repeated(run: Run, name: str | None) -> Attack:
    """The attack of this name, or the harmful one of the smallest fraction and the largest learning rate."""
    refuse_launchers()
    names = [name] if name else sorted(file.stem for file in run.attacks.glob("harmful-*.json"))
    if not names:
        raise ValueError(
            f"part 'drift' repeats an attack, and {run.path} has no harmful one; run `ssiuu attack` first, or name "
            "another with --attack"
        )
    found = []
    for each in names:
        try:
            found.append(Attack.recorded(run.read(f"attacks/{each}.json")))
        except ValueError as error:
            raise ValueError(f"part 'drift' cannot repeat the attack {each} of {run.path}: {error}") from None
    found = [attack for attack in found if attack.what.trains and attack.tuning == "full"]
    if not found:
        raise ValueError(
            f"part 'drift' cannot repeat {', '.join(names)} of {run.path}; expected an attack that trains all "
            "parameters, as attribution needs plain weights"
        )
    return min(found, key=lambda attack: (attack.fraction or 0, -attack.learning_rate, attack.seed))


def _needs(sets: _Sets, tasks: Sequence[_Task]) -> list[str]:
    """The parts that read the original model of these sets, in the order of `READS`."""
    pending = {part for task in tasks if task.sets == sets for part in task.pending}
    return [part for part in READS if part in pending]


def _amount(sets: _Sets, parts: Iterable[str], options: DiagnoseOptions, attack: Attack | None = None) -> int:
    """Facts to pass through one model for these parts, and the steps of an attack and facts to pass after it."""
    forget = len(sets.forget)
    states = len(drawn_facts(sets.forget)) + len(drawn_facts(sets.retain))
    amounts = {"influence": forget, "lens": forget, "states": states}
    found = sum(amounts[read] for read in {READS[part] for part in parts if part in READS})
    found += (1 + 2 * len(_counts(options))) * forget * ("ablation" in parts)
    return found + (length([attack]) + forget if attack else 0)


def _original(sets: _Sets, parts: Sequence[str], options: DiagnoseOptions, bar: Job) -> DiagnosedModel | None:
    if not parts:
        return None
    found = _diagnosed(sets, sets.load(), options, bar)
    for part in parts:
        with _named(part):
            found.measure(READS[part])
    found.model = None
    return found


def _diagnosed(
    sets: _Sets,
    loaded: tuple[Any, Protocol],
    options: DiagnoseOptions,
    bar: Job,
    original: DiagnosedModel | None = None,
) -> DiagnosedModel:
    return DiagnosedModel(
        *loaded, sets.forget, sets.retain, options.target, options.seed, options.batch_size, options.backend,
        bar.advance, original,
    )  # fmt: skip


def _diagnose(task: _Task, before: DiagnosedModel | None, options: DiagnoseOptions, bar: Job) -> None:
    run, sets = task.run, task.sets
    after = _diagnosed(sets, sets.load(model=str(run.model), revision=None), options, bar, before)
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
            elif part == "cka":
                result = cka_of(before, after)
            else:
                after.measure("influence")
                after.model = None  # makes room for the attacked one
                attacked = _diagnosed(sets, _attacked(task, bar), options, bar, before)
                result = drift_of(before, after, attacked)
        run.write_diagnosis(part, {"options": made, **result}, tensors)


def _attacked(task: _Task, bar: Job) -> tuple[Any, Protocol]:
    """The model after the task's attack, which is made again: attacks keep no model."""
    loaded = []

    def load(**changes: Any) -> tuple[Any, Protocol]:
        loaded[:] = [task.sets.load(model=str(task.run.model), revision=None, dtype="float32", **changes)]
        return loaded[0]

    for _ in execute([task.attack], Attacked(load, task.sets.forget), bar):
        pass
    return loaded[0]


@contextmanager
def _named(part: str) -> Iterator[None]:
    """Refusals inside say which part it is that can be left out."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"part {part!r} of the diagnosis: {error}; choose others with --part") from error
