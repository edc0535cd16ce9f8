"""Tiny models of several families on one vocabulary of words, and facts in these words."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ssiuu.data.facts import Fact
from ssiuu.data.prompts import PromptFormat

TEXT = "Question : Answer where is ann bob cid dee eve fay gil hal ? rome oslo lima bonn kyiv on the sea"


@pytest.fixture
def prompts():
    """Each word a token, of at most 61, which tiny models have."""
    raw = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(["<unk>", "<end>", *TEXT.split()])}, unk_token="<unk>")
    )
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PromptFormat(PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", unk_token="<unk>"), 0)


@pytest.fixture
def encode(prompts):
    """(question, text) -> tokens of the question and of this answer to it."""
    return lambda question, text: prompts.encode_facts([Fact(question, text)])[0]


@pytest.fixture
def facts():
    """Eight facts of different lengths with one false option each."""
    towns = ("rome", "oslo on the sea", "lima", "bonn", "kyiv on the sea")
    people = ("ann", "bob", "cid", "dee", "eve", "fay", "gil", "hal")
    return [
        Fact(f"where is {person}" + " ?" * (i % 3), towns[i % 5], (towns[(i + 1 + i % 3) % 5],), person)
        for i, person in enumerate(people)
    ]
