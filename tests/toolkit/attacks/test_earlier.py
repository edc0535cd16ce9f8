"""Results of versions in which attacks had no pool."""

import random

import pytest

from ssiuu.attacks.earlier import WHOLE, with_pool
from ssiuu.attacks.kinds import AttackGroup
from tests.support.run_folders import attack_result

STEPS = [{"step": 0, "fs": 0.25, "forget_probability": 0.1}, {"step": 5, "fs": 0.5, "forget_probability": 0.2}]


def earlier(kind, fraction, **more):
    return {"kind": kind, "fraction": fraction, "learning_rate": 1e-5, "seed": 3, "options": {}, "seconds": 1.0,
            "max_fs": 0.5, "steps": STEPS, **more}  # fmt: skip


def test_a_harmful_attack_trained_on_the_ceiling_of_the_whole_set():
    steps = [{**step, "unseen_fs": 0.1 * step["step"]} for step in STEPS]
    found = with_pool(earlier("harmful", 0.3, steps=steps, max_unseen_fs=0.5), 11)
    assert found["seen"] == sorted(random.Random(3).sample(range(11), 4))  # 3.3, rounded up
    assert sorted(found["seen"] + found["unseen"]) == list(range(11))
    assert found["steps"] == steps
    assert AttackGroup.of(found).title == f"harmful p = 0.3 ({WHOLE})"


def test_all_facts_were_unseen_by_a_benign_attack():
    found = with_pool(earlier("benign", None), 11)
    assert (found["seen"], len(found["unseen"]), found["max_unseen_fs"]) == ([], 11, 0.5)
    assert [step["unseen_fs"] for step in found["steps"]] == [0.25, 0.5]
    assert [step["unseen_probability"] for step in found["steps"]] == [0.1, 0.2]


@pytest.mark.parametrize("kind", ["harmful", "benign"])
def test_todays_results_stay_as_they_are(kind):
    result = attack_result(kind, steps=[{"step": 0, "fs": 0.0, "unseen_fs": 0.0}])
    assert with_pool(result, 12) == result
