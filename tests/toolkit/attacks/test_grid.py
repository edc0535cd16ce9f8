"""The paper's grid of attacks."""

import pytest

from ssiuu.attacks.grid import attack_grid
from ssiuu.attacks.kinds import ATTACK_KINDS


def test_the_papers_grid():
    names = [attack.name for attack in attack_grid(ATTACK_KINDS)]
    rates = {"harmful-p0.1": ("1e-05", "5e-06", "1e-06"), "harmful-p0.3": ("1e-05", "5e-06", "1e-06"),
             "benign": ("1e-05", "1e-06", "1e-07")}  # fmt: skip
    assert names == [f"{which}-lr{rate}-seed0" for which in rates for rate in rates[which]]


def test_fractions_are_of_harmful_attacks_alone():
    attacks = attack_grid(("harmful", "benign"), (0, 1), fractions=(0.5,), learning_rates=(1e-3,), steps=2)
    assert [(a.kind, a.fraction, a.seed, a.steps) for a in attacks] == [
        ("harmful", 0.5, 0, 2), ("harmful", 0.5, 1, 2), ("benign", None, 0, 2), ("benign", None, 1, 2),
    ]  # fmt: skip


def test_an_unknown_kind():
    with pytest.raises(ValueError, match="kind='evil' is unknown; expected one of harmful, benign"):
        attack_grid(("harmful", "evil"))
