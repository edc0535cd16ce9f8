"""Plain fine-tuning: facts into a model, TOFU's first step."""

from __future__ import annotations

import logging
from pathlib import Path

from ..data.facts import Split, load_facts
from ..data.prompts import PromptFormat
from ..data.sources import BUILTIN
from ..evaluation.sets import evaluate_split
from ..models.load import load_model, position_limit
from ..progress import job
from ..runs.folder import Run
from ..training.optimizers import check_learning_rate, check_weights_dtype
from ..training.step_log import StepRecord
from ..training.supervised import train_on
from ..training.trainer import refuse_launchers

logger = logging.getLogger(__name__)


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
    trust_remote_code: bool = False,
    seed: int = 0,
) -> Run:
    """Teach a model the facts of a file, and keep it in a run folder (`model/` can then be unlearned from).

    Each answer ends with the tokenizer's end token, so that the model learns where to stop. An interrupted run starts
    again in its folder.

    Raises:
        ValueError: a folder with other contents, or in which another process is at work; malformed facts, facts
            that do not fit the model, numbers out of range.
        OSError: a folder that cannot be written to, before any model is loaded; a full disk.
        DivergedError: a loss or gradient that is not finite.
    """
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value}; expected at least 1")
    check_learning_rate(learning_rate)
    check_weights_dtype(dtype)
    refuse_launchers()
    known = load_facts(facts)
    config = {
        "method": "finetune", "model": model, "facts": facts, "max_steps": steps, "batch_size": batch_size,
        "learning_rate": learning_rate, "shots": shots, "dtype": dtype, "trust_remote_code": trust_remote_code,
        "seed": seed,
    }  # fmt: skip
    with Run.claim(run_dir, config, resume=False) as run:
        net, tokenizer = load_model(model, dtype=dtype, trust_remote_code=trust_remote_code)
        prompts = PromptFormat(tokenizer, shots, position_limit(net))
        samples = prompts.encode_facts(known, end=True)
        prompts.encode_options(known)  # refuses what does not fit the model, before anything is written
        if tokenizer.eos_token_id is None:
            logger.warning("the tokenizer of %s has no end token; the model will not learn where answers end", model)
        run.start(config)
        everything = Split([], known, [])
        before = evaluate_split(net, prompts, everything, name="score before")
        with job("finetune", steps) as bar:

            def write(line: dict) -> None:
                run.append_metrics(line)
                bar.advance()
                bar.say(loss=line["loss"])

            train_on(
                net, prompts, samples, learning_rate=learning_rate, steps=steps, batch_size=batch_size, seed=seed,
                record=StepRecord(write, lambda _: {}, steps),
            )  # fmt: skip
        after = evaluate_split(net, prompts, everything, name="score after")
        run.write("evaluation.json", {"before": before, "after": after})
        net.save_pretrained(run.model)
        tokenizer.save_pretrained(run.model)
        run.finish()
        return run
