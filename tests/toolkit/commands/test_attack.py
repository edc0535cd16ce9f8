"""Attacks on a tiny unlearned model."""

import importlib.util
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ssiuu.attacks import execute, retraining
from ssiuu.attacks.attack import Attack
from ssiuu.attacks.grid import attack_grid
from ssiuu.attacks.kinds import AttackGroup
from ssiuu.attacks.pool import POOLS
from ssiuu.commands import attack
from ssiuu.commands.attack import attack_run
from ssiuu.commands.unlearn import unlearn
from ssiuu.data.facts import Split
from ssiuu.data.prompts import PromptFormat
from ssiuu.evaluation.likelihood import FactScores, score_facts
from ssiuu.evaluation.protocol import Protocol
from ssiuu.options import UnlearnOptions
from ssiuu.report.groups import attack_summary
from ssiuu.runs.read import read_runs

HARMFUL = Attack("harmful", 0.5, 1e-2, pool="all", steps=4, evaluate_every=2)


@pytest.fixture
def scores(monkeypatch):
    """Takes what the model is to score next: a number of every fact, or one of all of them."""
    coming = []

    def score(protocol, model, facts):
        value = coming.pop(0)
        values = torch.tensor(value if isinstance(value, list) else [value] * len(facts))
        return FactScores(values, values, values)

    monkeypatch.setattr(Protocol, "score", score)
    return coming


def test_the_papers_protocol_by_hand(run, scores):
    grid = attack_grid(["harmful"], (0, 1), fractions=(0.6,), learning_rates=(1e-3, 1e-4), steps=3, evaluate_every=1)
    # The unlearned model answers the first and the last of six facts; then three evaluations of each attack.
    scores += [[1.0, 0.0, 0.0, 0.0, 0.0, 1.0]]
    scores += [0.25, 0.75, 0.5, 0.25, 0.25, 0.0]  # the first rate, seeds 0 and 1
    scores += [0.0, 0.0, 0.5, 0.5, 0.25, 0.25]  # the second rate
    results = attack_run(run.path, grid)
    for result in results:
        assert result["pool"] == {"name": "wrong", "definition": POOLS["wrong"], "size": 4, "indices": [1, 2, 3, 4],
                                  "of": 6}  # fmt: skip
        assert len(result["seen"]) == 2  # floor(0.6 * 4)
        assert sorted(result["seen"] + result["unseen"]) == [1, 2, 3, 4]
        assert result["steps"][0]["unseen_fs"] == 0.0
        assert result["steps"][0]["fs"] == pytest.approx(1 / 3)
    assert [result["max_unseen_fs"] for result in results] == [0.75, 0.25, 0.5, 0.5]
    summary = attack_summary(read_runs([run.path])[0], AttackGroup("harmful", 0.6, "full", "wrong"))
    assert summary["max_unseen_fs"] == (0.75 + 0.5) / 2  # of seeds 0 and 1
    assert (summary["seeds"], summary["rates"], summary["facts"]) == (2, 2, 2)


def test_a_harmful_attack_brings_its_own_facts_back(run):
    (result,) = attack_run(run.path, [replace(HARMFUL, steps=30)])
    assert [step["step"] for step in result["steps"]][:3] == [0, 2, 4]
    assert result["steps"][-1]["forget_probability"] > result["steps"][0]["forget_probability"]
    for which in ("fs", "unseen_fs"):
        assert result[f"max_{which}"] == max(step[which] for step in result["steps"])


def test_the_facts_that_are_trained_on_are_the_seen_ones(run, monkeypatch):
    trained = []
    monkeypatch.setattr(retraining, "train_on", lambda model, prompts, samples, **_: trained.extend(samples))
    (result,) = attack_run(run.path, [HARMFUL])
    facts = run.split().forget
    prompts = PromptFormat(attack.load_model(run.model)[1], 0)
    assert trained == prompts.encode_facts([facts[i] for i in result["seen"]])


