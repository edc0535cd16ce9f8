"""When the curve of the unseen facts is flat, by hand."""

import pytest

from ssiuu.attacks.plateau import is_flat


def steps(margins, scores=None):
    scores = scores or [0.0] * len(margins)
    return [{"unseen_margin": m, "unseen_fs": s} for m, s in zip(margins, scores, strict=True)]


CURVES = {
    "too short": ([1.0, 1.0], None, False),
    "level": ([-3.0, 1.0, 1.04, 1.01], None, True),
    "rising": ([-3.0, 1.0, 1.1, 1.2], None, False),
    "a late jump": ([1.0, 1.0, 1.0, 1.06], None, False),
    "falling": ([-3.0, 1.0, 0.5, 0.2], None, True),
    "back from a dip": ([1.0, -3.0, -2.0, -1.0], None, False),
    "the score alone rises": ([1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.25], False),
}


@pytest.mark.parametrize(("margins", "scores", "flat"), CURVES.values(), ids=CURVES)
def test_flat_over_two_evaluations(margins, scores, flat):
    assert is_flat(steps(margins, scores), 2) == flat


def test_free_text_has_a_score_alone():
    assert is_flat([{"unseen_fs": 0.2}, {"unseen_fs": 0.209}], 1)
    assert not is_flat([{"unseen_fs": 0.2}, {"unseen_fs": 0.22}], 1)
