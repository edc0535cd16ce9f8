"""Evaluating a finished run."""

from ssiuu.commands.evaluate import evaluate_run


def test_evaluate_adds_generation(run):
    found = evaluate_run(run.path)
    assert {"fs", "rs", "fs_generation", "rs_generation"} <= set(found["after"])
    assert found == run.read("evaluation.json")
