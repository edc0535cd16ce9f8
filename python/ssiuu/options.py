"""Options of an unlearning run, declared once: for Python, the command line, YAML files and config.json."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ssiuu_kernels.loss.unlearning import ENGINES

from .data.sources import BUILTIN
from .training.optimizers import check_learning_rate, check_weights_dtype


@dataclass(frozen=True)
class UnlearnOptions:
    """Options of a run.

    Attributes:
        model: hub name, local folder, or "smollm2" (the packaged SmolLM2-135M-Instruct).
        method: name of a method (`ssiuu methods` lists them), or "ssiuu", which is gd with the regularizer ssiuu.
        regularizer: name of a regularizer, which goes on top of the method.
        facts: source of facts with subjects, split by person: "builtin", a .jsonl file or a datasets name; None where
            forget and retain are given.
        forget, retain: sources of the two sets.
        forget_people, retain_people: people drawn from facts.
        known_probability: keep only facts that the model answers with at least this probability; None keeps all.
        shots: worked examples in the prompt, 0 to 3.
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
            ones), and 0.1971 (ROUGE-L recall) without options.
        evaluate_every: steps between evaluations.
        save_every: steps between checkpoints; 0 keeps none.
        evaluation_facts: retain facts scored along the way, at most.
        dtype: of the weights, "float32", or "bfloat16" with stochastic rounding.
        bf16: autocast to bfloat16.
        gradient_checkpointing: recompute activations, to save memory.
        trust_remote_code: run code that comes with the model.
        seed: of the draw of people, of the order of facts, and of the method's own choices.
        settings: options of the method and of the regularizer, by name; what is left out has its default.
    """

    model: str = "smollm2"
    method: str = "ssiuu"
    regularizer: str = "none"
    facts: str | None = BUILTIN
    forget: str | None = None
    retain: str | None = None
    forget_people: int = 4
    retain_people: int = 12
    known_probability: float | None = None
    shots: int = 2
    learning_rate: float = 1e-5
    weight_decay: float = 0.0
    engine: str = ENGINES[0]
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

        The method and the regularizer check their own (`methods.registry.make`).
        """
        check_weights_dtype(self.dtype)
        if self.engine not in ENGINES:
            raise ValueError(f"engine={self.engine!r} is unknown; expected one of {', '.join(ENGINES)}")
        if (self.facts is None) != (self.forget is not None and self.retain is not None):
            raise ValueError("give either facts, or forget and retain; expected one source of both sets")
        for name in ("max_steps", "accumulate", "evaluate_every", "forget_people", "retain_people", "evaluation_facts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")
        for name in ("forget_batch", "retain_batch", "save_every", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 0")
        check_learning_rate(self.learning_rate)
        if self.threshold is not None and math.isnan(self.threshold):
            raise ValueError("threshold=nan; no score is at or below it: expected a number")


OPTION_NAMES = tuple(field.name for field in dataclasses.fields(UnlearnOptions) if field.name != "settings")
