"""Does an answer go with its own question? A test that no constant preference for or against an answer can move.

A fact is compared with its own question put to other people: is its answer, against its false options, preferred
more after its own question than after theirs? A model that does not know the fact has no reason to, whatever it thinks
of the answer: it may never say it (it was never taught, or an offset on the output forbids it) or say it always (an
attack has just taught it for others). So the share of other questions at which the answer is preferred less is uniform
over its possible values, and its mean over facts is 0.5. It is 1 for facts that are there. Below 0.5, something that
tells the right question from others pushes the answer down.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from ..data.facts import Fact
from ..data.prompts import Encoded, PromptFormat
from ..evaluation.likelihood import log_probs_and_lengths
from ..evaluation.mode import eval_mode
from ..evaluation.states import at_last_prompt_token, states_of
from ..models.layers import LogitLens, decoder_layers

QUESTIONS = 8  # other questions per fact, at most
BATCH_SIZE = 48  # sequences per forward


@dataclass(frozen=True)
class Matches:
    """How well N facts match their own questions.

    Attributes:
        shares: of each fact, the share of other questions at which its answer is preferred less; ties count half.
        others: the number of other questions of each.
    """

    shares: list[float]
    others: list[int]

    @property
    def mean(self) -> float:
        """Over the facts: 0.5 where none is known, 1 where all are; NaN where there are none."""
        return sum(self.shares) / len(self.shares) if self.shares else math.nan

    @property
    def deviation(self) -> float:
        """Standard deviation of the mean where no fact is known."""
        # Of a uniform draw from 0, 1/K, ..., 1 the variance is (K + 2) / 12K.
        return math.sqrt(sum((k + 2) / (12 * k) for k in self.others)) / len(self.others)

    def p_values(self) -> tuple[float, float]:
        """How likely a mean at least as high, and at least as low, is where no fact is known."""
        unit = math.lcm(*self.others)
        chances = torch.ones(1, dtype=torch.float64)
        for k in self.others:
            wider = chances.new_zeros(len(chances) + unit)
            for step in range(k + 1):
                start = step * unit // k
                wider[start : start + len(chances)] += chances / (k + 1)
            chances = wider
        total = sum(self.shares) * unit
        return chances[math.ceil(total - 1e-6) :].sum().item(), chances[: math.floor(total + 1e-6) + 1].sum().item()

    def as_json(self) -> dict:
        """For the audit's file; `Matches(shares, others)` reads it."""
        return {"mean": self.mean, "shares": self.shares, "others": self.others}


def other_questions(facts: Sequence[Fact], seed: int, without: Collection[str] = ()) -> list[list[str]]:
    """For each fact, questions of the same kind that its answer is not known to answer, at most `QUESTIONS`, at random.

    They are its own question about the other subjects of `facts`, where it names its subject. Otherwise they are the
    questions of facts that share an option with it, which are of its kind too. None where there are none.

    Args:
        without: questions to leave out.
    """
    draw, answers = random.Random(seed), {fact.question: fact.answer for fact in facts}
    subjects = list(dict.fromkeys(fact.subject for fact in facts if fact.subject))
    found = []
    for fact in facts:
        candidates = _about_others(fact, subjects) or _of_the_same_options(fact, facts)
        fit = [q for q in dict.fromkeys(candidates) if q not in without and answers.get(q) != fact.answer]
        found.append(draw.sample(fit, min(QUESTIONS, len(fit))))
    return found


def _about_others(fact: Fact, subjects: Sequence[str]) -> list[str]:
    if not fact.subject:
        return []
    name = re.compile(rf"(?<!\w){re.escape(fact.subject)}(?!\w)")
    if not name.search(fact.question):
        return []
    return [name.sub(lambda _, other=other: other, fact.question) for other in subjects if other != fact.subject]


def _of_the_same_options(fact: Fact, facts: Sequence[Fact]) -> list[str]:
    own = set(fact.options)
    return [other.question for other in facts if other != fact and own & set(other.options)]


def match_outputs(
    model: PreTrainedModel, prompts: PromptFormat, facts: Sequence[Fact], questions: Sequence[Sequence[str]]
) -> Matches:
    """Matches by the model's outputs: log-likelihood per token of the true option, less the mean of the false ones.

    Args:
        facts: with options; at least one.
        questions: other questions of each fact, at least one.
    """
    asked = _asked(facts, questions)
    with eval_mode(model):
        log_probs, lengths = log_probs_and_lengths(model, prompts, prompts.encode_options(asked), BATCH_SIZE, None)
    scores = (log_probs / lengths).double().split([len(fact.options) for fact in asked])
    return _matches([(s[0] - s[1:].mean()).item() for s in scores], questions)


def match_states(
    model: PreTrainedModel,
    lens: LogitLens,
    prompts: PromptFormat,
    facts: Sequence[Fact],
    questions: Sequence[Sequence[str]],
) -> list[Matches]:
    """Matches by the residual stream after each decoder layer: logit of the true option's first token, less the mean
    of the false ones', at the prompt's last token.

    Args:
        lens: final norm and output head, of this model or of another one with the same architecture.
        facts, questions: as for `match_outputs`, of which `comparable` is true.
    """
    asked = _asked(facts, questions)
    options = list(_options(prompts, asked))
    layers = decoder_layers(model)
    preferences: list[list[float]] = [[] for _ in layers]
    done = 0
    for batch, states, _ in states_of(model, layers, prompts, [encoded[0] for encoded in options]):
        part = options[done : done + len(batch["labels"])]
        for found, state in zip(preferences, states, strict=True):
            logits = lens(at_last_prompt_token(state, batch["labels"])).double().cpu()
            for row, encoded in zip(logits, part, strict=True):
                first, *others = (row[option.answer[0]] for option in encoded if _compares(option, encoded[0]))
                found.append((first - torch.stack(others).mean()).item())
        done += len(part)
    return [_matches(found, questions) for found in preferences]


def comparable(prompts: PromptFormat, facts: Sequence[Fact]) -> list[bool]:
    """Of each fact, whether a false option starts with another token than the true one, after the same prompt."""
    return [sum(_compares(option, options[0]) for option in options) > 1 for options in _options(prompts, facts)]


def _asked(facts: Sequence[Fact], questions: Sequence[Sequence[str]]) -> list[Fact]:
    """Each fact after its own question, then after the others."""
    pairs = zip(facts, questions, strict=True)
    return [replace(fact, question=question) for fact, others in pairs for question in (fact.question, *others)]


def _options(prompts: PromptFormat, facts: Sequence[Fact]) -> Iterator[list[Encoded]]:
    encoded = iter(prompts.encode_options(facts))
    for fact in facts:
        yield list(itertools.islice(encoded, len(fact.options)))


def _compares(option: Encoded, true: Encoded) -> bool:
    return option is true or (option.prompt == true.prompt and option.answer[0] != true.answer[0])


def _matches(preferences: Sequence[float], questions: Sequence[Sequence[str]]) -> Matches:
    found = iter(preferences)
    shares, counts = [], [len(others) for others in questions]
    for count in counts:
        own, others = next(found), torch.tensor(list(itertools.islice(found, count)), dtype=torch.float64)
        shares.append((((others < own).double() + 0.5 * (others == own).double()).mean()).item())
    return Matches(shares, counts)
