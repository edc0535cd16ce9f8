"""TOFU (Maini et al., 2024): fictitious authors, in forget sets of three sizes with their retain sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .facts import Fact, FactSets, Split, check_split, load_facts
from .sources import dataset_configurations

HUB = "locuslab/TOFU"
RETAIN = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}
EXTRA = ("holdout", "real_authors", "world_facts")
SUFFIXES = (".jsonl", ".json")


def load_tofu(source: str, forget: str, perturbed: bool, extra: Sequence[str] | None) -> FactSets:
    """A forget set of TOFU with its retain set.

    The test set is empty: every author of TOFU that the model was taught is in the forget or the retain set.

    Args:
        source: a folder of files named after the sets (forget01.jsonl or .json), or a `datasets` name whose
            configurations are the sets. Without retain99 (or 95, 90), the rows of `full` that are not to be forgotten
            are the retain set.
        forget: "forget01", "forget05" or "forget10".
        perturbed: take the sets that have options, forget01_perturbed and retain_perturbed (which has 400 rows).
        extra: of `EXTRA`; None takes those that the source has.

    Raises:
        FileNotFoundError, ValueError: a set that is missing or malformed; see `load_facts`.
    """
    files = _files(source)
    suffix = "_perturbed" if perturbed else ""
    forgotten = _load(files, source, forget + suffix)
    if perturbed:
        kept = _load(files, source, "retain_perturbed")
    elif RETAIN[forget] in files or "full" not in files:
        kept = _load(files, source, RETAIN[forget])
    else:
        kept = _rest_of(_load(files, source, "full"), forgotten, f"full of {source}")
    names = {"holdout": f"{forget.replace('forget', 'holdout')}{suffix}"} | {
        name: name + suffix for name in EXTRA if name != "holdout"
    }
    chosen = [name for name in EXTRA if names[name] in files] if extra is None else extra
    return FactSets(
        check_split(Split(forgotten, kept, [])), {name: _load(files, source, names[name]) for name in chosen}
    )


def _files(source: str) -> dict[str, str]:
    """Name of a set -> where `load_facts` finds it."""
    folder = Path(source)
    if folder.is_dir():
        found = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
        files = {file.stem: str(file) for file in found}
        if len(files) < len(found):
            twice = next(file for file in found if str(file) not in files.values())
            raise ValueError(f"{folder} has {twice.name} and {Path(files[twice.stem]).name}; expected one of them")
        return files
    if folder.suffix in SUFFIXES or folder.exists():
        raise ValueError(f"{source} is not a folder; expected a folder of TOFU's sets or a datasets name")
    return {name: f"{source}:{name}" for name in dataset_configurations(source)}


def _load(files: dict[str, str], source: str, name: str) -> list[Fact]:
    if name not in files:
        raise ValueError(f"{source} has no set {name}; it has {', '.join(files) or 'none'}")
    return load_facts(files[name])


def _rest_of(full: list[Fact], forgotten: list[Fact], where: str) -> list[Fact]:
    gone = set(forgotten)
    missing = gone - set(full)
    if missing:
        raise ValueError(
            f"{where} lacks {len(missing)} forget facts, such as {min(fact.question for fact in missing)!r}; "
            "give the retain set itself"
        )
    return [fact for fact in full if fact not in gone]
