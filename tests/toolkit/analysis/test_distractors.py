"""The false option that a margin is taken against."""

import pytest
import torch

from ssiuu.analysis.distractors import best_false_options, labels_of_others
from ssiuu.data.facts import Fact
from ssiuu_kernels import sequence_log_probs
from tests.support.models import tiny_model

FACTS = [
    Fact("where is ann", "oslo on the sea", ("rome", "lima on", "bonn", "oslo on the", "oslo on the sea sea")),
    Fact("where is bob ?", "oslo on the sea", ("oslo on", "oslo on the")),
    Fact("where is cid", "rome", ("kyiv on the sea", "bonn on")),
]


def per_token(model, sample):
    ids = torch.tensor([[*sample.prompt, *sample.answer]])
    labels = torch.tensor([[-100] * len(sample.prompt) + list(sample.answer)])
    with torch.no_grad():
        return sequence_log_probs(model(input_ids=ids).logits, labels).item() / len(sample.answer)


def test_the_best_per_token_of_those_that_part_from_the_answer(prompts, encode):
    model = tiny_model().eval()
    found = best_false_options(model, prompts, FACTS)
    assert found[1] is None
    for fact, option, texts in (
        (FACTS[0], found[0], ("rome", "lima on", "bonn")),
        (FACTS[2], found[2], FACTS[2].false_options),
    ):
        options = [encode(fact.question, text) for text in texts]
        assert option == max(options, key=lambda sample: per_token(model, sample))


def test_no_option_to_part_from(prompts):
    with pytest.raises(ValueError, match="none of the 2 facts has one that parts from the answer; use --target logit"):
        best_false_options(tiny_model(), prompts, [FACTS[1], Fact("where is eve", "rome")])


def test_tokens_of_the_option_in_place_of_the_answer_s(prompts, encode):
    samples = prompts.encode_facts(FACTS)
    options = [
        encode(fact.question, text) for fact, text in zip(FACTS, ("rome", "lima", "bonn on the sea"), strict=True)
    ]
    labels = prompts.collate(samples)["labels"]
    other = labels_of_others(labels, options)
    for row, sample, option in zip(other.tolist(), samples, options, strict=True):
        after = [-100] * len(row)
        expected = [-100] * len(sample.prompt) + option.answer + after
        assert row == expected[: len(row)]


def test_the_length_of_an_option_counts_for_nothing(prompts, encode, monkeypatch):
    scores = torch.tensor([-3.0, -4.0]), torch.tensor([1.0, 4.0])
    monkeypatch.setattr("ssiuu.analysis.distractors.log_probs_and_lengths", lambda *_: scores)
    fact = Fact("where is cid", "rome", ("bonn", "kyiv on the sea"))
    assert best_false_options(tiny_model(), prompts, [fact]) == [encode(fact.question, "kyiv on the sea")]
