"""One attack: its options, their checks, and what it is called."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..data.facts import Fact
from ..data.instructions import load_instructions
from ..options import RetrainingOptions, check_learning_rate
from .kinds import AttackKind, get_kind, get_tuning
from .pool import POOLS, check_fraction


@dataclass(frozen=True)
class Attack(RetrainingOptions):
    """One attack.

    Attributes:
        kind: a name of `ATTACK_KINDS`: "harmful" trains on a fraction of the pool, "benign" on instructions,
            "quantised" rounds the weights.
        fraction: p of a harmful attack; None for the others.
        learning_rate: of AdamW; None for an attack that does not train.
        seed: of the choice of facts, of their order, and of LoRA's first weights.
    """

    kind: str
    fraction: float | None = None
    learning_rate: float | None = None
    seed: int = 0

    @classmethod
    def recorded(cls, result: Mapping[str, Any]) -> Attack:
        """The attack that gave this result (`execute`).

        Raises:
            ValueError: a result of a version in which attacks had no pool.
        """
        if "pool" not in result:
            raise ValueError("is of an earlier version, whose attacks drew their facts otherwise; attack again")
        own = {name: result[name] for name in ("kind", "fraction", "learning_rate", "seed")}
        tuning = {} if result["tuning"] is None else {"tuning": result["tuning"]}
        return cls(**own, **tuning, pool=result["pool"]["name"], **result["options"])

    @property
    def what(self) -> AttackKind:
        """Its kind, with what is known of it."""
        return get_kind(self.kind)

    def check(self) -> None:
        """Raise a ValueError for options out of range, or for a package that is missing."""
        kind, tuning = self.what, get_tuning(self.tuning)
        if self.pool not in (None, *POOLS):
            raise ValueError(f"pool={self.pool!r} is unknown; expected one of {', '.join(POOLS)}")
        if kind.on_facts and not (self.fraction is not None and 0 < self.fraction < 1):
            raise ValueError(f"fraction={self.fraction}; expected the fraction of the pool to train on, in (0, 1)")
        if not kind.on_facts and self.fraction is not None:
            raise ValueError(f"fraction={self.fraction} of a {self.kind} attack; it trains on no facts: leave it out")
        _check_package(f"kind={self.kind!r}", kind.package, kind.extra)
        if kind.trains:
            _check_package(f"tuning={self.tuning!r}", tuning.package, tuning.extra)
            self._check_training()
        elif self.learning_rate is not None:
            raise ValueError(
                f"learning_rate={self.learning_rate} of a {self.kind} attack, which does not train; leave it out"
            )

    def _check_training(self) -> None:
        for name in ("steps", "batch_size", "evaluate_every", "lora_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")
        if not 0 < self.lora_alpha < math.inf:
            raise ValueError(f"lora_alpha={self.lora_alpha}; expected a positive number")
        if self.until_flat is not None and not 1 <= self.until_flat <= self.steps // self.evaluate_every:
            raise ValueError(
                f"until_flat={self.until_flat}; expected at least 1, and no more than the "
                f"{self.steps // self.evaluate_every} evaluations that steps={self.steps} has with "
                f"evaluate_every={self.evaluate_every}"
            )
        check_learning_rate(self.learning_rate if self.learning_rate is not None else math.nan)

    def on(self, right_or_wrong: bool) -> Attack:
        """This attack with its pool chosen: the paper's for such facts, where none was named.

        Args:
            right_or_wrong: whether answers are judged as right or wrong (`judged_by_choice`).
        """
        return self if self.pool else replace(self, pool="wrong" if right_or_wrong else "all")

    def check_data(self, forget: Sequence[Fact], right_or_wrong: bool) -> None:
        """Raise a ValueError or FileNotFoundError for data that is known to be unfit before a model is loaded.

        Args:
            forget: the forget facts of the run.
            right_or_wrong: as for `on`.
        """
        if self.pool == "wrong" and not right_or_wrong:
            raise ValueError(
                "pool='wrong' of facts that are scored by ROUGE-L recall, which calls no answer wrong; use --pool all"
            )
        if self.what.on_facts:  # no pool is larger
            check_fraction(self.fraction, len(forget), f"the {len(forget)} forget facts of the run")
        elif self.what.trains:
            load_instructions(self.instructions)

    @property
    def name(self) -> str:
        """Of its file in the run folder."""
        parts = [self.kind, f"p{self.fraction:g}" if self.what.on_facts else "", self.pool]
        if self.what.trains:
            tuning = self.tuning if self.tuning != "full" else ""
            parts += [tuning, f"lr{self.learning_rate:g}", f"seed{self.seed}"]
        return "-".join(filter(None, parts))

    @property
    def options(self) -> dict[str, Any]:
        """The options that `name` does not tell, as a result keeps them."""
        names = []
        if self.what.trains:
            names += ["steps", "batch_size", "evaluate_every", "until_flat"]
            names += ["lora_rank", "lora_alpha", "lora_modules"] if self.tuning == "lora" else []
            names += [] if self.what.on_facts else ["instructions"]
        return {name: getattr(self, name) for name in names}


def _check_package(option: str, package: str, extra: str) -> None:
    if package and importlib.util.find_spec(package) is None:
        raise ValueError(
            f"{option} needs the package {package}, which is not installed; install it with "
            f"`pip install 'ssiuu-kernels[{extra}]'`"
        )
