"""Verdicts from signals of which the truth is known."""

import pytest

from ssiuu.analysis.matching import Matches
from ssiuu.analysis.verdict import ERASED, HIDDEN, UNCLEAR, Signal, answers_more_than_chance, decide
from ssiuu.data.facts import Fact

KNOWN, NOTHING = Matches([1.0] * 10, [8] * 10), Matches([0.5] * 10, [8] * 10)
BELOW, FEW = Matches([0.0] * 10, [8] * 10), Matches([0.5], [8])


@pytest.mark.parametrize(
    ("looks", "held_down", "vote"),
    [
        ({"a": KNOWN}, False, HIDDEN),
        ({"a": NOTHING}, False, ERASED),
        ({"a": FEW}, False, UNCLEAR),
        ({"a": NOTHING, "b": KNOWN}, False, HIDDEN),
        ({"a": BELOW}, True, HIDDEN),
        ({"a": BELOW}, False, ERASED),
        ({}, False, UNCLEAR),
    ],
)
def test_a_vote(looks, held_down, vote):
    assert Signal("s", looks, held_down).vote == vote


def test_many_looks_are_as_strict_as_one():
    one = Matches([1.0] * 4, [8] * 4)  # chance: 1 in 6561
    assert Signal("s", {"a": one}).vote == HIDDEN
    assert Signal("s", {"a": one, **{str(i): NOTHING for i in range(20)}}).vote != HIDDEN


def signals(*found):
    return [Signal(name, {"look": matches}) for name, matches in found]


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        ([("outputs", NOTHING), ("attack", NOTHING)], ERASED),
        ([("outputs", NOTHING), ("attack", KNOWN)], HIDDEN),
        ([("outputs", NOTHING), ("attack", FEW)], UNCLEAR),
        ([("outputs", FEW), ("layers", FEW), ("attack", NOTHING)], UNCLEAR),
    ],
)
def test_a_verdict(found, verdict):
    assert decide(signals(*found), "attack", 0, 10)[0] == verdict


def test_a_model_that_still_answers_is_neither():
    verdict, sentence = decide(signals(("outputs", KNOWN), ("attack", KNOWN)), "attack", 7, 10)
    assert verdict == UNCLEAR
    assert "still answers 7 of the 10 facts" in sentence


def test_right_answers_are_compared_with_chance():
    facts = [Fact(f"q{i}", "a", ("b", "c")) for i in range(10)]
    assert answers_more_than_chance([True] * 9 + [False], facts) == 9  # 21 in 59049
    assert answers_more_than_chance([True] * 5 + [False] * 5, facts) == 0
