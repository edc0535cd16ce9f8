"""The kinds of attack, with what the command line, run folders and reports need to know of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from .earlier import WHOLE
from .pool import POOLS


class Tuning(NamedTuple):
    """Which parameters a training attack changes.

    Attributes:
        label: in tables and figures.
        package: what it needs beside the toolkit's own requirements; "" for nothing.
        extra: of this package, which installs it.
    """

    label: str
    package: str = ""
    extra: str = ""


TUNINGS = {"full": Tuning(""), "lora": Tuning("LoRA", "peft", "lora")}


class AttackKind(NamedTuple):
    """A kind of attack, with the grid that it is run over.

    Attributes:
        name: on the command line, in file names and in tables.
        summary: what a report says about it.
        learning_rates: of AdamW, by tuning: the paper's where all parameters train, ten times as large for LoRA (our
            choice: adapters need more); empty for an attack that does not train.
        fractions: of the pool, which the attack trains on; empty for an attack that trains on no facts.
        paper_fractions: those of the paper.
        in_paper: whether the paper has this kind; the others run where they are asked for.
        package: what it needs beside the toolkit's own requirements; "" for nothing.
        extra: of this package, which installs it.
    """

    name: str
    summary: str
    learning_rates: Mapping[str, tuple[float, ...]]
    fractions: tuple[float, ...] = ()
    paper_fractions: tuple[float, ...] = ()
    in_paper: bool = True
    package: str = ""
    extra: str = ""

    @property
    def trains(self) -> bool:
        """Whether it trains the model, and so has a learning rate, a seed and steps."""
        return bool(self.learning_rates)

    @property
    def on_facts(self) -> bool:
        """Whether it trains on a fraction of the pool, and the rest of the pool are its unseen facts."""
        return bool(self.fractions)


# In the order of reports.
_ALL = (
    AttackKind(
        "harmful",
        "Training further on a fraction p of the pool, floor(p n) of its n facts. Scores are of the rest of the pool, "
        "which the attack does not train on: do those facts come back with the others?",
        learning_rates={"full": (1e-5, 5e-6, 1e-6), "lora": (1e-4, 5e-5, 1e-5)},
        fractions=(0.3,),  # 0.1 of fewer than ten facts is none
        paper_fractions=(0.1, 0.3),
    ),
    AttackKind(
        "benign",
        "Training further on instructions that have nothing to do with the facts. Scores are of the whole pool.",
        learning_rates={"full": (1e-5, 1e-6, 1e-7), "lora": (1e-4, 1e-5, 1e-6)},
    ),
    AttackKind(
        "quantised",
        "Rounding the weights of the linear layers to 4 bits (NF4), without any training. Scores are of the whole "
        "pool, the higher of before and after.",
        learning_rates={},
        in_paper=False,
        package="bitsandbytes",
        extra="quantised",
    ),
)
ATTACK_KINDS = {kind.name: kind for kind in _ALL}


def get_kind(name: str) -> AttackKind:
    """The kind of that name; a ValueError that lists the names otherwise."""
    if name not in ATTACK_KINDS:
        raise ValueError(f"kind={name!r} is unknown; expected one of {', '.join(ATTACK_KINDS)}")
    return ATTACK_KINDS[name]


def get_tuning(name: str) -> Tuning:
    """The tuning of that name; a ValueError that lists the names otherwise."""
    if name not in TUNINGS:
        raise ValueError(f"tuning={name!r} is unknown; expected one of {', '.join(TUNINGS)}")
    return TUNINGS[name]


class AttackGroup(NamedTuple):
    """Attacks that differ in learning rate and seed alone: one row of the paper's table.

    Attributes:
        kind: a name of `ATTACK_KINDS`.
        fraction: p of a kind that trains on facts.
        tuning: a name of `TUNINGS`; None for a kind that does not train.
        pool: the name of its pool.
    """

    kind: str
    fraction: float | None
    tuning: str | None
    pool: str

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> AttackGroup:
        """The group of an attack's result."""
        return cls(get_kind(result["kind"]).name, result["fraction"], result["tuning"], result["pool"]["name"])

    @property
    def title(self) -> str:
        """In tables and figures."""
        which = "" if self.fraction is None else f" p = {self.fraction:g}"
        label = TUNINGS[self.tuning].label if self.tuning else ""
        return " ".join(filter(None, (f"{self.kind}{which}", label, f"({self.pool})")))

    @property
    def order(self) -> tuple:
        """By which reports sort groups."""
        tuning = list(TUNINGS).index(self.tuning) if self.tuning else 0
        pool = (*POOLS, WHOLE).index(self.pool)
        return list(ATTACK_KINDS).index(self.kind), tuning, pool, self.fraction or 0
