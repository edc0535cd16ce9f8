"""The kinds of attack, with what the command line, run folders and reports need to know of each."""

from __future__ import annotations

from typing import NamedTuple


class AttackKind(NamedTuple):
    """A kind of attack, with the paper's grid.

    Attributes:
        name: on the command line, in file names and in tables.
        summary: what a report says about it.
        learning_rates: of AdamW.
        fractions: of the forget facts that the attack trains on; empty for an attack on other data.
    """

    name: str
    summary: str
    learning_rates: tuple[float, ...]
    fractions: tuple[float, ...] = ()

    @property
    def on_forget_facts(self) -> bool:
        """Whether it trains on a fraction of the forget facts, and the others are its unseen facts."""
        return bool(self.fractions)

    def title(self, fraction: float | None) -> str:
        """Of the attacks of this kind and fraction, in tables and figures."""
        return self.name if fraction is None else f"{self.name} p = {fraction:g}"


# In the order of reports.
_ALL = (
    AttackKind(
        "harmful",
        "Training further on a fraction p of the forget facts. The unseen facts, which it does not train on, show "
        "whether the others come back with them.",
        learning_rates=(1e-5, 5e-6, 1e-6),
        fractions=(0.1, 0.3),
    ),
    AttackKind(
        "benign",
        "Training further on instructions that have nothing to do with the facts.",
        learning_rates=(1e-5, 1e-6, 1e-7),
    ),
)
ATTACK_KINDS = {kind.name: kind for kind in _ALL}


def get_kind(name: str) -> AttackKind:
    """The kind of that name; a ValueError that lists the names otherwise."""
    if name not in ATTACK_KINDS:
        raise ValueError(f"kind={name!r} is unknown; expected one of {', '.join(ATTACK_KINDS)}")
    return ATTACK_KINDS[name]
