"""Scores against a plain forward over whole sequences."""

import pytest
import torch

import ssiuu_kernels as sk
from ssiuu.data.facts import Fact
from ssiuu.data.prompts import PromptFormat
from ssiuu.evaluation.likelihood import (
    FactScores,
    generate,
    generation_accuracy,
    known_facts,
    rouge_recall,
    score_facts,
)


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


def test_known_facts_are_right_and_sure(facts):
    scores = FactScores(torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([0.3, 0.9, 0.1, 0.5]), torch.zeros(4))
    assert known_facts(scores, facts[:4], 0.2) == [facts[3], facts[0]]


def fixed_generation(monkeypatch, *answers):
    monkeypatch.setattr("ssiuu.evaluation.likelihood.generate", lambda *_, **__: list(answers))


def test_rouge_recall(loaded, monkeypatch):
    fixed_generation(monkeypatch, "born in rome in may", "nowhere")
    facts = [Fact("q", "rome in may"), Fact("r", "rome")]
    assert rouge_recall(loaded[0], PromptFormat(loaded[1], 0), facts).tolist() == [1.0, 0.0]


def test_generation_accuracy(loaded, monkeypatch):
    fixed_generation(monkeypatch, "Rome, of course", "oslo")
    facts = [Fact("q", "rome", ("oslo",)), Fact("r", "rome", ("oslo",))]
    assert generation_accuracy(loaded[0], PromptFormat(loaded[1], 0), facts) == 0.5


def test_generation_needs_options(loaded):
    with pytest.raises(ValueError, match="false_options"):
        generation_accuracy(loaded[0], PromptFormat(loaded[1], 0), [Fact("q", "rome")])


def test_generation_writes_text(loaded, facts):
    """The real path, on random weights: nothing can be said of the text but that there is one for each fact."""
    model, tokenizer = loaded
    assert rouge_recall(model, PromptFormat(tokenizer, 1), facts[:2]).shape == (2,)


def test_batches_answer_as_single_prompts_do(loaded):
    model, tokenizer = loaded
    prompts = PromptFormat(tokenizer, 0)
    texts = ["where ann", "where bob lives", "ann born rome oslo lima", "where ? Answer"]
    assert generate(model, prompts, texts) == [generate(model, prompts, [text])[0] for text in texts]