@pytest.fixture
def instructions(tmp_path):
    path = tmp_path / "i.jsonl"
    path.write_text(json.dumps({"instruction": "say yes", "output": "yes"}) + "\n")
    return str(path)


def test_a_benign_attack_is_scored_on_the_whole_pool(run, scores, instructions):
    scores += [[1.0, 0.0, 0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 0.0, 0.0, 0.0, 0.0], 0.0]
    benign = Attack("benign", None, 1e-3, steps=2, evaluate_every=1, instructions=instructions)
    (result,) = attack_run(run.path, [benign])
    assert (result["seen"], result["unseen"]) == ([], [1, 2, 3, 4])
    assert [step["unseen_fs"] for step in result["steps"]] == [0.0, 0.25, 0.0]
    assert result["max_unseen_fs"] == 0.25


def test_the_runs_model_stays_as_it_is(run):
    pytest.importorskip("peft")
    before = load_file(run.model / "model.safetensors")
    attack_run(run.path, [HARMFUL, replace(HARMFUL, tuning="lora")])
    after = load_file(run.model / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_lora_trains_and_is_an_attack_of_its_own(run):
    pytest.importorskip("peft")
    full, lora = attack_run(run.path, [HARMFUL, replace(HARMFUL, tuning="lora", lora_modules=["q_proj", "v_proj"])])
    assert (full["tuning"], lora["tuning"]) == ("full", "lora")
    assert lora["options"].items() >= {"lora_rank": 8, "lora_alpha": 16.0, "lora_modules": ["q_proj", "v_proj"]}.items()
    ends = [result["steps"][-1]["forget_probability"] for result in (full, lora)]
    assert lora["steps"][0] == full["steps"][0]
    assert len({lora["steps"][0]["forget_probability"], *ends}) == 3


def test_a_quantised_attack_scores_what_the_library_makes(run):
    pytest.importorskip("bitsandbytes")
    (result,) = attack_run(run.path, [Attack("quantised", pool="all")])
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    direct = AutoModelForCausalLM.from_pretrained(run.model, quantization_config=config, dtype=torch.float32)
    prompts = PromptFormat(attack.load_model(run.model)[1], 0)
    means = score_facts(direct, prompts, run.split().forget).means()
    before, after = result["steps"]
    assert (before["step"], after["step"]) == (0, 1)
    assert after["unseen_fs"] == means["score"]
    assert after["unseen_margin"] == pytest.approx(means["margin"], abs=1e-6)
    assert before["unseen_margin"] != after["unseen_margin"]
    assert (result["tuning"], result["learning_rate"], result["options"]) == (None, None, {})


def test_a_flat_curve_ends_the_attack(run):
    flat = replace(HARMFUL, learning_rate=1e-12, steps=20, until_flat=3)
    (result,) = attack_run(run.path, [flat])
    assert [step["step"] for step in result["steps"]] == [0, 2, 4, 6]
    assert result["flat"] is True


def test_a_curve_that_still_rises_at_the_last_step_is_said(run, scores, caplog):
    scores += [0.0, 0.25, 0.5]
    (result,) = attack_run(run.path, [replace(HARMFUL, until_flat=1)])
    assert result["flat"] is False
    assert "harmful-p0.5-all-lr0.01-seed0 still rises after 4 steps; use more --steps" in caplog.text


def test_finished_attacks_are_not_run_again(run, monkeypatch):
    first = attack_run(run.path, [HARMFUL])
    monkeypatch.setattr("ssiuu.commands.attack.load_model", lambda *_, **__: pytest.fail("attacked again"))
    assert attack_run(run.path, [HARMFUL]) == first


def test_a_killed_grid_goes_on_with_the_attack_that_was_half_done(run, monkeypatch):
    grid = [replace(HARMFUL, seed=seed) for seed in range(3)]
    whole = attack_run(run.path, grid)
    for file in run.attacks.glob("*.json"):
        file.unlink()
    begun, retrain = [], execute.retrain

    def die_in_the_second(attacked, attack, *rest):
        begun.append(attack.seed)
        course = retrain(attacked, attack, *rest)
        if begun == [0, 1]:
            raise KeyboardInterrupt
        return course

    monkeypatch.setattr(execute, "retrain", die_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        attack_run(run.path, grid)
    resumed = attack_run(run.path, grid)
    assert begun == [0, 1, 1, 2]
    assert [{**result, "seconds": 0} for result in resumed] == [{**result, "seconds": 0} for result in whole]


def test_other_options_under_the_same_name_are_refused(run):
    attack_run(run.path, [HARMFUL])
    with pytest.raises(ValueError, match="was made with other options"):
        attack_run(run.path, [replace(HARMFUL, steps=3)])


def test_bad_options_are_refused_before_the_run_is_read(tmp_path):
    with pytest.raises(ValueError, match="kind='evil'"):
        attack_run(tmp_path, [HARMFUL, replace(HARMFUL, kind="evil")])


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        attack_run(tmp_path, [HARMFUL])


UNFIT = {
    "fraction=0.5 of the 1 forget facts of the run: .* needs two": (1, HARMFUL),
    "fraction=0.3 of the 3 forget facts .* a fraction of at least 0.34": (3, replace(HARMFUL, fraction=0.3)),
    "none.jsonl does not exist": (3, Attack("benign", None, 1e-3, instructions="none.jsonl")),
}


@pytest.mark.parametrize(("message", "case"), UNFIT.items(), ids=UNFIT)
def test_attacks_without_data_are_refused_before_any_of_them(model_dir, facts, tmp_path, monkeypatch, message, case):
    number, bad = case
    options = UnlearnOptions(model=str(model_dir), shots=0, max_steps=1, save_every=0)
    run = unlearn(options, tmp_path / "run", split=Split(facts[:number], facts[6:9], []))
    monkeypatch.setattr(attack, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        attack_run(run.path, [HARMFUL, bad])


POOLS_TOO_SMALL = {
    "pool='wrong' is empty: the unlearned model answers all 6 forget facts": 1.0,
    "fraction=0.3 of the 2 facts of pool 'wrong' .* a fraction of at least 0.5": [1.0, 1.0, 1.0, 1.0, 0.0, 0.0],
}


@pytest.mark.parametrize(("message", "before"), POOLS_TOO_SMALL.items(), ids=POOLS_TOO_SMALL)
def test_a_pool_that_is_too_small_is_refused_before_any_attack(run, scores, monkeypatch, message, before):
    scores += [before]
    monkeypatch.setattr(retraining, "train_on", lambda *_, **__: pytest.fail("an attack was begun"))
    with pytest.raises(ValueError, match=message):
        attack_run(run.path, [replace(HARMFUL, fraction=p, pool="wrong") for p in (0.5, 0.3)])


def test_a_missing_package_is_known_before_the_run_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="needs the package bitsandbytes"):
        attack_run(tmp_path, [HARMFUL, Attack("quantised")])


def test_each_forget_fact_is_scored_once_an_evaluation(run, monkeypatch):
    scored, score = [], Protocol.score

    def count(protocol, model, facts):
        scored.append(len(facts))
        return score(protocol, model, facts)

    monkeypatch.setattr(Protocol, "score", count)
    attack_run(run.path, [HARMFUL, replace(HARMFUL, seed=1)])
    assert scored == [len(run.split().forget)] * 5  # before, and at steps 2 and 4 of both


@pytest.mark.parametrize(("method", "way_on"), [("finetune", "run it again"), ("gd", "`ssiuu unlearn --resume`")])
def test_an_unfinished_run_says_what_to_do(tmp_path, method, way_on):
    (tmp_path / "config.json").write_text(json.dumps({"status": "running", "method": method}))
    with pytest.raises(ValueError, match=f"is not finished; .*{way_on}"):
        attack_run(tmp_path, [HARMFUL])
