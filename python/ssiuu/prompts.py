"""How a fact becomes tokens: a few-shot prompt, labels on the answer alone, and batches of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

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

    Args:
        tokenizer: of the model.
        shots: number of worked examples, 0 to 3. Small models answer far more surely with some than with none.

    Raises:
        ValueError: shots out of range.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, shots: int):
        if not 0 <= shots <= len(EXAMPLES):
            raise ValueError(f"shots={shots}; expected 0 to {len(EXAMPLES)} worked examples")
        self.tokenizer = tokenizer
        examples = "".join(f"{self.question(question)} {answer}\n\n" for question, answer in EXAMPLES[:shots])
        # Tokenised apart from the question, so that all facts share these very tokens.
        self.prefix: list[int] = tokenizer(examples).input_ids if examples else tokenizer("").input_ids
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    @staticmethod
    def question(question: str) -> str:
        """The text up to the answer."""
        return f"Question: {question}\nAnswer:"

    def encode(self, question: str, answer: str) -> Encoded:
        """Tokens of a question after the examples, and of its answer."""
        return self.encode_text(self.question(question), f" {answer}", self.prefix)

    def encode_prompt(self, text: str) -> list[int]:
        """Tokens of the examples and of a text for the model to continue."""
        return self.prefix + self.tokenizer(text, add_special_tokens=False).input_ids

    def encode_text(self, prompt: str, answer: str, prefix: Sequence[int] | None = None) -> Encoded:
        """Tokens of any prompt and the text after it; `prefix` defaults to what the tokenizer begins texts with."""
        start = self.tokenizer("").input_ids if prefix is None else list(prefix)
        ids = [self.tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, answer)]
        if not ids[1]:
            raise ValueError(f"the answer {answer!r} to {prompt!r} has no token; expected at least one")
        return Encoded(start + ids[0], ids[1])

    def encode_facts(self, facts: Sequence[Fact]) -> list[Encoded]:
        """Every fact with its true answer."""
        return [self.encode(fact.question, fact.answer) for fact in facts]

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
