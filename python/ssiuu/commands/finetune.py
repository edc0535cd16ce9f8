"""Plain fine-tuning: facts into a model, TOFU's first step."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path

from ..data.facts import Split, draw_people, load_facts, save_facts
from ..evaluation.protocol import Protocol
from ..evaluation.sets import evaluate_split
from ..models.load import load_model
from ..options import FinetuneOptions
from ..progress import job
from ..runs.folder import Run
from ..training.step_log import StepRecord
from ..training.supervised import train_on
from ..training.trainer import refuse_launchers

logger = logging.getLogger(__name__)


def finetune(options: FinetuneOptions, run_dir: str | Path) -> Run:
    """Teach a model the facts of a file, and keep it in a run folder.

    Its `model/` can then be unlearned from; `facts.jsonl` is what it was taught.

    Each answer ends with the tokenizer's end token, so that the model learns where to stop. An interrupted run starts
    again in its folder.

    Args:
        options: see `FinetuneOptions`.
        run_dir: a new or an empty folder, or the one of an interrupted run.

    Raises:
        ValueError: a folder with other contents, or in which another process is at work; malformed facts, facts
            that do not fit the model, numbers out of range.
        OSError: a folder that cannot be written to, before any model is loaded; a full disk.
        DivergedError: a loss or gradient that is not finite.
    """
    options.check()
    refuse_launchers()
    known = load_facts(options.facts)
    if options.people is not None:
        known = draw_people(known, options.people, options.seed)
    config = {"method": "finetune", **asdict(options)}
    with Run.claim(run_dir, config, resume=False) as run:
        model, tokenizer = load_model(options.model, **options.loading())
        protocol = Protocol.of(options, model, tokenizer)
        prompts = protocol.prompts
        samples = prompts.encode_facts(known, end=True)
        prompts.encode_options(known)  # refuses what does not fit the model, before anything is written
        if tokenizer.eos_token_id is None:
            logger.warning(
                "the tokenizer of %s has no end token; the model will not learn where answers end", options.model
            )
        run.start(config)
        save_facts(known, run.facts)
        everything = Split([], known, [])
        before = evaluate_split(model, protocol, everything, name="score before")
        with job("finetune", options.steps) as bar:

            def write(line: dict) -> None:
                run.append_metrics(line)
                bar.advance()
                bar.say(loss=line["loss"])

            train_on(
                model, prompts, samples, learning_rate=options.learning_rate, steps=options.steps,
                batch_size=options.batch_size, seed=options.seed, record=StepRecord(write, lambda _: {}, options.steps),
            )  # fmt: skip
        after = evaluate_split(model, protocol, everything, name="score after")
        run.write("evaluation.json", {"before": before, "after": after})
        model.save_pretrained(run.model)
        tokenizer.save_pretrained(run.model)
        run.finish()
        return run
