"""The parts of a diagnosis: what is measured in one model, and what comes of it in two."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..data.facts import Fact
from ..data.prompts import Encoded
from ..evaluation.protocol import Protocol
from .ablation import ablation
from .distractors import best_false_options, labels_of_others
from .drift import drift, mean_attributions
from .influence import Influence, Variation, summarise, variation_by_kind
from .logit_lens import LensShares, logit_lens
from .measure import measure_influence
from .similarity import FEWEST, cka_by_layer, drawn_facts, prompt_states


@dataclass
class DiagnosedModel:
    """One model and what was measured in it; each property measures when it is first read, and keeps what it found.

    Attributes:
        model: None once everything that is needed was read.
        protocol: how facts are asked and scored.
        forget, retain: the sets.
        target: what neurons are credited with, of `ssiuu_kernels.ATTRIBUTION_TARGETS`.
        seed: of the lens's distractors.
        batch_size: facts per forward and backward of the attribution.
        backend: of the kernels.
        advance: called with the number of facts done since the last call.
        original: the model of before, whose false options target "margin" takes; None where this is that model.
    """

    model: PreTrainedModel | None
    protocol: Protocol
    forget: Sequence[Fact]
    retain: Sequence[Fact]
    target: str = "prob"
    seed: int = 0
    batch_size: int = 8
    backend: str = "auto"
    advance: Callable[[float], None] | None = None
    original: DiagnosedModel | None = None

    def measure(self, name: str) -> None:
        """Read a property, to have it without the model."""
        getattr(self, name)

    @cached_property
    def false_options(self) -> list[Encoded | None]:
        """What target "margin" compares each fact's answer with; None for a fact that has nothing to compare with."""
        if self.original is not None:
            return self.original.false_options
        return best_false_options(self.model, self.protocol.prompts, self.forget)

    @cached_property
    def attributed(self) -> list[tuple[Encoded, Encoded | None]]:
        """The samples of the attribution, with their false options where the target needs them."""
        samples = self.protocol.prompts.encode_facts(self.forget)
        if self.target != "margin":
            return [(sample, None) for sample in samples]
        pairs = zip(samples, self.false_options, strict=True)
        return [(sample, option) for sample, option in pairs if option is not None]

    @cached_property
    def influence(self) -> dict[str, Influence]:
        """Of every neuron over the forget set."""
        started = time.perf_counter()
        found = measure_influence(
            self.model, self._batches(), target=self.target, backend=self.backend, progress=self.advance
        )
        self.seconds = time.perf_counter() - started
        return found

    def _batches(self):
        for first in range(0, len(self.attributed), self.batch_size):
            samples, options = zip(*self.attributed[first : first + self.batch_size], strict=True)
            batch = self.protocol.prompts.collate(samples)
            if self.target == "margin":
                batch["other_labels"] = labels_of_others(batch["labels"], options)
            yield batch

    @cached_property
    def lens(self) -> LensShares:
        """Over the forget set."""
        return logit_lens(self.model, self.protocol.prompts, self.forget, seed=self.seed, progress=self.advance)

    @cached_property
    def states(self) -> dict[str, Tensor]:
        """Of the forget and the retain set, for CKA; without a set of too few facts."""
        sets = {"forget": drawn_facts(self.forget), "retain": drawn_facts(self.retain)}
        return {
            name: prompt_states(self.model, self.protocol.prompts, facts, progress=self.advance)
            for name, facts in sets.items()
            if len(facts) >= FEWEST
        }


def influence_of(before: DiagnosedModel, after: DiagnosedModel) -> tuple[dict[str, Any], dict[str, Variation]]:
    """Influence variation, summarised and of every neuron.

    Returns:
        `summarise`, "samples" (facts), "left_out" (facts that target "margin" cannot take), "target", "seconds"
        {"before", "after"}; and `variation_by_kind`.
    """
    variations = variation_by_kind(before.influence, after.influence)
    samples = len(after.attributed)
    return summarise(variations) | {
        "samples": samples,
        "left_out": len(after.forget) - samples,
        "target": after.target,
        "seconds": {"before": before.seconds, "after": after.seconds},
    }, variations


def lens_of(before: DiagnosedModel, after: DiagnosedModel) -> dict[str, Any]:
    """{"before", "after": `LensShares` as a dictionary}."""
    return {"before": before.lens._asdict(), "after": after.lens._asdict()}


def cka_of(before: DiagnosedModel, after: DiagnosedModel) -> dict[str, Any]:
    """{"forget", "retain": `cka_by_layer`; "facts": {"forget", "retain"}}, without a set of too few facts."""
    found = {name: cka_by_layer(states, after.states[name]) for name, states in before.states.items()}
    return found | {"facts": {name: len(states) for name, states in before.states.items()}}


def ablation_of(
    after: DiagnosedModel, variations: Mapping[str, Variation], counts: Sequence[int], seed: int
) -> dict[str, Any]:
    """See `ablation`."""
    return ablation(
        after.model, after.protocol, after.forget, variations, counts=counts, seed=seed, progress=after.advance
    )


def drift_of(before: DiagnosedModel, after: DiagnosedModel, attacked: DiagnosedModel) -> dict[str, Any]:
    """See `drift`."""
    return drift(*(mean_attributions(model.influence) for model in (before, after, attacked)))
