"""Matches: shares of other questions, and how likely a mean is by chance."""

import itertools

import pytest

from ssiuu.analysis.matching import Matches, _matches, other_questions
from ssiuu.data.facts import Fact


def by_hand(others, total):
    """P(sum of shares >= total) and <= total, over all equally likely shares."""
    sums = [sum(draw) for draw in itertools.product(*([step / k for step in range(k + 1)] for k in others))]
    return sum(s >= total - 1e-9 for s in sums) / len(sums), sum(s <= total + 1e-9 for s in sums) / len(sums)


@pytest.mark.parametrize(("shares", "others"), [([1.0, 0.5, 2 / 3], [2, 4, 3]), ([0.0], [5]), ([0.25, 0.75], [4, 8])])
def test_chances_are_counted(shares, others):
    assert Matches(shares, others).p_values() == pytest.approx(by_hand(others, sum(shares)))


def test_the_deviation_is_that_of_uniform_shares():
    draws = list(itertools.product(*([step / k for step in range(k + 1)] for k in (2, 3))))
    means = [sum(draw) / 2 for draw in draws]
    variance = sum((mean - 0.5) ** 2 for mean in means) / len(means)
    assert Matches([0.5, 0.5], [2, 3]).deviation == pytest.approx(variance**0.5)


def test_a_share_is_of_the_other_questions_at_which_the_answer_is_preferred_less():
    found = _matches([0.3, 0.1, 0.3, 0.9, -1.0, -2.0], [["a", "b", "c"], ["d"]])
    assert found.shares == pytest.approx([(1 + 0.5 + 0) / 3, 1.0])


def test_other_questions_are_about_other_people():
    facts = [Fact(f"Where was {name} born?", answer, ("Rome",), name) for name, answer in
             (("Ann Lee", "Bonn"), ("Al", "Oslo"), ("Eva", "Bonn"))]  # fmt: skip
    asked = other_questions(facts, seed=0)
    # Eva has the same answer as Ann Lee.
    assert asked[0] == ["Where was Al born?"]
    assert sorted(asked[1]) == ["Where was Ann Lee born?", "Where was Eva born?"]
    assert other_questions(facts, seed=0, without={"Where was Al born?"})[0] == []


def test_facts_without_subject_are_compared_with_those_of_the_same_options():
    facts = [Fact("q1", "a", ("b",)), Fact("q2", "b", ("a",)), Fact("q3", "c", ("d",))]
    assert other_questions(facts, seed=0) == [["q2"], ["q1"], []]
