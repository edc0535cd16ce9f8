"""How facts are asked and scored in a run: the prompt format and the scoring, as one object."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.facts import Fact
from ..data.prompts import PromptFormat
from ..models.load import position_limit
from ..options import ProtocolOptions, recorded_protocol
from .likelihood import FactScores, score_facts


@dataclass(frozen=True)
class Protocol:
    """How facts are asked and scored.

    Attributes:
        prompts: how facts become tokens: in training, attribution and scores.
    """

    prompts: PromptFormat

    @classmethod
    def of(
        cls, options: ProtocolOptions | Mapping[str, Any], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> Protocol:
        """The protocol of these options, or of a run with this config.json, for this model.

        Raises:
            ValueError: options out of range.
        """
        if isinstance(options, Mapping):
            options = recorded_protocol(options)
        return cls(PromptFormat(tokenizer, options.shots, position_limit(model)))

    def score(
        self, model: PreTrainedModel, facts: Sequence[Fact], *, progress: Callable[[float], None] | None = None
    ) -> FactScores:
        """Score facts in eval mode and without gradients; the model's mode is restored.

        Args:
            facts: at least one.
            progress: called with the number of facts done since the last call.
        """
        return score_facts(model, self.prompts, facts, progress=progress)
