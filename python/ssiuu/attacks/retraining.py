"""The paper's retraining attacks: further training on some forget facts (harmful) or on instructions (benign)."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from ..data.facts import Fact
from ..data.instructions import load_instructions
from ..data.prompts import Encoded, PromptFormat
from ..evaluation.protocol import Protocol
from ..evaluation.sets import named_means
from ..options import RetrainingOptions, check_learning_rate
from ..progress import Job
from ..training.step_log import StepRecord
from ..training.supervised import train_on
from .kinds import ATTACK_KINDS, get_kind


@dataclass(frozen=True)
class Attack(RetrainingOptions):
    """One attack.

    Attributes:
        kind: a name of `ATTACK_KINDS`: "harmful" trains on a fraction of the forget set, "benign" on instructions.
        fraction: p of a harmful attack; None for a benign one.
        learning_rate: of AdamW.
        seed: of the choice of facts and of their order.
    """

    kind: str
    fraction: float | None
    learning_rate: float
    seed: int = 0

    @property
    def on_forget_facts(self) -> bool:
        """Whether it trains on a fraction of the forget facts."""
        return get_kind(self.kind).on_forget_facts

    def check(self) -> None:
        """Raise a ValueError for options out of range."""
        if self.on_forget_facts and not (self.fraction is not None and 0 < self.fraction < 1):
            raise ValueError(
                f"fraction={self.fraction}; expected the fraction of the forget set to train on, in (0, 1)"
            )
        for name in ("steps", "batch_size", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")
        check_learning_rate(self.learning_rate)

    def check_data(self, forget: Sequence[Fact]) -> None:
        """Raise a ValueError or FileNotFoundError for data that the attack cannot train on.

        Args:
            forget: the forget facts of the run.
        """
        if not self.on_forget_facts:
            load_instructions(self.instructions)
        elif len(forget) == 1:
            others = " or ".join(f"--kind {kind.name}" for kind in ATTACK_KINDS.values() if not kind.on_forget_facts)
            raise ValueError(f"the run has one forget fact, and a {self.kind} attack leaves some unseen; use {others}")
        elif self._seen_count(forget) == len(forget):
            raise ValueError(
                f"fraction={self.fraction} of {len(forget)} forget facts is all of them; choose a smaller one"
            )

    def data(self, prompts: PromptFormat, forget: Sequence[Fact]) -> tuple[list[Encoded], list[int]]:
        """What the attack trains on, and the indices of the forget facts that it leaves unseen (benign: none).

        Args:
            prompts: how facts become tokens.
            forget: the forget facts of the run, which `check_data` accepts.
        """
        if not self.on_forget_facts:
            return prompts.encode_texts(load_instructions(self.instructions)), []
        chosen = set(random.Random(self.seed).sample(range(len(forget)), self._seen_count(forget)))
        seen = [fact for i, fact in enumerate(forget) if i in chosen]
        return prompts.encode_facts(seen), [i for i in range(len(forget)) if i not in chosen]

    def _seen_count(self, forget: Sequence[Fact]) -> int:
        return math.ceil(self.fraction * len(forget))

    @property
    def name(self) -> str:
        """Of its file in the run folder."""
        which = f"{self.kind}-p{self.fraction:g}" if self.on_forget_facts else self.kind
        return f"{which}-lr{self.learning_rate:g}-seed{self.seed}"

    @property
    def options(self) -> dict:
        """The options that `name` does not tell, as a result keeps them."""
        return {
            "steps": self.steps,
            "batch_size": self.batch_size,
            "evaluate_every": self.evaluate_every,
            "instructions": None if self.on_forget_facts else self.instructions,
        }


def retrain(model: PreTrainedModel, protocol: Protocol, forget: Sequence[Fact], attack: Attack, bar: Job) -> dict:
    """Train an unlearned model further as `attack` says, and score its forget facts on the way; changes the model.

    Args:
        protocol: of the run.
        forget: the forget facts of the run.
        bar: moved on by one per step.

    Returns:
        kind, fraction, learning_rate, seed, options, steps (a list of scores, step 0 being before the attack), max_fs,
        seconds, and for an attack with unseen facts max_unseen_fs.

    Raises:
        DivergedError: a loss or gradient that is not finite.
    """
    started = time.perf_counter()
    samples, unseen = attack.data(protocol.prompts, forget)

    def evaluate(model: PreTrainedModel) -> dict[str, float]:
        scores = protocol.score(model, forget)
        return named_means(scores, "forget") | (named_means(scores.of(unseen), "unseen") if unseen else {})

    steps = [{"step": 0, **evaluate(model)}]

    def write(line: dict) -> None:
        bar.advance()
        if "fs" in line:
            steps.append({name: line[name] for name in ("step", *steps[0]) if name in line})
            bar.say(**{name: line[name] for name in ("fs", "forget_probability", "unseen_probability") if name in line})

    train_on(
        model, protocol.prompts, samples, learning_rate=attack.learning_rate, steps=attack.steps,
        batch_size=attack.batch_size, seed=attack.seed, record=StepRecord(write, evaluate, attack.evaluate_every),
    )  # fmt: skip
    result = {
        "kind": attack.kind,
        "fraction": attack.fraction,
        "learning_rate": attack.learning_rate,
        "seed": attack.seed,
        "options": attack.options,
        "steps": steps,
        "max_fs": max(step["fs"] for step in steps),
        "seconds": time.perf_counter() - started,
    }
    return result | ({"max_unseen_fs": max(step["unseen_fs"] for step in steps)} if unseen else {})
