"""Plain fine-tuning: facts into a model (TOFU's first step), and the loop that the attacks share."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, set_seed

from .evaluate import evaluate_sets
from .facts import BUILTIN, load_facts
from .models import load_model
from .progress import job
from .prompts import Encoded, PromptFormat
from .recorder import StepRecord
from .runs import Run
from .trainer import RecordedTrainer, Schedule, training_arguments


def train_on(
    model: PreTrainedModel,
    prompts: PromptFormat,
    samples: Sequence[Encoded],
    *,
    learning_rate: float,
    steps: int,
    batch_size: int,
    seed: int,
    record: StepRecord,
) -> None:
    """Train on the answers of `samples` with AdamW at a constant learning rate; nothing is saved.

    Args:
        samples: what to train on; `batch_size` of them a step, or all where there are fewer.
        record: receives every step.

    Raises:
        DivergedError: a loss or gradient that is no number.
    """
    set_seed(seed)
    schedule = Schedule([(samples, min(batch_size, len(samples)), False)], steps, seed)
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(Path(folder), learning_rate=learning_rate, max_steps=steps, seed=seed)
        RecordedTrainer(model, arguments, schedule, prompts, record).train()


def finetune(
    run_dir: str | Path,
    *,
    model: str = "smollm2",
    facts: str = BUILTIN,
    steps: int = 100,
    batch_size: int = 16,
    learning_rate: float = 1e-5,
    shots: int = 0,
    dtype: str = "float32",
    seed: int = 0,
) -> Run:
    """Teach a model the facts of a file, and keep it in a run folder (`model/` can then be unlearned from).

    Raises:
        ValueError: a folder that exists, malformed facts, numbers out of range.
        DivergedError: a loss or gradient that is no number.
    """
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value}; expected at least 1")
    known = load_facts(facts)
    config = {
        "method": "finetune", "model": model, "facts": facts, "max_steps": steps, "batch_size": batch_size,
        "learning_rate": learning_rate, "shots": shots, "dtype": dtype, "seed": seed,
    }  # fmt: skip
    run = Run.claim(run_dir, config, resume=False)
    net, tokenizer = load_model(model, dtype=dtype)
    prompts = PromptFormat(tokenizer, shots)
    run.start(config)
    before = evaluate_sets(net, prompts, [], known)
    with job("finetune", steps) as bar:

        def write(line: dict) -> None:
            run.append_metrics(line)
            bar.advance()
            bar.say(loss=line["loss"])

        record = StepRecord(write, lambda _: {}, steps)
        train_on(
            net, prompts, prompts.encode_facts(known),
            learning_rate=learning_rate, steps=steps, batch_size=batch_size, seed=seed, record=record,
        )  # fmt: skip
    run.write("evaluation.json", {"before": before, "after": evaluate_sets(net, prompts, [], known)})
    net.save_pretrained(run.model)
    tokenizer.save_pretrained(run.model)
    run.finish()
    return run
