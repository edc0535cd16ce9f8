"""Attacks that train: on some facts of the pool (harmful) or on instructions (benign), all parameters or LoRA's."""

from __future__ import annotations

import logging

from transformers import PreTrainedModel

from ..data.instructions import load_instructions
from ..data.prompts import Encoded, PromptFormat
from ..evaluation.likelihood import FactScores
from ..progress import Job
from ..training.step_log import StepRecord
from ..training.supervised import train_on
from .attack import Attack
from .attacked import Attacked, Course
from .lora import add_lora
from .plateau import is_flat
from .pool import Pool

logger = logging.getLogger(__name__)


def retrain(attacked: Attacked, attack: Attack, pool: Pool, before: FactScores, bar: Job) -> Course:
    """Train the model further as `attack` says, and score the forget facts on the way.

    Args:
        before: scores of the forget facts before the attack.
        bar: moved on by `attack.steps` in all.

    Raises:
        ValueError: a fraction that gives no fact, or modules that the model lacks.
        DivergedError: a loss or gradient that is not finite.
    """
    course = Course(pool, pool.draw(attack.fraction, attack.seed) if attack.what.on_facts else [])
    course.add(0, before)
    model, protocol = attacked.load()
    samples = _samples(attacked, attack, course.seen, protocol.prompts)
    if attack.tuning == "lora":
        add_lora(model, attack.lora_rank, attack.lora_alpha, attack.lora_modules, attack.seed)

    def evaluate(model: PreTrainedModel) -> dict[str, float]:
        return course.named(protocol.score(model, attacked.forget))

    def write(line: dict) -> None:
        bar.advance()
        if "fs" in line:
            course.steps.append({name: line[name] for name in ("step", *course.steps[0]) if name in line})
            shown = ("unseen_fs", "unseen_margin", "unseen_probability", "forget_probability")
            bar.say(**{name: line[name] for name in shown if name in line})

    def stop(scores: dict[str, float]) -> str | None:
        flat = attack.until_flat is not None and is_flat([*course.steps, scores], attack.until_flat)
        return "flat" if flat else None

    train_on(
        model, protocol.prompts, samples, learning_rate=attack.learning_rate, steps=attack.steps,
        batch_size=attack.batch_size, seed=attack.seed, record=StepRecord(write, evaluate, attack.evaluate_every, stop),
    )  # fmt: skip
    bar.advance(attack.steps - course.steps[-1]["step"])
    if attack.until_flat is not None:
        course.flat = is_flat(course.steps, attack.until_flat)
        if not course.flat:
            logger.warning("%s still rises after %d steps; use more --steps", attack.name, attack.steps)
    return course


def _samples(attacked: Attacked, attack: Attack, seen: list[int], prompts: PromptFormat) -> list[Encoded]:
    if attack.what.on_facts:
        return prompts.encode_facts([attacked.forget[i] for i in seen])
    return prompts.encode_texts(load_instructions(attack.instructions))
