"""How much of a set of facts a model still answers: choice among options, probability, margin."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssiuu_kernels import sequence_log_probs

from ..data.facts import Fact, judged_by_choice
from ..data.prompts import Encoded, PromptFormat
from .mode import eval_mode

SHORTEST_SHARED = 8  # tokens at the start of all prompts that are worth a forward of their own
CACHE_NAMES = ("cache", "past_key_values")  # what forwards call it, the newest name first


class FactScores(NamedTuple):
    """Scores of each of N facts, float32 `[N]`.

    Attributes:
        score: 1 where the true option has a higher log-likelihood per token than every false one, else 0; for facts
            that are not judged by choice (`judged_by_choice`), ROUGE-L recall of the generated answer.
        probability: `P(y|x)` of the true answer; of the true option where facts are judged by choice.
        margin: log-likelihood per token of the true option, less that of the best false one; NaN without choice.
    """

    score: Tensor
    probability: Tensor
    margin: Tensor

    def of(self, indices: Sequence[int]) -> FactScores:
        """The scores of these facts alone."""
        return FactScores(*(values[list(indices)] for values in self))

    def means(self) -> dict[str, float]:
        """{"score", "probability", "margin"} over the facts; no margin where there are no options."""
        # In float64, 4 of 12 is exactly the 1/3 to which thresholds are compared.
        found = {name: getattr(self, name).double().mean().item() for name in self._fields}
        return found if found["margin"] == found["margin"] else {k: v for k, v in found.items() if k != "margin"}


def score_facts(
    model: nn.Module,
    prompts: PromptFormat,
    facts: Sequence[Fact],
    *,
    choice: bool | None = None,
    batch_size: int = 48,
    progress: Callable[[int], None] | None = None,
) -> FactScores:
    """Score facts as `FactScores` says, in eval mode and without gradients; the model's mode is restored.

    Args:
        facts: all judged by choice, or none.
        choice: whether to judge by choice among the options, which the facts have then; None as `judged_by_choice`.
        batch_size: sequences per forward.
        progress: called with the number of facts done since the last call.
    """
    choice = judged_by_choice(facts) if choice is None else choice
    counts = [len(fact.options) if choice else 1 for fact in facts]
    # Writing the answers takes most of the time where there are no options, and choosing takes all of it elsewhere.
    chosen, written = (progress, None) if choice else (None, progress)
    with eval_mode(model):
        encoded = prompts.encode_options(facts) if choice else prompts.encode_facts(facts)
        log_probs, lengths = log_probs_and_lengths(model, prompts, encoded, batch_size, chosen and _per(chosen, counts))
        by_fact = zip(log_probs.split(counts), lengths.split(counts), strict=True)
        probability, margin = zip(*[_probability_and_margin(s, n) for s, n in by_fact], strict=True)
        probability, margin = torch.stack(probability), torch.stack(margin)
        if choice:
            score = (margin > 0).float()
        else:
            from .rouge import rouge_recall  # loads transformers and nltk, for which a list of methods should not wait

            score = rouge_recall(model, prompts, facts, written)
    return FactScores(score, probability, margin)


def chance(facts: Sequence[Fact]) -> float:
    """Score of answers drawn at random among each fact's options: 1/3 where all have two false ones."""
    return float(sum(Fraction(1, len(fact.options)) for fact in facts) / len(facts))


def _probability_and_margin(log_probs: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    per_token = log_probs / lengths
    margin = per_token[0] - per_token[1:].max() if len(per_token) > 1 else per_token.new_tensor(float("nan"))
    return log_probs[0].exp(), margin


def _per(progress: Callable[[int], None], counts: Sequence[int]) -> Callable[[int], None]:
    """Turns counts of sequences into counts of facts; every fact is taken to have the mean number of options."""
    per_fact = sum(counts) / len(counts)
    return lambda sequences: progress(sequences / per_fact)


@torch.inference_mode()
def log_probs_and_lengths(
    model: nn.Module,
    prompts: PromptFormat,
    encoded: Sequence[Encoded],
    batch_size: int,
    progress: Callable[[int], None] | None,
) -> tuple[Tensor, Tensor]:
    """Log-likelihood and length of each answer, float32 `[N]`. The tokens that all prompts begin with run once."""
    start = _SharedStart.of(model, [sample.prompt for sample in encoded])
    log_probs, lengths = [], torch.tensor([float(len(sample.answer)) for sample in encoded])
    for first in range(0, len(encoded), batch_size):
        part = [Encoded(sample.prompt[start.length :], sample.answer) for sample in encoded[first : first + batch_size]]
        batch = {name: tensor.to(model.device) for name, tensor in prompts.collate(part).items()}
        labels = batch.pop("labels")
        logits = model(**start.put_before(batch)).logits
        log_probs.append(sequence_log_probs(logits, labels).cpu())
        if progress is not None:
            progress(len(part))
    return torch.cat(log_probs), lengths


class _SharedStart(NamedTuple):
    """The tokens that all prompts begin with, as transformers' KV cache; of length 0 where there is none."""

    length: int
    name: str | None
    cache: Any

    @classmethod
    def of(cls, model: nn.Module, prompts: Sequence[Sequence[int]]) -> _SharedStart:
        nothing = cls(0, None, None)
        first, last = min(prompts), max(prompts)  # what these two share, all do
        length = next((i for i, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
        length = min(length, min(map(len, prompts)) - 1)  # the answer's first token needs one before it
        taken = inspect.signature(model.forward).parameters
        name = next((name for name in CACHE_NAMES if name in taken), None)
        if length < SHORTEST_SHARED or len(prompts) == 1 or name is None:
            return nothing
        from transformers import DynamicCache

        cache = DynamicCache(config=model.config)
        ids = torch.tensor([list(first[:length])], device=model.device)
        model(input_ids=ids, use_cache=True, **{name: cache})
        # A forward that ignores the argument leaves the cache empty; running whole prompts is right too, only slower.
        return cls(length, name, cache) if cache.get_seq_length() == length else nothing

    def put_before(self, batch: dict[str, Tensor]) -> dict:
        """The arguments of a forward over `batch`, which follows the shared tokens."""
        if not self.length:
            return {**batch, "use_cache": False}
        rows = len(batch["input_ids"])
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(rows)
        seen = batch["attention_mask"].new_ones(rows, self.length)
        mask = torch.cat([seen, batch["attention_mask"]], dim=1)
        return {**batch, "attention_mask": mask, self.name: cache, "use_cache": True}
