"""Wrong answers whose tokens can be compared with the true answer's."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ssiuu_kernels import IGNORE_INDEX

from ..data.facts import Fact
from ..data.prompts import Encoded, PromptFormat
from ..evaluation.likelihood import log_probs_and_lengths
from ..evaluation.mode import eval_mode

BATCH_SIZE = 48  # sequences per forward
OTHERS = 16  # answers of other facts that are tried


def draw_distractors(prompts: PromptFormat, facts: Sequence[Fact], seed: int) -> list[tuple[Encoded, int] | None]:
    """For each fact, its true answer and the first token of a wrong one, drawn at random; None where none compares.

    A wrong answer is one of the fact's false options; for a fact without, the answer of another fact. One that starts
    with the true answer's token does not compare, nor one that a tokenizer merges with the prompt's end: it is not
    predicted from the same tokens.

    Args:
        seed: of the draws; the same prompts, facts and seed give the same.
    """
    draw = random.Random(seed)
    others = sorted({fact.answer for fact in facts})
    found = []
    for fact, answer in zip(facts, prompts.encode_facts(facts), strict=True):
        if fact.false_options:
            wrong = prompts.encode_options([fact])[1:]
        else:
            candidates = [replace(fact, answer=other) for other in others if other != fact.answer]
            wrong = prompts.encode_facts(draw.sample(candidates, min(OTHERS, len(candidates))))
        tokens = [option.answer[0] for option in wrong if option.prompt == answer.prompt]
        tokens = [token for token in tokens if token != answer.answer[0]]
        found.append((answer, draw.choice(tokens)) if tokens else None)
    return found


def best_false_options(
    model: PreTrainedModel,
    prompts: PromptFormat,
    facts: Sequence[Fact],
    *,
    progress: Callable[[float], None] | None = None,
) -> list[Encoded | None]:
    """For each fact, the false option of highest log-likelihood per token; None where none compares.

    An option compares with the answer if the two part at a token of both, and are predicted from the same prompt: see
    target "margin" of `PatchHandle.attribute`. Attributions before and after unlearning compare for the same options
    only: take those of the original model for both.

    Args:
        progress: called with the number of facts done since the last call.

    Raises:
        ValueError: no fact has an option that compares.
    """
    options = []
    for fact, answer in zip(facts, prompts.encode_facts(facts), strict=True):
        wrong = prompts.encode_options([fact])[1:] if fact.false_options else []
        options.append([option for option in wrong if _part(answer, option)])
    flat = [option for of_fact in options for option in of_fact]
    if not flat:
        raise ValueError(
            f"target='margin' compares an answer with a false option, and none of the {len(facts)} facts has one that "
            "parts from the answer; use --target logit"
        )
    with eval_mode(model):
        log_probs, lengths = log_probs_and_lengths(model, prompts, flat, BATCH_SIZE, None)
    if progress is not None:
        progress(len(facts))
    scores = (log_probs / lengths).split([len(of_fact) for of_fact in options])
    return [of_fact[int(part.argmax())] if of_fact else None for of_fact, part in zip(options, scores, strict=True)]


def labels_of_others(labels: Tensor, options: Sequence[Encoded]) -> Tensor:
    """The batch's `other_labels` for target "margin": each option's tokens in place of the answer's, int64 `[B, S]`.

    Args:
        labels: int64 `[B, S]` of the answers; an option that is longer than its row is cut there.
    """
    other = torch.full_like(labels, IGNORE_INDEX)
    for row, start, option in zip(other, (labels != IGNORE_INDEX).int().argmax(1).tolist(), options, strict=True):
        tokens = torch.tensor(option.answer[: len(row) - start])
        row[start : start + len(tokens)] = tokens
    return other


def _part(answer: Encoded, option: Encoded) -> bool:
    differ = any(a != b for a, b in zip(answer.answer, option.answer, strict=False))
    return differ and answer.prompt == option.prompt
