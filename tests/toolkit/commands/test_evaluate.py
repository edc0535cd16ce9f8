"""Evaluating a finished run."""

import torch

from ssiuu.commands.evaluate import evaluate_run
from ssiuu.commands.unlearn import unlearn
from ssiuu.data.prompts import PromptFormat
from ssiuu.evaluation.likelihood import score_facts
from ssiuu.models.load import load_model
from ssiuu.options import UnlearnOptions
from ssiuu.report.table import as_markdown
from ssiuu.runs.read import read_runs
from tests.support.benchmark_files import question, write_faithun


def test_evaluate_adds_generation(run):
    found = evaluate_run(run.path)
    assert {"fs", "rs", "fs_generation", "rs_generation"} <= set(found["after"])
    assert found == run.read("evaluation.json")


def test_evaluate_scores_the_further_sets_of_a_benchmark(model_dir, tmp_path):
    towns = ("rome", "oslo", "lima")
    asked = [question(f"where {person} born", "rome", towns[1:]) for person in ("ann", "bob", "cid")]
    again = [question(f"where {person} lives", "rome", towns[1:]) for person in ("ann", "bob", "cid")]
    folder = write_faithun(
        tmp_path / "data", {"Q1": {"hop1_unlearn": asked, "hop1_test": again, "same_object": again}},
        {"forget": (0, 2), "retaining": (1,), "test": ()},
    )  # fmt: skip
    options = UnlearnOptions(
        model=str(model_dir), method="gd", facts=None, data="faithun", data_from=str(folder), extra=["paraphrases"],
        shots=0, max_steps=1, save_every=0,
    )  # fmt: skip
    run = unlearn(options, tmp_path / "run")
    assert [fact.question for fact in run.extra()["paraphrases"]] == ["where ann lives", "where cid lives"]
    found = evaluate_run(run.path)
    model, tokenizer = load_model(run.model)
    scores = score_facts(model, PromptFormat(tokenizer, 0), run.extra()["paraphrases"])
    torch.testing.assert_close(found["after"]["paraphrases_probability"], scores.probability.mean().item())
    assert found["after"]["paraphrases_score"] == scores.score.mean().item()
    assert "paraphrases: score" in as_markdown(read_runs([run.path]))
    assert "same_object_score" not in found["after"]
