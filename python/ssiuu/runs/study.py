"""Study files: which models, methods, regularizers, seeds, attacks and diagnosis are run together."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from ..arguments import Argument, fields_of, read_yaml
from ..attacks.attack import Attack
from ..attacks.grid import grid_of
from ..options import (
    OPTION_NAMES,
    AttackOptions,
    DiagnoseOptions,
    FinetuneOptions,
    ModelOptions,
    ProtocolOptions,
    UnlearnOptions,
    replacing_sets,
)
from ..pairs import make, option_owners, resolve

SHIPPED = resources.files("ssiuu") / "studies"
NAME = re.compile(r"(?!taught|results|study)[A-Za-z0-9][\w.+=-]*")  # these are in a study's folder beside the cells
MODEL_NAMES = [argument.name for argument in fields_of(ModelOptions)]
PROTOCOL_NAMES = [argument.name for argument in fields_of(ProtocolOptions)]
RUN_OPTIONS = [argument for argument in fields_of(UnlearnOptions) if argument.name not in ("seed", "settings")]


@dataclass(frozen=True)
class Match:
    """How a control is made comparable to another cell of the same seed and model.

    Attributes:
        steps: cell whose number of steps this one is to need for its stop; its learning rate is searched for.
        distance: cell at whose final distance (L2) from the original weights this one is to end.
        tolerance: of steps, as a share of their number; at least the steps between two evaluations.
        trials: learning rates that are tried at most.
    """

    steps: str | None = None
    distance: str | None = None
    tolerance: float = 0.05
    trials: int = 10

    @property
    def cell(self) -> str:
        """The other cell."""
        return self.steps or self.distance

    def check(self) -> None:
        """Raise a ValueError for options out of range."""
        if (self.steps is None) == (self.distance is None):
            raise ValueError("match needs the name of one cell, as steps or as distance")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance={self.tolerance}; expected a share of the steps, in [0, 1)")
        if self.trials < 1:
            raise ValueError(f"trials={self.trials}; expected at least 1")


@dataclass(frozen=True)
class Cell:
    """One candidate: a method with a regularizer and their settings, on one model.

    Attributes:
        name: of its folder; with `models`, the model's name and a slash come first.
        model: name among `models`; "" where the study has none.
        values: options of its runs by name, without the seed.
        match: None where it is not matched to another cell.
    """

    name: str
    model: str
    values: Mapping[str, Any]
    match: Match | None = None

    def options(self, seed: int, **changes: Any) -> UnlearnOptions:
        """Of the run of a seed."""
        return UnlearnOptions.of({**self.values, "seed": seed, **replacing_sets(changes)})


@dataclass(frozen=True)
class StudyFile:
    """What a study file holds.

    Attributes:
        base: options of every run, named as in `ssiuu unlearn --config`. An option of a method or regularizer goes to
            the cells that have it.
        models: name -> options over `base`, of several models; all cells run on each.
        teach: options of `ssiuu finetune`, which makes the model of the runs once, from `model` of the base. Its facts
            and how they are asked are the base's where it does not say, and the runs' facts are those that were taught.
        seeds: of the runs; they draw the sets of facts too, so all cells of a seed share them.
        cells: name -> method, regularizer and their settings over `base`, and `match` (see `Match`).
        attacks: options of `ssiuu attack`, each entry a grid.
        diagnose: options of `ssiuu diagnose`; left out, nothing is diagnosed.
        baseline: cell that the others are compared with, seed by seed.
        keep_models: keep the unlearned models once a cell is attacked and diagnosed.
    """

    cells: dict[str, dict[str, Any]]
    seeds: list[int]
    base: dict[str, Any] = field(default_factory=dict)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    teach: dict[str, Any] | None = None
    attacks: list[dict[str, Any]] = field(default_factory=list)
    diagnose: dict[str, Any] | None = None
    baseline: str | None = None
    keep_models: bool = True


@dataclass(frozen=True)
class Study:
    """A study file, checked.

    Attributes:
        file: where it was read from.
        given: what it holds.
        cells: name -> cell, of all models.
        attacks: of every cell.
        diagnosis: None where there is none.
        taught: name among `models` -> how its model is taught; empty where none is.
    """

    file: Path
    given: StudyFile
    cells: Mapping[str, Cell]
    attacks: Sequence[Attack]
    diagnosis: DiagnoseOptions | None
    taught: Mapping[str, FinetuneOptions]

    @property
    def name(self) -> str:
        """Of the file."""
        return self.file.stem

    def baseline_of(self, cell: Cell) -> Cell | None:
        """The cell that this one is compared with; None for the baseline itself."""
        if self.given.baseline is None:
            return None
        baseline = self.cells[_full_name(cell.model, self.given.baseline)]
        return None if baseline is cell else baseline


def shipped_studies() -> list[str]:
    """Names of the study files in the package."""
    return sorted(file.name.removesuffix(".yaml") for file in SHIPPED.iterdir() if file.name.endswith(".yaml"))


def find_study(name: str | Path) -> Path:
    """The path of a study file: of one that exists, or of a shipped one, as "small", "small.yaml" or
    "studies/small.yaml".

    Raises:
        FileNotFoundError: neither; the message lists the shipped ones.
    """
    path = Path(name)
    if path.is_file():
        return path
    short = path.name.removesuffix(".yaml")
    if str(path.parent) in (".", "studies") and short in shipped_studies():
        return Path(str(SHIPPED / f"{short}.yaml"))
    raise FileNotFoundError(
        f"{name} does not exist; expected a study file, or the name of a shipped one: {', '.join(shipped_studies())}"
    )


def read_study(file: Path) -> Study:
    """Read a study file and check all that can be checked without a model or data.

    Raises:
        OSError: it cannot be read.
        ValueError: no YAML, an unknown name or a value of another type or out of range, no cells or seeds, or a match
            that names no cell or goes round in a circle; the message says where.
    """
    with _naming(f"{file}"):
        values = _read(read_yaml(file), fields_of(StudyFile), "the key of a study file")
        for name in ("cells", "seeds"):
            if not values.get(name):
                raise ValueError(f"the study has no {name}; expected at least one")
        given = StudyFile(**values)
        if len(set(given.seeds)) < len(given.seeds):
            raise ValueError(f"seeds={given.seeds} has a seed twice; expected each once")
        models = {name: _checked_name(name, "model") for name in given.models} or [""]
        cells = {cell.name: cell for model in models for cell in _cells(given, model)}
        _check_base(given)
        _check_matches(cells)
        if given.baseline is not None and given.baseline not in given.cells:
            raise ValueError(f"baseline={given.baseline!r} is not a cell; expected one of {', '.join(given.cells)}")
        attacks, diagnosis = _attacks(given.attacks), _diagnosis(given.diagnose)
        taught = {model: _teaching(given, model) for model in models} if given.teach is not None else {}
    return Study(file, given, cells, attacks, diagnosis, taught)


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Puts the place before what a ValueError inside says."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _read(values: Mapping[str, Any], known: Iterable[Argument], what: str) -> dict[str, Any]:
    """The values, if each has a known name and a value of its type."""
    arguments = {argument.name: argument for argument in known}
    for name in values:
        if name not in arguments:
            near = difflib.get_close_matches(str(name), arguments, 1, cutoff=0.7)
            hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(arguments)}"
            raise ValueError(f"{name} is not {what}; {hint}")
    return {name: arguments[name].check(value, name, strict=True) for name, value in values.items()}


def _checked_name(name: str, what: str) -> str:
    if not NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} cannot be the name of a {what}, which is a folder; expected letters, digits and . _ + = -, and "
            "none that begins with taught, results or study"
        )
    return name


def _full_name(model: str, cell: str) -> str:
    return f"{model}/{cell}" if model else cell


def _cells(given: StudyFile, model: str) -> Iterator[Cell]:
    over = _read(given.models.get(model, {}), RUN_OPTIONS, f"an option of every run, as the model {model} needs")
    for name, stated in given.cells.items():
        with _naming(f"cell {_checked_name(name, 'cell')}"):
            own = dict(stated)
            match = _match(own.pop("match"), model) if "match" in own else None
            chosen = {**given.base, **over, **own}
            names = (chosen.get(kind, getattr(UnlearnOptions, kind)) for kind in ("method", "regularizer"))
            kinds = resolve(*map(str, names))
            settings = [argument for kind in kinds for argument in fields_of(kind.Options)]
            what = f"an option of method {kinds[0].name!r} with regularizer {kinds[1].name!r}"
            own = _read(own, [*RUN_OPTIONS, *settings], what)
            names = {*OPTION_NAMES, *(argument.name for argument in settings)}
            base = _read({n: v for n, v in given.base.items() if n in names}, [*RUN_OPTIONS, *settings], what)
            values = {"log_distance": True}
            for part in (base, over, own):
                values |= replacing_sets(part)
            cell = Cell(_full_name(model, name), model, values, match)
            options = cell.options(given.seeds[0])
            options.check()
            make(options)
            yield cell


def _match(stated: Any, model: str) -> Match:
    if not isinstance(stated, dict):
        raise ValueError(f"match={stated!r}; expected steps or distance with the name of a cell")
    match = Match(**_read(stated, fields_of(Match), "an option of match"))
    match.check()
    kind = "steps" if match.steps else "distance"
    return Match(**{**asdict(match), kind: _full_name(model, match.cell)})


def _check_base(given: StudyFile) -> None:
    """Raise a ValueError for a name in the base that no run takes."""
    owners, known = option_owners(), {argument.name for argument in RUN_OPTIONS}
    for name in given.base:
        if name not in known and name not in owners:
            _read({name: None}, RUN_OPTIONS, "an option of a run (base)")


def _check_matches(cells: Mapping[str, Cell]) -> None:
    for name, cell in cells.items():
        path = [name]
        while cell.match:
            if cell.match.cell not in cells:
                raise ValueError(
                    f"cell {path[-1]} is matched to {cell.match.cell!r}, which is not a cell; expected one of "
                    f"{', '.join(cells)}"
                )
            cell = cells[cell.match.cell]
            path.append(cell.name)
            if path.count(cell.name) > 1:
                raise ValueError(f"cells are matched in a circle: {' -> '.join(path)}; match one to a cell outside it")


def _attacks(entries: Sequence[Mapping[str, Any]]) -> list[Attack]:
    found: dict[str, Attack] = {}
    for number, entry in enumerate(entries, 1):
        with _naming(f"attack {number}"):
            options = AttackOptions(**_read(entry, fields_of(AttackOptions), "an option of an attack"))
            for attack in grid_of(options):
                attack.check()
                if attack.name in found:
                    raise ValueError(f"{attack.name} is there twice; give each attack once")
                found[attack.name] = attack
    return list(found.values())


def _diagnosis(stated: Mapping[str, Any] | None) -> DiagnoseOptions | None:
    if stated is None:
        return None
    with _naming("diagnose"):
        options = DiagnoseOptions(**_read(stated, fields_of(DiagnoseOptions), "an option of a diagnosis"))
        options.check()
    return options


def _teaching(given: StudyFile, model: str) -> FinetuneOptions:
    """The model and how it is asked are those of the runs, unless `teach` says how to ask."""
    with _naming("teach"):
        known = [argument for argument in fields_of(FinetuneOptions) if argument.name not in MODEL_NAMES]
        stated = _read(given.teach, known, "an option of teaching (the model is the base's)")
        over = replacing_sets({**given.base, **given.models.get(model, {})})
        runs = UnlearnOptions(**{name: value for name, value in over.items() if name in OPTION_NAMES})
        shared = {name: getattr(runs, name) for name in [*MODEL_NAMES, *PROTOCOL_NAMES, "facts"]}
        options = FinetuneOptions(**{**shared, **stated})
        if options.facts is None:
            raise ValueError("facts is missing; expected the source of what is taught, as the base has other sets")
        options.check()
    return options
