"""The paper's two retraining attacks: does a little further training bring the forgotten facts back?"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from ..data.facts import Fact
from ..data.instructions import load_instructions
from ..data.prompts import Encoded, PromptFormat
from ..data.sources import BUILTIN
from ..evaluation.likelihood import score_facts
from ..evaluation.sets import named_means
from ..methods.registry import check_learning_rate
from ..models.load import load_model, position_limit
from ..progress import Job, job
from ..runs.folder import Run
from ..training.step_log import StepRecord
from ..training.trainer import refuse_launchers
from .finetune import train_on

KINDS = ("harmful", "benign")
# The paper's grids.
FRACTIONS = (0.1, 0.3)
LEARNING_RATES = {"harmful": (1e-5, 5e-6, 1e-6), "benign": (1e-5, 1e-6, 1e-7)}


@dataclass(frozen=True)
class Attack:
    """One attack.

    Attributes:
        kind: "harmful" trains on a fraction of the forget set, "benign" on instructions.
        fraction: p of a harmful attack; None for a benign one.
        learning_rate: of AdamW.
        seed: of the choice of facts and of their order.
        steps, batch_size: how long, and how many samples a step.
        instructions: source of the benign attack's data.
        evaluate_every: in steps.
    """

    kind: str
    fraction: float | None
    learning_rate: float
    seed: int = 0
    steps: int = 30
    batch_size: int = 8
    instructions: str = BUILTIN
    evaluate_every: int = 5

    def check(self) -> None:
        """Raise a ValueError for options out of range."""
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} is unknown; expected one of {', '.join(KINDS)}")
        if self.kind == "harmful" and not (self.fraction is not None and 0 < self.fraction < 1):
            raise ValueError(
                f"fraction={self.fraction}; expected the fraction of the forget set to train on, in (0, 1)"
            )
        for name in ("steps", "batch_size", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")
        check_learning_rate(self.learning_rate)

    @property
    def name(self) -> str:
        """Of its file in the run folder."""
        which = f"{self.kind}-p{self.fraction:g}" if self.kind == "harmful" else self.kind
        return f"{which}-lr{self.learning_rate:g}-seed{self.seed}"


def attack_grid(
    kinds: Iterable[str],
    seeds: Iterable[int] = (0,),
    *,
    fractions: Sequence[float] | None = None,
    learning_rates: Sequence[float] | None = None,
    **options,
) -> list[Attack]:
    """Attacks of these kinds at every fraction, learning rate and seed.

    Args:
        fractions, learning_rates: the paper's where None.
        options: of `Attack`.
    """
    found = []
    for kind in kinds:
        which = (fractions or FRACTIONS) if kind == "harmful" else (None,)
        rates = learning_rates or LEARNING_RATES.get(kind, (1e-5,))
        found += [Attack(kind, p, lr, seed, **options) for p, lr, seed in itertools.product(which, rates, seeds)]
    return found


def attack_run(run_dir: str | Path, attacks: Sequence[Attack]) -> list[dict]:
    """Attack a finished run's model; each attack starts from it anew, and leaves it as it is.

    Attacks whose result is in the run's attacks/ already are not run again.

    Returns:
        For each attack, what its file holds: kind, fraction, learning_rate, seed, steps (a list of scores, step 0 being
        before the attack), max_fs, and for a harmful attack max_unseen_fs, over the facts it does not train on.

    Raises:
        ValueError: no finished run, or one that another process attacks; options out of range, instructions that
            cannot be read, or a result of other options under the same name.
        OSError: a run folder that cannot be written to, before any work.
    """
    refuse_launchers()
    for attack in attacks:
        attack.check()
    run = Run.open(run_dir)
    config, forget = run.read("config.json"), run.split().forget
    pending = [attack for attack in attacks if not _done(run, attack)]
    for attack in pending:
        _check_data(forget, attack)
    steps = sum(attack.steps for attack in pending)
    with run.work("attack"), job(f"attack {run.path.name}", steps) as bar:
        for attack in pending:
            # float32, whatever the run's type: updates at 1e-7 vanish in narrower ones.
            model, tokenizer = load_model(
                run.model, dtype="float32", trust_remote_code=config.get("trust_remote_code", False)
            )
            prompts = PromptFormat(tokenizer, config["shots"], position_limit(model))
            run.write(f"attacks/{attack.name}.json", _attack(model, prompts, forget, attack, bar))
    return [run.read(f"attacks/{attack.name}.json") for attack in attacks]


def _done(run: Run, attack: Attack) -> bool:
    if not (run.attacks / f"{attack.name}.json").is_file():
        return False
    options = run.read(f"attacks/{attack.name}.json")["options"]
    if options != _options(attack):
        raise ValueError(f"{run.attacks / attack.name}.json is of other options, {options}; remove it to attack again")
    return True


def _options(attack: Attack) -> dict:
    names = ("steps", "batch_size", "evaluate_every")
    return {name: getattr(attack, name) for name in names} | {
        "instructions": attack.instructions if attack.kind == "benign" else None
    }


def _attack(model: PreTrainedModel, prompts: PromptFormat, forget: Sequence[Fact], attack: Attack, bar: Job) -> dict:
    started = time.perf_counter()
    samples, unseen = _attack_data(prompts, forget, attack)

    def evaluate(model: PreTrainedModel) -> dict[str, float]:
        scores = score_facts(model, prompts, forget)
        return named_means(scores, "forget") | (named_means(scores.of(unseen), "unseen") if unseen else {})

    steps = [{"step": 0, **evaluate(model)}]

    def write(line: dict) -> None:
        bar.advance()
        if "fs" in line:
            steps.append({name: line[name] for name in ("step", *steps[0]) if name in line})
            bar.say(**{name: line[name] for name in ("fs", "forget_probability", "unseen_probability") if name in line})

    train_on(
        model, prompts, samples, learning_rate=attack.learning_rate, steps=attack.steps,
        batch_size=attack.batch_size, seed=attack.seed, record=StepRecord(write, evaluate, attack.evaluate_every),
    )  # fmt: skip
    result = {
        "kind": attack.kind,
        "fraction": attack.fraction,
        "learning_rate": attack.learning_rate,
        "seed": attack.seed,
        "options": _options(attack),
        "steps": steps,
        "max_fs": max(step["fs"] for step in steps),
        "seconds": time.perf_counter() - started,
    }
    return result | ({"max_unseen_fs": max(step["unseen_fs"] for step in steps)} if unseen else {})


def _check_data(forget: Sequence[Fact], attack: Attack) -> None:
    """Raise a ValueError for an attack whose data are not there."""
    if attack.kind == "benign":
        load_instructions(attack.instructions)
    elif len(forget) == 1:
        raise ValueError("the run has one forget fact, and a harmful attack leaves some unseen; use --kind benign")
    elif _seen_facts(attack, forget) == len(forget):
        raise ValueError(
            f"fraction={attack.fraction} of {len(forget)} forget facts is all of them; choose a smaller one"
        )


def _seen_facts(attack: Attack, forget: Sequence[Fact]) -> int:
    return math.ceil(attack.fraction * len(forget))


def _attack_data(prompts: PromptFormat, forget: Sequence[Fact], attack: Attack) -> tuple[list[Encoded], list[int]]:
    """What the attack trains on, and which forget facts it does not see (of a harmful attack)."""
    if attack.kind == "benign":
        return prompts.encode_texts(load_instructions(attack.instructions)), []
    chosen = set(random.Random(attack.seed).sample(range(len(forget)), _seen_facts(attack, forget)))
    seen = [fact for i, fact in enumerate(forget) if i in chosen]
    return prompts.encode_facts(seen), [i for i in range(len(forget)) if i not in chosen]
