"""One unlearning run, from a model and facts to an unlearned model in a run folder."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, set_seed

import ssiuu_kernels as sk

from ..data.facts import (
    Fact,
    FactSets,
    Split,
    at_most,
    check_not_empty,
    check_split,
    judged_by_choice,
    load_facts,
    split_by_subject,
)
from ..data.prompts import Encoded, PromptFormat
from ..data.registry import get_data_set
from ..evaluation.known import known_facts
from ..evaluation.likelihood import chance
from ..evaluation.protocol import Protocol
from ..evaluation.sets import evaluate_split, named_means
from ..methods.base import Method, UnlearnData
from ..models.load import load_model
from ..optimizers import OptimizerOptions
from ..options import UnlearnOptions
from ..pairs import all_options, make
from ..progress import job
from ..regularizers.base import Regularizer
from ..runs.folder import Run
from ..training.distance import Distance
from ..training.schedule import Part, Schedule
from ..training.step_log import StepRecord
from ..training.stopped_facts import StoppedFacts
from ..training.trainer import refuse_launchers, training_arguments
from ..training.unlearn_trainer import UnlearnTrainer

# The paper's early stop without options, the retrained model's ROUGE-L recall on TOFU; with options it is chance.
ROUGE_THRESHOLD = 0.1971


def unlearn(
    options: UnlearnOptions,
    run_dir: str | Path,
    *,
    resume: bool = False,
    split: Split | None = None,
) -> Run:
    """Unlearn, and leave the unlearned model and all records in the run folder.

    Args:
        options: see `UnlearnOptions`.
        run_dir: a new or an empty folder, or (resume) the one of an interrupted run.
        resume: continue an interrupted run; on the CPU it ends with the very same weights.
        split: sets that were chosen beforehand, instead of `options.facts`.

    Raises:
        ValueError: bad options or data, before any model is loaded; the folder holds something, or another process is
            at work in it; a fact that does not fit the model.
        OSError: a folder that cannot be written to, before any model is loaded; a full disk.
        DivergedError: a loss or gradient that is not finite; the run can be resumed from its last checkpoint.
    """
    options.check()
    method, regularizer = make(options)
    refuse_launchers()
    chosen, extra = FactSets(split, {}) if split else choose_facts(options)
    if options.stop_margin and not judged_by_choice(chosen.forget):
        raise ValueError(
            f"stop_margin={options.stop_margin} with forget facts that have no options, and so no margin; leave "
            "--stop-margin out: they leave the loss at the run's threshold"
        )
    config = _config(options, regularizer)
    with Run.claim(run_dir, config, resume) as run:
        set_seed(options.seed)
        model, tokenizer = load_model(options.model, **options.loading())
        protocol = Protocol.of(options, model, tokenizer)
        if resume and (run.path / "split.json").is_file():
            chosen = run.split()
        elif options.known_probability is not None and split is None:
            chosen = _known(model, protocol, chosen, options.known_probability)
        data = _data(protocol.prompts, chosen, options)
        schedule = _schedule(data, method.companions(data), options)
        for facts in (*chosen, *extra.values()):
            protocol.prompts.encode_options(facts)  # refuses what does not fit the model, before anything is written
        _train_only(model, method.parameters(model))
        patch = {"scope": "all", "engine": options.engine, **regularizer.patch_options(len(chosen.forget))}
        with sk.patch(model, **patch) as handle, ExitStack() as stack:
            stack.callback(method.teardown)
            method.setup(model, handle, data)
            regularizer.setup(model, handle, method, data)
            run.start(config)
            run.write_split(chosen)
            run.write_extra(extra)
            if not (run.path / "evaluation.json").is_file():
                run.write("evaluation.json", {"before": evaluate_split(model, protocol, chosen, name="score before")})
            _train(model, handle, method, regularizer, protocol, schedule, chosen, options, run)
            after = evaluate_split(model, protocol, chosen, name="score after")
        run.write("evaluation.json", {"before": run.read("evaluation.json")["before"], "after": after})
        model.save_pretrained(run.model)
        tokenizer.save_pretrained(run.model)
        run.finish()
        return run


def choose_facts(options: UnlearnOptions, facts: Sequence[Fact] | None = None) -> FactSets:
    """The sets that the options name.

    Args:
        facts: those of `options.facts`, where they are read already.

    Raises:
        ValueError: an empty or malformed set, people in two sets.
        FileNotFoundError: a file or folder that is not there.
    """
    extra = {}
    if options.data is not None:
        split, extra = get_data_set(options.data).load(options.data_from, options.extra)
    elif options.facts is not None:
        facts = load_facts(options.facts) if facts is None else facts
        split = split_by_subject(facts, options.forget_people, options.retain_people, options.seed)
    else:
        split = check_split(Split(load_facts(options.forget), load_facts(options.retain), []))
    limits = (options.forget_facts, options.retain_facts, options.test_facts)
    limited = (at_most(facts, limit, options.seed) for facts, limit in zip(split, limits, strict=True))
    return FactSets(Split(*limited), extra)


def _config(options: UnlearnOptions, regularizer: Regularizer) -> dict[str, Any]:
    config = all_options(options)
    if not regularizer.measures_gradients:
        config["engine"] = None  # which makes the gradient of a penalty
    # Kept, since runs of versions before it were not rounded so, and go on as they began.
    return config | {"stochastic_rounding": options.dtype == "bfloat16"}


def _known(model: PreTrainedModel, protocol: Protocol, split: Split, least: float) -> Split:
    parts = []
    with job("find known facts", sum(map(len, split))) as bar:
        for facts in split:
            scores = protocol.score(model, facts, progress=bar.advance) if facts else None
            parts.append(known_facts(scores, facts, least) if facts else [])
    return check_not_empty(Split(*parts))


def _data(prompts: PromptFormat, split: Split, options: UnlearnOptions) -> UnlearnData:
    samples = (prompts.encode_facts(facts) for facts in (split.forget, split.retain))
    return UnlearnData(split.forget, split.retain, *samples, prompts=prompts, seed=options.seed)


def _schedule(data: UnlearnData, companions: Sequence[Encoded] | None, options: UnlearnOptions) -> Schedule:
    forget_batch = options.forget_batch or len(data.forget)
    retain_batch = options.retain_batch or min(forget_batch, len(data.retain))
    for name, number, facts in (("forget", forget_batch, data.forget), ("retain", retain_batch, data.retain)):
        if number > len(facts):
            raise ValueError(f"{name}_batch={number} is more than the {len(facts)} {name} facts; ask for fewer")
    parts = [
        Part(data.forget_samples, forget_batch, True, companions),
        Part(data.retain_samples, retain_batch, False),
    ]
    return Schedule(parts, options.max_steps * options.accumulate, options.seed)


def _train_only(model: PreTrainedModel, params: Sequence[nn.Parameter]) -> None:
    chosen = set(map(id, params))
    for param in model.parameters():
        param.requires_grad_(id(param) in chosen)


def _train(
    model: PreTrainedModel,
    handle: sk.PatchHandle,
    method: Method,
    regularizer: Regularizer,
    protocol: Protocol,
    schedule: Schedule,
    split: Split,
    options: UnlearnOptions,
    run: Run,
) -> None:
    threshold = _threshold(options, split.forget)
    ends_by_distance = options.stop_distance is not None and options.threshold is None
    watched = _sample(split.retain, options.evaluation_facts, options.seed)
    arguments = training_arguments(
        run.checkpoints,
        learning_rate=options.learning_rate,
        max_steps=options.max_steps,
        seed=options.seed,
        accumulate=options.accumulate,
        save_every=options.save_every,
        bf16=options.bf16,
        gradient_checkpointing=options.gradient_checkpointing,
        weight_decay=options.weight_decay,
        report_to=options.report_to,
    )
    stopped = StoppedFacts(options.stop_margin) if options.stop_facts or method.stops_facts else None
    distance = Distance(model) if options.log_distance or options.stop_distance is not None else None
    checkpoint, done = run.rewind()
    last = run.last_metrics()
    with job(f"unlearn ({options.method})", options.max_steps) as bar:
        bar.advance(done)

        def write(line: dict) -> None:
            run.append_metrics(line)
            bar.advance()
            shown = ("loss", "fs", "rs", "forget_probability", "lambda", "share")
            bar.say(**{name: line[name] for name in shown if name in line})

        def evaluate(model: PreTrainedModel) -> dict[str, float]:
            forget = protocol.score(model, split.forget)
            if stopped is not None:
                stopped.observe(forget, threshold)
            found = named_means(forget, "forget") | named_means(protocol.score(model, watched), "retain")
            return found | ({} if distance is None else {"distance": distance()})

        def stop(scores: dict) -> str | None:
            if scores["fs"] <= threshold and not ends_by_distance:
                return "threshold"
            if options.stop_distance is not None and scores["distance"] >= options.stop_distance:
                return "distance"
            return "method" if method.finished else None

        trainer = UnlearnTrainer(
            model, arguments, schedule, protocol.prompts, StepRecord(write, evaluate, options.evaluate_every, stop),
            handle=handle, method=method, regularizer=regularizer, options=_optimizer_options(options, run),
            stopped=stopped,
        )  # fmt: skip
        if checkpoint:
            trainer.load_states(checkpoint)
        if "fs" in last and stop(last):
            trainer._load_from_checkpoint(str(checkpoint))  # the run was killed between its last step and its end
        else:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def _threshold(options: UnlearnOptions, forget: Sequence[Fact]) -> float:
    """The score at or below which a fact counts as forgotten, and the mean of all ends the run."""
    if options.threshold is not None:
        return options.threshold
    return chance(forget) if judged_by_choice(forget) else ROUGE_THRESHOLD


def _optimizer_options(options: UnlearnOptions, run: Run) -> OptimizerOptions:
    return OptimizerOptions(
        options.learning_rate,
        options.weight_decay,
        stochastic_rounding=run.read("config.json").get("stochastic_rounding", False),
        seed=options.seed,
        update_in_backward=options.update_in_backward,
    )


def _sample(facts: Sequence[Fact], number: int, seed: int) -> list[Fact]:
    return random.Random(seed).sample(list(facts), min(number, len(facts)))
