"""Scores against a plain forward over whole sequences."""

import pytest
import torch

import ssiuu_kernels as sk
from ssiuu.data.facts import Fact
from ssiuu.data.prompts import PromptFormat
from ssiuu.evaluation.likelihood import score_facts


def plain_log_prob(model, prompts, question, answer):
    batch = prompts.collate([prompts.encode(question, answer)])
    labels = batch.pop("labels")
    with torch.no_grad():
        return sk.sequence_log_probs(model(**batch).logits, labels)[0]


@pytest.mark.parametrize("batch_size", [1, 5, 100])
@pytest.mark.parametrize("shots", [0, 2])
def test_scores_equal_a_plain_forward(loaded, facts, shots, batch_size):
    model, tokenizer = loaded
    prompts = PromptFormat(tokenizer, shots)
    facts = [*facts, Fact("where ann lives", "oslo rome", ("lima",), "ann")]  # answers of different lengths
    scores = score_facts(model, prompts, facts, batch_size=batch_size)
    for index, fact in enumerate(facts):
        options = [
            plain_log_prob(model, prompts, fact.question, o) / len(o.split())
            for o in (fact.answer, *fact.false_options)
        ]
        margin = options[0] - max(options[1:])
        assert scores.margin[index].item() == pytest.approx(margin.item(), abs=1e-4)
        probability = (options[0] * len(fact.answer.split())).exp()
        assert scores.probability[index].item() == pytest.approx(probability.item(), rel=1e-3)
        assert scores.score[index] == float(margin > 0)


def test_the_mode_of_the_model_is_restored(loaded, facts):
    model, tokenizer = loaded
    model.train()
    score_facts(model, PromptFormat(tokenizer, 0), facts)
    assert model.training


def test_means_leave_out_the_margin_where_there_are_no_options(loaded):
    model, tokenizer = loaded
    means = score_facts(model, PromptFormat(tokenizer, 0), [Fact("where ann born", "rome")]).means()
    assert set(means) == {"score", "probability"}


def test_an_answer_with_a_paraphrase_is_scored_itself_and_by_rouge(loaded):
    model, tokenizer = loaded
    fact = Fact("where ann born", "rome", ("oslo oslo",), paraphrase="rome rome")
    plain = Fact("where ann born", "rome")
    for found, expected in zip(
        *(score_facts(model, PromptFormat(tokenizer, 0), [f]) for f in (fact, plain)), strict=True
    ):
        torch.testing.assert_close(found, expected, equal_nan=True)


def test_a_choice_that_is_asked_for_is_between_the_paraphrase_and_the_false_options(loaded):
    model, tokenizer = loaded
    prompts = PromptFormat(tokenizer, 0)
    fact = Fact("where ann born", "rome", ("oslo oslo",), paraphrase="rome rome")
    right, wrong = (plain_log_prob(model, prompts, fact.question, text) / 2 for text in ("rome rome", "oslo oslo"))
    scores = score_facts(model, prompts, [fact], choice=True)
    assert scores.margin.item() == pytest.approx((right - wrong).item(), abs=1e-4)
    assert scores.score.item() == float(right > wrong)
