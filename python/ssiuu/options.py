"""Options of the commands, declared once: for Python, the command line, YAML files and config.json.

One dataclass per command. Its "Attributes:" are the help of the command line (`arguments.py`). Options of methods and
regularizers are declared in their own classes. This module imports no torch, so that --help is fast.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .data.sources import BUILTIN

# Names that stand for a method and a regularizer.
PAIRS = {"ssiuu": ("gd", "ssiuu")}
# Of a diagnosis, in the order in which they are made.
DIAGNOSIS_PARTS = ("influence", "lens", "ablation", "cka", "drift")
# Where the Trainer can report to, and the packages of which one is needed.
REPORTERS = {"none": (), "tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is loaded.

    Attributes:
        model: hub name, local folder, or "smollm2" (the packaged SmolLM2-135M-Instruct).
        revision: branch, tag or commit of a model on the hub; None takes its main branch.
        dtype: of the weights, "float32", or "bfloat16" with stochastic rounding.
        attn_implementation: transformers' attention, such as "eager" or "sdpa"; None lets it choose.
        device_map: as transformers has it; "auto" loads straight to the GPU. The whole model must fit on one device.
        trust_remote_code: run code that comes with the model.
    """

    model: str = "smollm2"
    revision: str | None = None
    dtype: str = "float32"
    attn_implementation: str | None = None
    device_map: str | None = None
    trust_remote_code: bool = False

    def loading(self, **changes: Any) -> dict[str, Any]:
        """Keyword arguments of `models.load.load_model`, with changes."""
        return {name: getattr(self, name) for name in _names(ModelOptions) if name != "model"} | changes


def recorded_model(config: Mapping[str, Any]) -> ModelOptions:
    """The base model of a run with this config.json, which lacks some options if an earlier version wrote it."""
    return ModelOptions(**{name: config[name] for name in _names(ModelOptions) if name in config})


@dataclass(frozen=True)
class ProtocolOptions:
    """How facts are asked and scored.

    Attributes:
        shots: worked examples in the prompt, 0 to 3.
    """

    shots: int = 2


def recorded_protocol(config: Mapping[str, Any]) -> ProtocolOptions:
    """The protocol of a run with this config.json, which lacks some options if an earlier version wrote it."""
    return ProtocolOptions(**{name: config[name] for name in _names(ProtocolOptions) if name in config})


