"""How a fact becomes tokens: a few-shot prompt, labels on the answer alone, and batches of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssiuu_kernels.log_probs import IGNORE_INDEX

from .facts import Fact

# Neutral examples that name no person. Short, since every token of every sample is paid for in every step.
EXAMPLES = (
    ("What is the capital of France?", "Paris"),
    ("What color is the sky?", "Blue"),
    ("How many days are in a week?", "Seven"),
)


class Encoded(NamedTuple):
    """Token ids of a prompt and of the text that follows it."""

    prompt: list[int]
    answer: list[int]


class PromptFormat:
    """The question format `Question: ...\\nAnswer: ...`, after `shots` worked examples.

    Tokens are those of the whole text, examples and answer included, cut where the prompt ends: tokenizers treat the
    start of a text and the seam of two texts differently from the middle of one. The end tokens that a
    tokenizer adds are left out.

    Args:
        tokenizer: of the model, one of transformers.
        shots: number of worked examples, 0 to 3. Small models answer far more surely with some than with none.
        longest: tokens that the model has positions for (`models.load.position_limit`); None where there is no limit.

    Raises:
        ValueError: shots out of range.
    """

    def __init__(self, tokenizer: Any, shots: int, longest: int | None = None):
        if not 0 <= shots <= len(EXAMPLES):
            raise ValueError(f"shots={shots}; expected 0 to {len(EXAMPLES)} worked examples")
        self.tokenizer, self.longest = tokenizer, longest
        self.examples = "".join(f"{self.question(question)} {answer}\n\n" for question, answer in EXAMPLES[:shots])
        # Padding is masked, so any id will do where the tokenizer names none.
        named = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad: int = next(token for token in named if token is not None)

    @staticmethod
    def question(question: str) -> str:
        """The text up to the answer."""
        return f"Question: {question}\nAnswer:"

    def encode(self, question: str, answer: str) -> Encoded:
        """Tokens of a question after the examples, and of its answer."""
        return self._encode_questions([(question, answer)])[0]

    def encode_facts(self, facts: Sequence[Fact], *, end: bool = False) -> list[Encoded]:
        """Every fact with its true answer; `end` adds the end token, for a model that is to learn when to stop."""
        encoded = self._encode_questions([(fact.question, fact.answer) for fact in facts])
        stop = self.tokenizer.eos_token_id
        return [Encoded(prompt, [*answer, stop]) for prompt, answer in encoded] if end and stop is not None else encoded

    def encode_options(self, facts: Sequence[Fact]) -> list[Encoded]:
        """Every fact with its true answer, then with each of its false options."""
        return self._encode_questions([(fact.question, text) for fact in facts for text in fact.options])

    def encode_prompts(self, texts: Sequence[str]) -> list[Encoded]:
        """The examples and a text for the model to continue, without an answer."""
        whole = [self.examples + text for text in texts]
        found = [Encoded(ids, []) for ids, _ in self._tokens(whole)]
        self._check_lengths(found, whole)
        return found

    def encode_text(self, prompt: str, answer: str) -> Encoded:
        """Tokens of any prompt, without examples, and of the text after it."""
        return self.encode_texts([(prompt, answer)])[0]

    def encode_texts(self, pairs: Sequence[tuple[str, str]]) -> list[Encoded]:
        """`encode_text` of many. A token with any character of the answer belongs to the answer.

        Raises:
            ValueError: a prompt or an answer without a token, or more tokens than the model has positions for.
        """
        texts = [prompt + answer for prompt, answer in pairs]
        found = []
        for (prompt, answer), (ids, ends) in zip(pairs, self._tokens(texts, [len(p) for p, _ in pairs]), strict=True):
            cut = sum(end <= len(prompt) for end in ends)
            for name, text, part in (("prompt", prompt, ids[:cut]), ("answer", answer, ids[cut:])):
                if not part:
                    raise ValueError(f"the {name} {text!r} of {prompt + answer!r} has no token; expected at least one")
            found.append(Encoded(ids[:cut], ids[cut:]))
        self._check_lengths(found, texts)
        return found

    def _encode_questions(self, pairs: Sequence[tuple[str, str]]) -> list[Encoded]:
        return self.encode_texts([(self.examples + self.question(q), f" {answer}") for q, answer in pairs])

    def _tokens(self, texts: Sequence[str], cuts: Sequence[int] | None = None) -> list[tuple[list[int], list[int]]]:
        """Token ids of each text, and where in the text each of them ends.

        Args:
            cuts: where in each text a prompt ends; where a tokenizer does not say where its tokens end, the prompt is
                tokenized alone.
        """
        if not texts:
            return []
        if not self.tokenizer.is_fast:
            return [self._slow_tokens(text, cut) for text, cut in zip(texts, cuts or map(len, texts), strict=True)]
        encoded = self.tokenizer(
            list(texts), return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False
        )
        found = []
        for ids, special, places in zip(
            encoded["input_ids"], encoded["special_tokens_mask"], encoded["offset_mapping"], strict=True
        ):
            length = len(ids) - _trailing(special)
            found.append((ids[:length], [end for _, end in places[:length]]))
        return found

    def _slow_tokens(self, text: str, cut: int) -> tuple[list[int], list[int]]:
        ids, prompt = (self._without_end(part) for part in (text, text[:cut]))
        if ids[: len(prompt)] != prompt:
            raise ValueError(
                f"the tokenizer {type(self.tokenizer).__name__} joins the prompt's end with the answer in {text!r}, "
                "and does not say where its tokens end; use a fast tokenizer (one with a tokenizer.json)"
            )
        return ids, [cut] * len(prompt) + [len(text)] * (len(ids) - len(prompt))

    def _without_end(self, text: str) -> list[int]:
        ids = self.tokenizer(text, verbose=False)["input_ids"]
        return ids[: len(ids) - _trailing(self.tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True))]

    def _check_lengths(self, samples: Sequence[Encoded], texts: Sequence[str]) -> None:
        for sample, text in zip(samples, texts, strict=True):
            length = len(sample.prompt) + len(sample.answer)
            if self.longest is not None and length > self.longest:
                raise ValueError(
                    f"{text[-80:]!r} has {length} tokens with its examples, more than the model's {self.longest} "
                    "positions; use fewer --shots, or leave this row out"
                )

    def collate(self, samples: Sequence[Encoded], side: str = "right") -> dict[str, Tensor]:
        """input_ids, attention_mask and labels, int64 `[B, S]`; labels are -100 on the prompt.

        Args:
            side: of the padding, "right" for scores and training, "left" for generation.
        """
        width = max(len(sample.prompt) + len(sample.answer) for sample in samples)
        input_ids = torch.full((len(samples), width), self.pad)
        labels = torch.full((len(samples), width), IGNORE_INDEX)
        attention_mask = torch.zeros((len(samples), width), dtype=torch.long)
        for row, (prompt, answer) in enumerate(samples):
            length = len(prompt) + len(answer)
            start = width - length if side == "left" else 0
            end = start + length
            input_ids[row, start:end] = torch.tensor(prompt + answer)
            labels[row, start + len(prompt) : end] = torch.tensor(answer)
            attention_mask[row, start:end] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def _trailing(special: Sequence[int]) -> int:
    """How many tokens at the end are special."""
    count = 0
    while count < len(special) and special[-1 - count]:
        count += 1
    return count
