"""What the scores of an attack are of."""

import pytest
import torch

from ssiuu.attacks.attacked import Course
from ssiuu.attacks.pool import Pool
from ssiuu.evaluation.likelihood import FactScores


def test_the_facts_that_are_trained_on_do_not_count():
    """Of six facts four are in the pool; the attack trains on two of them and brings back both and one other."""
    course = Course(Pool("wrong", [1, 2, 3, 4], 6), seen=[1, 3])
    score = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 0.0])
    course.add(5, FactScores(score, 0.1 * score, 2 * score - 1))
    assert course.unseen == [2, 4]
    (step,) = course.steps
    assert step == pytest.approx({
        "step": 5, "fs": 3 / 6, "forget_probability": 0.05, "forget_margin": 0.0,
        "unseen_fs": 1 / 2, "unseen_probability": 0.05, "unseen_margin": 0.0,
    })  # fmt: skip
