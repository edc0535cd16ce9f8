"""Greedy generation, whatever a model's own generation config asks for, and the accuracy of choices it writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria

from ..data.facts import Fact, all_have_options
from ..data.prompts import PromptFormat
from ..data.words import chosen_option
from .mode import eval_mode

NEW_TOKENS = 48  # at least; see `room_for`
CHOICE_TOKENS = 12  # at least, for a choice that is written
BATCH = 32


def room_for(answers: Sequence[Sequence[int]], least: int = NEW_TOKENS) -> int:
    """New tokens that leave room for these answers in the model's own words: half as many again as the longest has."""
    return max(least, max(map(len, answers)) * 3 // 2)


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    prompts: PromptFormat,
    texts: Sequence[str],
    new_tokens: int = NEW_TOKENS,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Greedy continuation of each prompt, cut at the first line break.

    Args:
        new_tokens: at most.
        progress: called with the number of texts done since the last call.

    Raises:
        ValueError: a prompt that leaves no position for an answer.
    """
    answers = []
    encoded = prompts.encode_prompts(texts)
    for start in range(0, len(texts), BATCH):
        samples = encoded[start : start + BATCH]
        batch = {name: tensor.to(model.device) for name, tensor in prompts.collate(samples, side="left").items()}
        width = batch["input_ids"].shape[1]
        room = new_tokens if prompts.longest is None else min(new_tokens, prompts.longest - width)
        if room < 1:
            raise ValueError(
                f"a prompt of {width} tokens fills the model's {prompts.longest} positions; use fewer --shots"
            )
        with _own_generation_config(model, prompts, room) as config:
            output = model.generate(
                batch["input_ids"],
                attention_mask=batch["attention_mask"],
                generation_config=config,
                stopping_criteria=[_FirstLineEnds(prompts, width)],
            )
        for text in _decode(prompts, output, width):
            answers.append(_first_line(text))
        if progress is not None:
            progress(len(samples))
    return answers


def generation_accuracy(model: PreTrainedModel, prompts: PromptFormat, facts: Sequence[Fact]) -> float:
    """Share of facts that the model answers when the prompt lists the options and the model writes its choice.

    The options are in alphabetical order, which does not reveal the true one. A choice is the longest option that the
    answer begins with, as whole words and in any letter case.

    Raises:
        ValueError: a fact without options.
    """
    if not all_have_options(facts):
        raise ValueError("facts without false_options cannot be asked as a choice; use score_facts (ROUGE-L recall)")
    texts = [prompts.question(f"{fact.question} ({', '.join(sorted(fact.options))})") for fact in facts]
    room = room_for([sample.answer for sample in prompts.encode_options(facts)], CHOICE_TOKENS)
    with eval_mode(model):
        answers = generate(model, prompts, texts, new_tokens=room)
    right = [chosen_option(a, fact.options) == fact.true_option for a, fact in zip(answers, facts, strict=True)]
    return sum(right) / len(right)


@contextmanager
def _own_generation_config(model: PreTrainedModel, prompts: PromptFormat, room: int) -> Iterator[GenerationConfig]:
    """A greedy config that keeps only the end tokens of the model's own.

    `generate` fills what a config leaves open (repetition_penalty, num_beams, ...) from the model's own config, so this
    one replaces it meanwhile.
    """
    kept = model.generation_config
    ends = set()
    for tokens in (getattr(kept, "eos_token_id", None), prompts.tokenizer.eos_token_id):
        ends |= set(tokens) if isinstance(tokens, list) else {tokens} - {None}
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=room,
        eos_token_id=sorted(ends) or None,
        pad_token_id=prompts.pad,
    )
    try:
        yield model.generation_config
    finally:
        model.generation_config = kept


class _FirstLineEnds(StoppingCriteria):
    """Ends a sample once its continuation has a line that is not empty: what follows would be cut."""

    def __init__(self, prompts: PromptFormat, width: int):
        self.prompts, self.width = prompts, width

    def __call__(self, input_ids: Tensor, scores: Tensor, **_) -> Tensor:
        done = ["\n" in text.lstrip() for text in _decode(self.prompts, input_ids, self.width)]
        return torch.tensor(done, device=input_ids.device)


def _first_line(text: str) -> str:
    """The first line that is not empty; the same whether or not text follows its line break."""
    return text.lstrip().split("\n")[0].rstrip()


def _decode(prompts: PromptFormat, output: Tensor, width: int) -> list[str]:
    return prompts.tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
