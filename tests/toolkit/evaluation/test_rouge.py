"""ROUGE-L recall of what a model writes."""

from ssiuu.data.facts import Fact
from ssiuu.data.prompts import PromptFormat
from ssiuu.evaluation import rouge
from ssiuu.evaluation.rouge import rouge_recall


def test_rouge_recall(loaded, monkeypatch):
    monkeypatch.setattr(rouge, "generate", lambda *_, **__: ["born in rome in may", "nowhere"])
    facts = [Fact("q", "rome in may"), Fact("r", "rome")]
    assert rouge_recall(loaded[0], PromptFormat(loaded[1], 0), facts).tolist() == [1.0, 0.0]


def test_generation_writes_text(loaded, facts):
    """The real path, on random weights: nothing can be said of the text but that there is one for each fact."""
    model, tokenizer = loaded
    assert rouge_recall(model, PromptFormat(tokenizer, 1), facts[:2]).shape == (2,)
