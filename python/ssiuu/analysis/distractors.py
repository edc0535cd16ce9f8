"""Wrong answers whose tokens can be compared with the true answer's."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ..data.facts import Fact
from ..data.prompts import Encoded, PromptFormat


def draw_distractors(prompts: PromptFormat, facts: Sequence[Fact], seed: int) -> list[tuple[Encoded, int] | None]:
    """For each fact, its true answer and the first token of a wrong one, drawn at random; None where none compares.

    A wrong answer is one of the fact's false options; for a fact without, the answer of another fact. One that starts
    with the true answer's token does not compare, nor one that a tokenizer merges with the prompt's end: it is not
    predicted from the same tokens.

    Args:
        seed: of the draws; the same prompts, facts and seed give the same.
    """
    draw = random.Random(seed)
    found = []
    for fact in facts:
        wrong = fact.false_options or sorted({other.answer for other in facts} - {fact.answer})
        answer = prompts.encode(fact.question, fact.answer)
        drawn = (prompts.encode(fact.question, text) for text in draw.sample(wrong, len(wrong)))
        comparable = (option for option in drawn if option.prompt == answer.prompt)
        tokens = (option.answer[0] for option in comparable if option.answer[0] != answer.answer[0])
        token = next(tokens, None)
        found.append(None if token is None else (answer, token))
    return found
