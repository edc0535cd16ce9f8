"""ROUGE-L recall of generated answers, for facts without options."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor
from transformers import PreTrainedModel

from ..data.facts import Fact
from ..data.prompts import PromptFormat
from ..data.words import WordTokenizer
from .generation import generate, room_for


def rouge_recall(
    model: PreTrainedModel,
    prompts: PromptFormat,
    facts: Sequence[Fact],
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """ROUGE-L recall of the generated answer against the true one, float32 `[N]`, as TOFU scores answers.

    Args:
        progress: called with the number of facts done since the last call.
    """
    scorer = RougeScorer(["rougeL"], tokenizer=WordTokenizer())
    room = room_for([sample.answer for sample in prompts.encode_facts(facts)])
    answers = generate(model, prompts, [prompts.question(fact.question) for fact in facts], room, progress)
    return torch.tensor(
        [scorer.score(fact.answer, answer)["rougeL"].recall for fact, answer in zip(facts, answers, strict=True)]
    )
