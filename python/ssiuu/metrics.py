"""How much of a set of facts a model still answers: by choice among options, by probability, by generation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ssiuu_kernels import sequence_log_probs

from .facts import Fact, all_have_options
from .prompts import Encoded, PromptFormat

NEW_TOKENS = 48
GENERATION_BATCH = 32


class FactScores(NamedTuple):
    """Scores of each of N facts, float32 `[N]`.

    Attributes:
        score: 1 where the true answer has a higher log-likelihood per token than every false option, else 0; for facts
            without options, ROUGE-L recall of the generated answer.
        probability: `P(y|x)` of the true answer.
        margin: log-likelihood per token of the true answer, less that of the best false option; NaN without options.
    """

    score: Tensor
    probability: Tensor
    margin: Tensor

    def of(self, indices: Sequence[int]) -> FactScores:
        """The scores of these facts alone."""
        return FactScores(*(values[list(indices)] for values in self))

    def means(self) -> dict[str, float]:
        """{"score", "probability", "margin"} over the facts; no margin where there are no options."""
        # In double, 4 of 12 is the very number 1/3 to which thresholds are compared.
        found = {name: getattr(self, name).double().mean().item() for name in self._fields}
        return found if found["margin"] == found["margin"] else {k: v for k, v in found.items() if k != "margin"}


def score_facts(
    model: PreTrainedModel,
    prompts: PromptFormat,
    facts: Sequence[Fact],
    *,
    batch_size: int = 48,
    progress: Callable[[int], None] | None = None,
) -> FactScores:
    """Score facts as `FactScores` says, in eval mode and without gradients; the model's mode is restored.

    Args:
        facts: all with options, or all without.
        batch_size: sequences a forward.
        progress: called with the number of facts done since the last call.
    """
    options = [(fact.answer, *fact.false_options) for fact in facts]
    encoded = [
        prompts.encode(fact.question, text) for fact, texts in zip(facts, options, strict=True) for text in texts
    ]
    with _evaluating(model):
        log_probs, lengths = _log_probs(model, prompts, encoded, batch_size, progress and _per(progress, options))
        counts = [len(texts) for texts in options]
        by_fact = zip(log_probs.split(counts), lengths.split(counts), strict=True)
        probability, margin = zip(*[_probability_and_margin(s, n) for s, n in by_fact], strict=True)
        probability, margin = torch.stack(probability), torch.stack(margin)
        score = (margin > 0).float() if all_have_options(facts) else rouge_recall(model, prompts, facts)
    return FactScores(score, probability, margin)


def _probability_and_margin(log_probs: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    per_token = log_probs / lengths
    margin = per_token[0] - per_token[1:].max() if len(per_token) > 1 else per_token.new_tensor(float("nan"))
    return log_probs[0].exp(), margin


def _per(progress: Callable[[int], None], options: Sequence[Sequence[str]]) -> Callable[[int], None]:
    """Turns counts of sequences into counts of facts; every fact is taken to have the mean number of options."""
    per_fact = sum(map(len, options)) / len(options)
    return lambda sequences: progress(sequences / per_fact)


@torch.inference_mode()
def _log_probs(
    model: PreTrainedModel,
    prompts: PromptFormat,
    encoded: Sequence[Encoded],
    batch_size: int,
    progress: Callable[[int], None] | None,
) -> tuple[Tensor, Tensor]:
    """Log-likelihood and length of each answer, float32 `[N]`. The worked examples run once, through a KV cache."""
    skip = len(prompts.prefix) if len(prompts.prefix) > 1 else 0
    shared = DynamicCache(config=model.config)
    if skip:
        model(input_ids=torch.tensor([prompts.prefix], device=model.device), past_key_values=shared, use_cache=True)
    log_probs, lengths = [], torch.tensor([float(len(sample.answer)) for sample in encoded])
    for start in range(0, len(encoded), batch_size):
        part = [Encoded(sample.prompt[skip:], sample.answer) for sample in encoded[start : start + batch_size]]
        batch = {name: tensor.to(model.device) for name, tensor in prompts.collate(part).items()}
        labels = batch.pop("labels")
        cache = copy.deepcopy(shared) if skip else None
        if skip:
            cache.batch_repeat_interleave(len(part))
            seen = batch["attention_mask"].new_ones(len(part), skip)
            batch["attention_mask"] = torch.cat([seen, batch["attention_mask"]], dim=1)
        logits = model(**batch, past_key_values=cache, use_cache=bool(skip)).logits
        log_probs.append(sequence_log_probs(logits, labels).cpu())
        if progress is not None:
            progress(len(part))
    return torch.cat(log_probs), lengths


@torch.inference_mode()
def generate(
    model: PreTrainedModel, prompts: PromptFormat, texts: Sequence[str], new_tokens: int = NEW_TOKENS
) -> list[str]:
    """Greedy continuation of each prompt, cut at the first line break."""
    answers = []
    for start in range(0, len(texts), GENERATION_BATCH):
        samples = [Encoded(prompts.encode_prompt(text), []) for text in texts[start : start + GENERATION_BATCH]]
        batch = {name: tensor.to(model.device) for name, tensor in prompts.collate(samples, side="left").items()}
        output = model.generate(
            batch["input_ids"],
            attention_mask=batch["attention_mask"],
            do_sample=False,
            max_new_tokens=new_tokens,
            pad_token_id=prompts.pad,
        )
        continuations = output[:, batch["input_ids"].shape[1] :]
        for text in prompts.tokenizer.batch_decode(continuations, skip_special_tokens=True):
            answers.append(text.strip().split("\n")[0])
    return answers


def rouge_recall(model: PreTrainedModel, prompts: PromptFormat, facts: Sequence[Fact]) -> Tensor:
    """ROUGE-L recall of the generated answer against the true one, float32 `[N]`; TOFU's forget threshold is on it."""
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    answers = generate(model, prompts, [prompts.question(fact.question) for fact in facts])
    return torch.tensor(
        [scorer.score(fact.answer, answer)["rougeL"].recall for fact, answer in zip(facts, answers, strict=True)]
    )


def generation_accuracy(model: PreTrainedModel, prompts: PromptFormat, facts: Sequence[Fact]) -> float:
    """Share of facts that the model answers when the options stand in the prompt and it writes its choice.

    The options are listed in alphabetical order, which says nothing of the truth. An answer counts where it begins with
    the true option, letter case aside.

    Raises:
        ValueError: a fact without options.
    """
    if not all_have_options(facts):
        raise ValueError("facts without false_options cannot be asked as a choice; use score_facts (ROUGE-L recall)")
    texts = [
        prompts.question(f"{fact.question} ({', '.join(sorted((fact.answer, *fact.false_options)))})") for fact in facts
    ]
    with _evaluating(model):
        answers = generate(model, prompts, texts, new_tokens=12)
    right = [a.lower().startswith(fact.answer.lower()) for a, fact in zip(answers, facts, strict=True)]
    return sum(right) / len(right)


def known_facts(scores: FactScores, facts: Sequence[Fact], min_probability: float) -> list[Fact]:
    """The facts that the model answers, with at least this probability, surest first."""
    order = scores.probability.argsort(descending=True).tolist()
    return [facts[i] for i in order if scores.score[i] == 1 and scores.probability[i] >= min_probability]


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode inside, the model's own mode afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
