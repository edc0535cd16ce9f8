"""The grids of attacks."""

import pytest

from ssiuu.attacks.grid import attack_grid, grid_of, paper_grid
from ssiuu.options import AttackOptions


def test_the_papers_grid():
    names = [attack.name for attack in paper_grid(pool="wrong")]
    rates = {"harmful-p0.1": ("1e-05", "5e-06", "1e-06"), "harmful-p0.3": ("1e-05", "5e-06", "1e-06"),
             "benign": ("1e-05", "1e-06", "1e-07")}  # fmt: skip
    assert names == [
        f"{which}-wrong-lr{rate}-seed{seed}" for which in rates for rate in rates[which] for seed in (0, 1, 2)
    ]
    assert paper_grid(pool="wrong") == grid_of(AttackOptions(paper_grid=True, pool="wrong"))


def test_without_options_the_papers_kinds_with_one_seed_and_a_fraction_for_few_facts():
    attacks = grid_of(AttackOptions())
    assert [(a.kind, a.fraction, a.learning_rate, a.seed) for a in attacks] == [
        ("harmful", 0.3, 1e-5, 0), ("harmful", 0.3, 5e-6, 0), ("harmful", 0.3, 1e-6, 0),
        ("benign", None, 1e-5, 0), ("benign", None, 1e-6, 0), ("benign", None, 1e-7, 0),
    ]  # fmt: skip


def test_fractions_are_of_harmful_attacks_alone_and_a_quantised_one_has_no_grid():
    kinds = ("harmful", "benign", "quantised")
    attacks = attack_grid(kinds, (0, 1), fractions=(0.5,), learning_rates=(1e-3,), steps=2)
    assert [(a.kind, a.fraction, a.learning_rate, a.seed, a.steps) for a in attacks] == [
        ("harmful", 0.5, 1e-3, 0, 2), ("harmful", 0.5, 1e-3, 1, 2), ("benign", None, 1e-3, 0, 2),
        ("benign", None, 1e-3, 1, 2), ("quantised", None, None, 0, 2),
    ]  # fmt: skip


def test_lora_has_rates_of_its_own():
    assert [a.learning_rate for a in attack_grid(["harmful"], tuning="lora")] == [1e-4, 5e-5, 1e-5]


REFUSED = {
    "kind='evil' is unknown; expected one of harmful, benign, quantised": AttackOptions(kind=["harmful", "evil"]),
    "tuning='half' is unknown; expected one of full, lora": AttackOptions(tuning="half"),
    r"seed=\[3\] beside paper_grid=True": AttackOptions(paper_grid=True, seed=[3]),
}


@pytest.mark.parametrize(("message", "options"), REFUSED.items(), ids=REFUSED)
def test_refusals(message, options):
    with pytest.raises(ValueError, match=message):
        grid_of(options)
