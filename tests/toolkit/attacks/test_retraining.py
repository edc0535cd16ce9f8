"""What the retraining attacks train on."""

import pytest

from ssiuu.attacks.retraining import Attack
from ssiuu.data.prompts import PromptFormat


@pytest.mark.parametrize("seed", [0, 1])
def test_a_harmful_attack_leaves_the_facts_unseen_that_it_does_not_train_on(loaded, facts, seed):
    prompts = PromptFormat(loaded[1], 0)
    samples, unseen = Attack("harmful", 0.3, 1e-3, seed).data(prompts, facts)
    assert len(samples) == 4  # 0.3 of 12, rounded up
    assert samples == prompts.encode_facts([fact for i, fact in enumerate(facts) if i not in unseen])
    assert len(unseen) == 8


def test_the_seed_decides_which_facts_are_seen(loaded, facts):
    prompts = PromptFormat(loaded[1], 0)
    drawn = [Attack("harmful", 0.3, 1e-3, seed).data(prompts, facts)[1] for seed in (0, *range(8))]
    assert drawn[0] == drawn[1]
    assert any(unseen != drawn[0] for unseen in drawn)


def test_options_tell_apart_what_the_name_does_not():
    one, other = (Attack("benign", None, 1e-3, instructions=source) for source in ("one.jsonl", "other.jsonl"))
    assert one.name == other.name
    assert one.options != other.options
