"""One unlearning run, from a model and facts to an unlearned model in a run folder."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedModel, set_seed

import ssiuu_kernels as sk
from ssiuu_kernels.log_probs import check_target
from ssiuu_kernels.loss.unlearning import ENGINES, ONE_BACKWARD
from ssiuu_kernels.ops.common.precision import LARGEST

from ..data.facts import Fact, Split, all_have_options, check_split, load_facts, split_by_subject
from ..data.prompts import PromptFormat
from ..data.sources import BUILTIN
from ..evaluation.known import known_facts
from ..evaluation.likelihood import chance, score_facts
from ..evaluation.sets import evaluate_sets, evaluate_split
from ..methods.registry import (
    OptimizerOptions,
    check_learning_rate,
    check_update_in_backward,
    check_weights_dtype,
    get_method,
)
from ..models.load import load_model, position_limit
from ..progress import job
from ..runs.folder import Run
from ..training.step_log import StepRecord
from ..training.trainer import Schedule, UnlearnTrainer, refuse_launchers, training_arguments

# The paper's early stop without options, the retrained model's ROUGE-L recall on TOFU; with options it is chance.
ROUGE_THRESHOLD = 0.1971


@dataclass(frozen=True)
class UnlearnOptions:
    """Options of a run, kept in its config.json.

    Attributes:
        model: hub name, folder or "smollm2".
        method: a name of `methods.METHODS`.
        facts: source of facts with subjects, split by person; or None where forget and retain are given.
        forget, retain: sources of the two sets.
        forget_people, retain_people: people drawn from `facts`.
        known_probability: keep only facts that the model answers with at least this probability; None keeps all.
        shots: worked examples in the prompt.
        learning_rate, weight_decay: of AdamW.
        penalty_weight, penalty_share, target: of the penalty; None where the method has none.
        engine: "one-backward" or "two-backward", which make both gradients of a penalised method; the results differ
            in rounding. None where the method has no penalty.
        update_in_backward: update each parameter during the backward and free its gradients, to save memory.
        max_steps: optimizer steps at most.
        forget_batch, retain_batch: facts of each set in a micro-batch; 0 takes the whole forget set, and for retain as
            many as for forget.
        accumulate: micro-batches a step.
        threshold: stop when FS is at or below it; None means chance among the facts' options (1/3 with two false
            ones), and 0.1971 (ROUGE-L recall) without options.
        evaluate_every, save_every: in steps; save_every 0 keeps no checkpoint.
        evaluation_facts: retain facts scored along the way, at most.
        dtype, bf16, gradient_checkpointing: precision of the weights, autocast, memory.
        trust_remote_code: run code that comes with the model.
        seed: of the draw of people and of the order of facts.
    """

    model: str = "smollm2"
    method: str = "ssiuu"
    facts: str | None = BUILTIN
    forget: str | None = None
    retain: str | None = None
    forget_people: int = 4
    retain_people: int = 12
    known_probability: float | None = None
    shots: int = 2
    learning_rate: float = 1e-5
    weight_decay: float = 0.0
    penalty_weight: float = 1e-3
    penalty_share: float | None = None
    target: str = "prob"
    engine: str = ONE_BACKWARD
    update_in_backward: bool = False
    max_steps: int = 100
    forget_batch: int = 0
    retain_batch: int = 0
    accumulate: int = 1
    threshold: float | None = None
    evaluate_every: int = 1
    save_every: int = 10
    evaluation_facts: int = 24
    dtype: str = "float32"
    bf16: bool = False
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False
    seed: int = 0

    def check(self) -> None:
        """Raise a ValueError for what can be known to be wrong before a model is loaded."""
        method = get_method(self.method)
        check_target(self.target)
        check_weights_dtype(self.dtype)
        if self.engine not in ENGINES:
            raise ValueError(f"engine={self.engine!r} is unknown; expected one of {', '.join(ENGINES)}")
        if (self.facts is None) != (self.forget is not None and self.retain is not None):
            raise ValueError("give either facts, or forget and retain; expected one source of both sets")
        for name in ("max_steps", "accumulate", "evaluate_every", "forget_people", "retain_people", "evaluation_facts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")
        for name in ("forget_batch", "retain_batch", "save_every", "penalty_weight", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 0")
        if self.penalty_weight > LARGEST:
            raise ValueError(f"penalty_weight={self.penalty_weight}; expected at most {LARGEST:g}")
        check_learning_rate(self.learning_rate)
        if self.threshold is not None and math.isnan(self.threshold):
            raise ValueError("threshold=nan, at or below which no score is; expected a number")
        if self.update_in_backward:
            check_update_in_backward(method, self.accumulate)


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
    refuse_launchers()
    chosen = split or choose_split(options)
    config = _config(options)
    with Run.claim(run_dir, config, resume) as run:
        set_seed(options.seed)
        model, tokenizer = load_model(options.model, dtype=options.dtype, trust_remote_code=options.trust_remote_code)
        prompts = PromptFormat(tokenizer, options.shots, position_limit(model))
        if resume and (run.path / "split.json").is_file():
            chosen = run.split()
        elif options.known_probability is not None and split is None:
            chosen = _known(model, prompts, chosen, options.known_probability)
        schedule = _schedule(prompts, chosen, options)
        for facts in chosen:
            prompts.encode_options(facts)  # refuses what does not fit the model, before anything is written
        with sk.patch(model, scope="all", engine=options.engine) as handle:
            run.start(config)
            run.write_split(chosen)
            if not (run.path / "evaluation.json").is_file():
                run.write("evaluation.json", {"before": evaluate_split(model, prompts, chosen, name="score before")})
            _train(model, handle, prompts, schedule, chosen, options, run)
            after = evaluate_split(model, prompts, chosen, name="score after")
        run.write("evaluation.json", {"before": run.read("evaluation.json")["before"], "after": after})
        model.save_pretrained(run.model)
        tokenizer.save_pretrained(run.model)
        run.finish()
        return run


def choose_split(options: UnlearnOptions) -> Split:
    """The sets that the options name.

    Raises:
        ValueError: an empty or malformed set, people in two sets.
    """
    if options.facts is not None:
        return split_by_subject(load_facts(options.facts), options.forget_people, options.retain_people, options.seed)
    return check_split(Split(load_facts(options.forget), load_facts(options.retain), []))


def _config(options: UnlearnOptions) -> dict:
    config = asdict(options)
    if not get_method(options.method).penalised:
        config |= {"penalty_weight": None, "penalty_share": None, "target": None, "engine": None}
    # Kept, since runs of versions before it were not rounded so, and go on as they began.
    return config | {"stochastic_rounding": options.dtype == "bfloat16"}


def _known(model: PreTrainedModel, prompts: PromptFormat, split: Split, least: float) -> Split:
    parts = []
    with job("find known facts", sum(map(len, split))) as bar:
        for facts in split:
            scores = score_facts(model, prompts, facts, progress=bar.advance) if facts else None
            parts.append(known_facts(scores, facts, least) if facts else [])
    return check_split(Split(*parts))


def _schedule(prompts: PromptFormat, split: Split, options: UnlearnOptions) -> Schedule:
    forget_batch = options.forget_batch or len(split.forget)
    retain_batch = options.retain_batch or min(forget_batch, len(split.retain))
    parts = []
    for name, number, facts in (("forget", forget_batch, split.forget), ("retain", retain_batch, split.retain)):
        if number > len(facts):
            raise ValueError(f"{name}_batch={number} is more than the {len(facts)} {name} facts; ask for fewer")
        parts.append((prompts.encode_facts(facts), number, name == "forget"))
    return Schedule(parts, options.max_steps * options.accumulate, options.seed)


def _train(
    model: PreTrainedModel,
    handle: sk.PatchHandle,
    prompts: PromptFormat,
    schedule: Schedule,
    split: Split,
    options: UnlearnOptions,
    run: Run,
) -> None:
    threshold = options.threshold
    if threshold is None:
        threshold = chance(split.forget) if all_have_options(split.forget) else ROUGE_THRESHOLD
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
    )
    checkpoint, done = run.rewind()
    last = run.last_metrics()
    with job(f"unlearn ({options.method})", options.max_steps) as bar:
        bar.advance(done)

        def write(line: dict) -> None:
            run.append_metrics(line)
            bar.advance()
            shown = ("loss", "fs", "rs", "forget_probability", "lambda", "share")
            bar.say(**{name: line[name] for name in shown if name in line})

        def stop(scores: dict) -> bool:
            return scores["fs"] <= threshold

        record = StepRecord(
            write, lambda model: evaluate_sets(model, prompts, split.forget, watched), options.evaluate_every, stop
        )
        trainer = UnlearnTrainer(
            model, arguments, schedule, prompts, record, handle=handle,
            method=get_method(options.method), options=_optimizer_options(options, run), target=options.target,
        )  # fmt: skip
        if "fs" in last and stop(last):
            trainer._load_from_checkpoint(str(checkpoint))  # the run was killed between its last step and its end
        else:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def _optimizer_options(options: UnlearnOptions, run: Run) -> OptimizerOptions:
    given = {name: value for name, value in asdict(options).items() if name in OptimizerOptions.__dataclass_fields__}
    return OptimizerOptions(**given, stochastic_rounding=run.read("config.json").get("stochastic_rounding", False))


def _sample(facts: Sequence[Fact], number: int, seed: int) -> list[Fact]:
    return random.Random(seed).sample(list(facts), min(number, len(facts)))
