"""Retraining attacks on a tiny unlearned model."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from ssiuu.attacks.retraining import Attack
from ssiuu.commands import attack
from ssiuu.commands.attack import attack_run
from ssiuu.commands.unlearn import unlearn
from ssiuu.data.facts import Split
from ssiuu.evaluation.protocol import Protocol
from ssiuu.options import UnlearnOptions

HARMFUL = Attack("harmful", 0.3, 1e-2, steps=4, evaluate_every=2)


def test_a_harmful_attack_brings_its_own_facts_back(run):
    (result,) = attack_run(run.path, [replace(HARMFUL, steps=30)])
    assert [step["step"] for step in result["steps"]][:3] == [0, 2, 4]
    assert result["steps"][-1]["forget_probability"] > result["steps"][0]["forget_probability"]
    assert result["max_fs"] == max(step["fs"] for step in result["steps"])
    assert "max_unseen_fs" in result


def test_a_benign_attack_has_no_unseen_facts(run, tmp_path):
    path = tmp_path / "i.jsonl"
    path.write_text(json.dumps({"instruction": "say yes", "output": "yes"}) + "\n")
    (result,) = attack_run(run.path, [Attack("benign", None, 1e-3, steps=2, evaluate_every=1, instructions=str(path))])
    assert len(result["steps"]) == 3
    assert "max_unseen_fs" not in result


def test_the_runs_model_stays_as_it_is(run):
    before = load_file(run.model / "model.safetensors")
    attack_run(run.path, [HARMFUL])
    after = load_file(run.model / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_finished_attacks_are_not_run_again(run, monkeypatch):
    first = attack_run(run.path, [HARMFUL])
    monkeypatch.setattr("ssiuu.commands.attack.load_model", lambda *_, **__: pytest.fail("attacked again"))
    assert attack_run(run.path, [HARMFUL]) == first


def test_other_options_under_the_same_name_are_refused(run):
    attack_run(run.path, [HARMFUL])
    with pytest.raises(ValueError, match="was made with other options"):
        attack_run(run.path, [replace(HARMFUL, steps=3)])


BAD = {
    "kind='evil'": {"kind": "evil"},
    "fraction=None": {"fraction": None},
    "fraction=1.0": {"fraction": 1.0},
    "steps=0": {"steps": 0},
    "learning_rate=0": {"learning_rate": 0},
}


@pytest.mark.parametrize(("message", "changes"), BAD.items(), ids=BAD)
def test_bad_attacks(tmp_path, message, changes):
    with pytest.raises(ValueError, match=message):
        attack_run(tmp_path, [replace(HARMFUL, **changes)])


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        attack_run(tmp_path, [HARMFUL])


@pytest.mark.parametrize("refused", [
    (1, HARMFUL, "the run has one forget fact, .*; use --kind benign"),
    (3, replace(HARMFUL, fraction=0.9), "fraction=0.9 of 3 forget facts is all of them"),
    (3, Attack("benign", None, 1e-3, instructions="none.jsonl"), "none.jsonl does not exist"),
], ids=["one fact", "all facts", "no data"])  # fmt: skip
def test_attacks_without_data_are_refused_before_any_of_them(model_dir, facts, tmp_path, monkeypatch, refused):
    number, bad, message = refused
    options = UnlearnOptions(model=str(model_dir), shots=0, max_steps=1, save_every=0)
    run = unlearn(options, tmp_path / "run", split=Split(facts[:number], facts[6:9], []))
    monkeypatch.setattr(attack, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        attack_run(run.path, [replace(HARMFUL, fraction=0.1), bad] if number > 1 else [bad])


def test_each_forget_fact_is_scored_once_an_evaluation(run, monkeypatch):
    scored, score_forget = [], Protocol.score

    def score(protocol, model, facts):
        scored.append(len(facts))
        return score_forget(protocol, model, facts)

    monkeypatch.setattr(Protocol, "score", score)
    attack_run(run.path, [HARMFUL])
    assert scored == [len(run.split().forget)] * 3  # at steps 0, 2 and 4


@pytest.mark.parametrize(("method", "way_on"), [("finetune", "run it again"), ("gd", "`ssiuu unlearn --resume`")])
def test_an_unfinished_run_says_what_to_do(tmp_path, method, way_on):
    (tmp_path / "config.json").write_text(json.dumps({"status": "running", "method": method}))
    with pytest.raises(ValueError, match=f"is not finished; .*{way_on}"):
        attack_run(tmp_path, [HARMFUL])