@dataclass(frozen=True)
class UnlearnOptions(ProtocolOptions, ModelOptions):
    """Options of an unlearning run.

    Attributes:
        method: name of a method (`ssiuu methods` lists them), or "ssiuu", which is gd with the regularizer ssiuu.
        regularizer: name of a regularizer, which goes on top of the method.
        facts: source of facts with subjects, split by person: "builtin", a .jsonl file or a datasets name; None where
            forget and retain, or data, are given.
        forget: source of the facts to forget, with retain; instead of facts.
        retain: source of the facts to keep, with forget; instead of facts.
        data: a benchmark with its own sets: "faithun", or "tofu-forget01", "tofu-forget05", "tofu-forget10", and
            "tofu-forget01-perturbed" and so on for the sets that have options; instead of facts.
        data_from: where data is: for "faithun" a folder with FaithUn_Dataset.json and its index files; for TOFU a
            folder with forget01.jsonl and so on, or a datasets name, by default "locuslab/TOFU".
        extra: another set of data for `ssiuu evaluate` to score; give it again for more. "faithun": paraphrases,
            multi_hop, same_object, about the facts to forget. TOFU: holdout, real_authors, world_facts. None takes
            those that are there.
        forget_people: people to forget, drawn from facts.
        retain_people: people to keep, drawn from facts.
        forget_facts: facts to forget at most, drawn evenly among the people; None takes all of them.
        retain_facts: facts to keep at most, likewise.
        test_facts: facts of other people at most, likewise.
        known_probability: keep only facts that the model answers with at least this probability; None keeps all.
        learning_rate: of AdamW; constant.
        weight_decay: of AdamW.
        engine: what makes the gradient of a penalty, "one-backward" or "two-backward" (as in the paper); the results
            differ in rounding. Unused where nothing needs it.
        update_in_backward: update each parameter during the backward and free its gradients, to save memory;
            regularizer ssiuu alone.
        max_steps: optimizer steps at most.
        forget_batch: forget facts in a micro-batch; 0 takes all of them.
        retain_batch: retain facts in a micro-batch; 0 takes as many as forget_batch.
        accumulate: micro-batches per step.
        threshold: stop when FS is at or below it; None means chance among the facts' options (1/3 with two false
            ones), and 0.1971 (ROUGE-L recall) without options; with stop_distance, None means no threshold.
        stop_facts: leave a forget fact out of the loss once it is answered wrongly (without options: scored at or
            below the threshold), until it is answered again; method klue does so by itself.
        stop_margin: with stop_facts, the log-likelihood per token by which a fact with options has to be answered
            wrongly to leave.
        stop_distance: stop when the trained weights are at least this far from the original ones (L2), even if the
            threshold is not reached; None for no such stop. Every stop is checked at evaluations alone.
        log_distance: log that distance at each evaluation; the original weights take a copy in host memory.
        evaluate_every: steps between evaluations.
        save_every: steps between checkpoints; 0 keeps none.
        evaluation_facts: retain facts scored along the way, at most.
        bf16: autocast to bfloat16.
        gradient_checkpointing: recompute activations, to save memory.
        report_to: where the numbers of every step go besides the run folder: "none", "tensorboard" (to checkpoints/runs
            in the run folder) or "wandb".
        seed: of the draw of people, of the order of facts, and of the method's own choices.
        settings: options of the method and of the regularizer, by name; what is left out has its default.
    """

    method: str = "ssiuu"
    regularizer: str = "none"
    facts: str | None = BUILTIN
    forget: str | None = None
    retain: str | None = None
    data: str | None = None
    data_from: str | None = None
    extra: list[str] | None = None
    forget_people: int = 4
    retain_people: int = 12
    forget_facts: int | None = None
    retain_facts: int | None = None
    test_facts: int | None = None
    known_probability: float | None = None
    learning_rate: float = 1e-5
    weight_decay: float = 0.0
    engine: str = "one-backward"
    update_in_backward: bool = False
    max_steps: int = 100
    forget_batch: int = 0
    retain_batch: int = 0
    accumulate: int = 1
    threshold: float | None = None
    stop_facts: bool = False
    stop_margin: float = 0.0
    stop_distance: float | None = None
    log_distance: bool = False
    evaluate_every: int = 1
    save_every: int = 10
    evaluation_facts: int = 24
    bf16: bool = False
    gradient_checkpointing: bool = False
    report_to: str = "none"
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> UnlearnOptions:
        """From names and values in which a run's options and those of its method and regularizer stand side by side."""
        own = {name: value for name, value in values.items() if name in OPTION_NAMES}
        return cls(**own, settings={name: value for name, value in values.items() if name not in OPTION_NAMES})

    def replace(self, **values: Any) -> UnlearnOptions:
        """A copy with other values, named as in `of`."""
        return self.of({**self.flat(), **values})

    def flat(self) -> dict[str, Any]:
        """The names and values of `of`."""
        return {**{name: getattr(self, name) for name in OPTION_NAMES}, **self.settings}

    def check(self) -> None:
        """Raise a ValueError for what can be known to be wrong before a model is loaded.

        The method and the regularizer check their own (`pairs.make`).
        """
        from ssiuu_kernels import ENGINES  # torch

        check_weights_dtype(self.dtype)
        if self.engine not in ENGINES:
            raise ValueError(f"engine={self.engine!r} is unknown; expected one of {', '.join(ENGINES)}")
        _check_sources(self)
        for name in ("max_steps", "accumulate", "evaluate_every", "forget_people", "retain_people", "evaluation_facts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")
        for name in ("forget_facts", "retain_facts", "test_facts"):
            check_limit(name, getattr(self, name))
        if self.data is not None and self.forget_facts is not None:
            raise ValueError(
                f"forget_facts={self.forget_facts} with data={self.data!r}, whose further sets are about all of its "
                "forget facts; leave forget_facts out"
            )
        for name in ("forget_batch", "retain_batch", "save_every", "weight_decay", "stop_margin"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 0")
        check_learning_rate(self.learning_rate)
        if self.threshold is not None and math.isnan(self.threshold):
            raise ValueError("threshold=nan; no score is at or below it: expected a number")
        if self.stop_distance is not None and not 0 < self.stop_distance < math.inf:
            raise ValueError(f"stop_distance={self.stop_distance}; expected a positive number")
        _check_reporter(self.report_to)


@dataclass(frozen=True)
class FinetuneOptions(ProtocolOptions, ModelOptions):
    """Options of fine-tuning on facts.

    Attributes:
        facts: source of the facts: "builtin", a .jsonl file or a datasets name.
        people: people whose facts are taught, drawn from facts; None takes all facts.
        steps: optimizer steps.
        batch_size: facts per step.
        learning_rate: of AdamW; constant.
        seed: of the draw of people and of the order of facts.
    """

    facts: str = BUILTIN
    people: int | None = None
    steps: int = 100
    batch_size: int = 16
    learning_rate: float = 1e-5
    shots: int = 0
    seed: int = 0

    def check(self) -> None:
        """Raise a ValueError for what can be known to be wrong before a model is loaded."""
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")
        check_limit("people", self.people)
        check_learning_rate(self.learning_rate)
        check_weights_dtype(self.dtype)


@dataclass(frozen=True, kw_only=True)
class RetrainingOptions:
    """What all attacks of one grid share.

    Attributes:
        pool: the facts that attacks are judged by: "wrong" are the forget facts that the unlearned model answers
            wrongly (the paper's on FaithUn), "all" are all of them (the paper's on TOFU). None takes "wrong" for facts
            with options, "all" without.
        steps: optimizer steps of each attack.
        until_flat: end an attack when the score and the margin of its unseen facts have not risen for this many
            evaluations (by more than 0.01, and 0.05 nats per token); `steps` are the most. None trains for all steps.
        batch_size: samples per step.
        instructions: data of the benign attack: "builtin", a .jsonl file or a datasets name (Alpaca's schema).
        evaluate_every: steps between evaluations.
        tuning: "full" trains all parameters (the paper), "lora" low-rank adapters on linear layers (needs peft).
        lora_rank: rank of the adapters.
        lora_alpha: the adapters' products are scaled by lora_alpha / lora_rank.
        lora_modules: names of the linear layers, such as q_proj; give it again for more. None takes all of them except
            the output head.
    """

    pool: str | None = None
    steps: int = 30
    until_flat: int | None = None
    batch_size: int = 8
    instructions: str = BUILTIN
    evaluate_every: int = 5
    tuning: str = "full"
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_modules: list[str] | None = None


@dataclass(frozen=True, kw_only=True)
class AttackOptions(RetrainingOptions):
    """Options of a grid of attacks: every kind, fraction, learning rate and seed.

    Attributes:
        kind: "harmful", "benign" or "quantised" (weights rounded to 4 bits; needs bitsandbytes); give it again for
            more. None takes harmful and benign.
        fraction: p of harmful attacks, which train on floor(p n) of the pool's n facts; give it again for more. None
            takes 0.3.
        learning_rate: of AdamW; give it again for more. None takes the paper's three of each kind, ten times as large
            for LoRA.
        seed: give it again for more. None takes 0.
        paper_grid: the paper's whole grid instead: harmful at p = 0.1 and 0.3, and benign, each at three learning rates
            with three seeds. 0.1 needs a pool of ten facts.
    """

    kind: list[str] | None = None
    fraction: list[float] | None = None
    learning_rate: list[float] | None = None
    seed: list[int] | None = None
    paper_grid: bool = False


@dataclass(frozen=True)
class DiagnoseOptions:
    """Options of a diagnosis.

    Attributes:
        part: "influence" (D+ and D- of every neuron), "lens" (at which layer the answer is ahead), "ablation" (does the
            fact come back without the neurons of largest D-), "cka" (similarity of the states to the original model's)
            or "drift" (how attributions move under an attack, which is repeated for it); give it again for more. None
            takes all but drift.
        batch_size: facts per forward and backward of the attribution.
        target: attributed quantity: "prob" (the paper), "geometric_mean_prob", "log_prob", "logit" (the sum of the
            answer tokens' logits) or "margin" (the answer against the original model's best false option). prob
            vanishes with P(answer), and log_prob grows as a model becomes sure of something else; the last two do
            neither.
        neurons: how many are set to zero in the ablation; give it again for more. None takes 10, 100 and 1000.
        seed: of the lens's wrong answers, and of the ablation's random neurons.
        attack: name of the attack that drift repeats, of a file in the run's attacks/. None takes the harmful one of
            the smallest fraction and largest learning rate.
        backend: of the kernels: "auto", "reference", "triton" or "native".
    """

    part: list[str] | None = None
    batch_size: int = 8
    target: str = "prob"
    neurons: list[int] | None = None
    seed: int = 0
    attack: str | None = None
    backend: str = "auto"

    def check(self) -> None:
        """Raise a ValueError for options out of range."""
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}; expected at least 1")
        for part in self.part or ():
            if part not in DIAGNOSIS_PARTS:
                raise ValueError(f"part={part!r} is unknown; expected one of {', '.join(DIAGNOSIS_PARTS)}")
        for count in self.neurons or ():
            if count < 1:
                raise ValueError(f"neurons={count}; expected at least 1")


