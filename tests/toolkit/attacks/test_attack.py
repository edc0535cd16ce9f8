"""The options of an attack: what is refused, its default pool, and what its file is called."""

import importlib.util
from dataclasses import replace

import pytest

from ssiuu.attacks.attack import Attack
from ssiuu.data.facts import Fact, judged_by_choice

HARMFUL = Attack("harmful", 0.3, 1e-5, 2)


def test_options_tell_apart_what_the_name_does_not():
    one, other = (Attack("benign", None, 1e-3, instructions=source) for source in ("one.jsonl", "other.jsonl"))
    assert one.name == other.name
    assert one.options != other.options


NAMES = {
    "harmful-p0.3-wrong-lr1e-05-seed2": replace(HARMFUL, pool="wrong"),
    "harmful-p0.3-all-lora-lr1e-05-seed2": replace(HARMFUL, pool="all", tuning="lora"),
    "benign-wrong-lr1e-05-seed0": Attack("benign", None, 1e-5, pool="wrong"),
    "quantised-all": Attack("quantised", pool="all"),
}


@pytest.mark.parametrize(("name", "attack"), NAMES.items(), ids=NAMES)
def test_names(name, attack):
    assert attack.name == name


# A fact with a paraphrase is scored by ROUGE-L recall, as TOFU's perturbed sets are.
POOLS = [(Fact("q", "a"), "all"), (Fact("q", "a", ("b", "c")), "wrong"), (Fact("q", "a", ("b",), None, "A"), "all")]


@pytest.mark.parametrize(("fact", "pool"), POOLS)
def test_the_pool_is_the_papers_for_such_facts(fact, pool):
    judged = judged_by_choice([fact])
    assert HARMFUL.on(judged).pool == pool
    assert replace(HARMFUL, pool="all").on(judged).pool == "all"


BAD = {
    "kind='evil' is unknown": {"kind": "evil"},
    "pool='some' is unknown; expected one of wrong, all": {"pool": "some"},
    "tuning='half' is unknown": {"tuning": "half"},
    "fraction=None": {"fraction": None},
    "fraction=1.0": {"fraction": 1.0},
    "fraction=0.3 of a benign attack; it trains on no facts": {"kind": "benign"},
    "learning_rate=0": {"learning_rate": 0},
    "learning_rate=nan": {"learning_rate": None},
    "steps=0": {"steps": 0},
    "lora_rank=0": {"lora_rank": 0},
    "lora_alpha=0": {"lora_alpha": 0},
    "until_flat=7; .* no more than the 6 evaluations that steps=30 has with evaluate_every=5": {"until_flat": 7},
    "until_flat=0": {"until_flat": 0},
}


@pytest.mark.parametrize(("message", "changes"), BAD.items(), ids=BAD)
def test_bad_options(message, changes):
    with pytest.raises(ValueError, match=message):
        replace(HARMFUL, **changes).check()


MISSING = {
    "kind='quantised' needs the package bitsandbytes, .*ssiuu-kernels\\[quantised\\]": Attack("quantised"),
    "tuning='lora' needs the package peft, .*ssiuu-kernels\\[lora\\]": replace(HARMFUL, tuning="lora"),
}


@pytest.mark.parametrize(("message", "attack"), MISSING.items(), ids=MISSING)
def test_a_missing_package(monkeypatch, message, attack):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    HARMFUL.check()
    with pytest.raises(ValueError, match=message):
        attack.check()


def test_a_quantised_attack_has_no_learning_rate(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    with pytest.raises(ValueError, match=r"learning_rate=0.001 of a quantised attack, which does not train"):
        Attack("quantised", None, 1e-3).check()


UNFIT = {
    "pool='wrong' of facts that are scored by ROUGE-L": (replace(HARMFUL, pool="wrong"), [Fact("q", "a b")] * 9),
    "fraction=0.3 of the 3 forget facts of the run .* at least 0.34": (HARMFUL, [Fact("q", "a", ("b",))] * 3),
    "none.jsonl does not exist": (Attack("benign", None, 1e-3, instructions="none.jsonl"), [Fact("q", "a", ("b",))]),
}


@pytest.mark.parametrize(("message", "case"), UNFIT.items(), ids=UNFIT)
def test_unfit_data(message, case):
    attack, facts = case
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        attack.check_data(facts, judged_by_choice(facts))
