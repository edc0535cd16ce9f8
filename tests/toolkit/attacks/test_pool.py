"""The pool of an attack, by hand: which facts, how many are trained on, and what is refused."""

import pytest
import torch

from ssiuu.attacks.pool import Pool, number_of
from ssiuu.evaluation.likelihood import FactScores


def scores_of(*right):
    right = torch.tensor(right, dtype=torch.float32)
    return FactScores(right, right, right)


# Of twelve facts the unlearned model answers the first and the fourth.
SCORES = scores_of(1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0)
WRONG = [1, 2, 4, 5, 6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize(("name", "indices"), [("wrong", WRONG), ("all", list(range(12)))])
def test_which_facts(name, indices):
    pool = Pool.choose(name, SCORES)
    assert pool.indices == indices
    assert {key: pool.as_json()[key] for key in ("name", "size", "of")} == {
        "name": name, "size": len(indices), "of": 12,
    }  # fmt: skip


@pytest.mark.parametrize(("fraction", "number"), [(0.1, 1), (0.3, 3), (0.39, 3), (0.99, 9)])
def test_the_floor_of_a_fraction_is_trained_on_and_the_rest_is_not(fraction, number):
    pool = Pool.choose("wrong", SCORES)
    seen = pool.draw(fraction, seed=0)
    assert len(seen) == number
    assert sorted([*seen, *pool.without(seen)]) == WRONG


def test_the_floor_is_of_the_decimal_number():
    assert 0.29 * 100 < 29
    assert number_of(0.29, 100) == 29


def test_the_seed_decides_which_facts_are_seen():
    pool = Pool.choose("wrong", SCORES)
    drawn = [pool.draw(0.3, seed) for seed in (0, *range(8))]
    assert drawn[0] == drawn[1]
    assert any(seen != drawn[0] for seen in drawn)


def test_a_fraction_that_gives_no_fact_says_which_would_do():
    pool = Pool.choose("wrong", scores_of(0, 0, 0, 0, 0, 0, 0, 1))
    with pytest.raises(ValueError, match=r"fraction=0.1 of the 7 facts of pool 'wrong' .* at least 0.15$"):
        pool.draw(0.1, seed=0)
    assert len(pool.draw(0.15, seed=0)) == 1


def test_a_pool_of_one_fact_leaves_none_unseen():
    with pytest.raises(ValueError, match="an attack that trains on some and scores the rest needs two"):
        Pool.choose("wrong", scores_of(1, 0)).draw(0.9, seed=0)


def test_a_model_that_answers_everything_has_no_pool():
    with pytest.raises(ValueError, match="pool='wrong' is empty: the unlearned model answers all 3 forget facts"):
        Pool.choose("wrong", scores_of(1, 1, 1))