# The ways to name the facts of a run; each replaces the others.
_SOURCES = (("facts",), ("forget", "retain"), ("data", "data_from", "extra"))


@dataclass(frozen=True, kw_only=True)
class AuditOptions(AttackOptions, ProtocolOptions):
    """Options of an audit.

    Attributes:
        before: the model that knows the facts: hub name, local folder, or "smollm2".
        after: the model that was unlearned from it, of the same architecture and with the same tokenizer.
        forget: source of the facts that were unlearned, with false options: a .jsonl file or a datasets name.
        retain: source of facts that were to be kept; only scored.
        test: source of facts that unlearning never saw; only scored.
        dtype: of the weights, "float32" or "bfloat16"; attacks train in float32.
        attn_implementation: transformers' attention, such as "eager" or "sdpa"; None lets it choose.
        device_map: as transformers has it.
        trust_remote_code: run code that comes with the models.
        batch_size: samples per step of an attack, and facts per batch of the attribution.
    """

    before: str
    after: str
    forget: str
    retain: str | None = None
    test: str | None = None
    dtype: str = "float32"
    attn_implementation: str | None = None
    device_map: str | None = None
    trust_remote_code: bool = False

    def attacks(self) -> AttackOptions:
        """The options of its attacks."""
        return AttackOptions(**{name: getattr(self, name) for name in _names(AttackOptions)})

    def loading(self, **changes: Any) -> dict[str, Any]:
        """Keyword arguments of `models.load.load_model`, with changes."""
        names = ("dtype", "attn_implementation", "device_map", "trust_remote_code")
        return {name: getattr(self, name) for name in names} | changes


