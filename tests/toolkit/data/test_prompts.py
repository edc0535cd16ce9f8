"""From facts to tokens."""

import pytest

from ssiuu.data.prompts import Encoded, PromptFormat


def test_labels_stand_on_the_answer_alone(loaded):
    _, tokenizer = loaded
    prompts = PromptFormat(tokenizer, 1)
    batch = prompts.collate([prompts.encode("where ann born", "rome")])
    answered = batch["labels"][0] != -100
    assert tokenizer.decode(batch["labels"][0][answered]) == "rome"
    assert (batch["input_ids"][0][answered] == batch["labels"][0][answered]).all()


def test_padding_is_masked_and_unlabelled(loaded):
    prompts = PromptFormat(loaded[1], 0)
    batch = prompts.collate([Encoded([5, 6], [7]), Encoded([5], [7])])
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7], [-100, 7, -100]]


def test_all_facts_share_the_examples(loaded):
    prompts = PromptFormat(loaded[1], 2)
    examples = loaded[1](prompts.examples).input_ids
    for question in ("where ann born", "where bob lives"):
        assert prompts.encode(question, "rome").prompt[: len(examples)] == examples


def test_an_answer_without_tokens(loaded):
    with pytest.raises(ValueError, match="has no token"):
        PromptFormat(loaded[1], 0).encode_text("where", " ")


def test_too_many_shots(loaded):
    with pytest.raises(ValueError, match="shots=9"):
        PromptFormat(loaded[1], 9)