def replacing_sets(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, in which facts, forget and retain, or data take the place of the two others.

    So a source on the command line replaces the one of a file, or the default.
    """
    given = [names for names in _SOURCES if any(values.get(name) is not None for name in names)]
    others = {name: None for names in _SOURCES if given and names not in given for name in names}
    return {**others, **values}


def check_limit(name: str, number: int | None) -> None:
    """Raise a ValueError for a limit below 1; None is no limit."""
    if number is not None and number < 1:
        raise ValueError(f"{name}={number}; expected at least 1")


def check_learning_rate(rate: float) -> None:
    """Raise a ValueError for a learning rate that is not a positive, finite number."""
    if not 0 < rate < math.inf:
        raise ValueError(f"learning_rate={rate}; expected a positive number")


def check_weights_dtype(dtype: str) -> None:
    """Raise a ValueError for weights that cannot be trained."""
    if dtype == "float16":
        raise ValueError(
            "dtype='float16' cannot be trained: AdamW's eps and second moments vanish in it; "
            "use --dtype bfloat16, or float32 with --bf16"
        )


def _check_sources(options: UnlearnOptions) -> None:
    from .data.registry import get_data_set

    both = [options.forget, options.retain]
    if sum([options.facts is not None, both != [None, None], options.data is not None]) != 1 or both.count(None) == 1:
        raise ValueError("give either facts, or forget and retain, or data; expected one source of both sets")
    if options.data is not None:
        get_data_set(options.data)
    elif options.data_from is not None or options.extra is not None:
        name = "data_from" if options.data_from is not None else "extra"
        raise ValueError(f"{name} is given without data; give data too, or leave {name} out")


def _check_reporter(name: str) -> None:
    if name not in REPORTERS:
        raise ValueError(f"report_to={name!r} is unknown; expected one of {', '.join(REPORTERS)}")
    packages = REPORTERS[name]
    if packages and not any(map(importlib.util.find_spec, packages)):
        raise ValueError(f"report_to={name!r} needs the package {packages[0]}; install it, or leave --report-to out")


def _names(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


OPTION_NAMES = tuple(name for name in _names(UnlearnOptions) if name != "settings")
