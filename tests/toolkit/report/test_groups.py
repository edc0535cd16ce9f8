"""Attacks of made-up run folders, in groups."""

from dataclasses import replace

import pytest

from ssiuu.attacks.earlier import WHOLE
from ssiuu.attacks.kinds import AttackGroup
from ssiuu.report.groups import attack_groups, attack_summary, mean_curve
from ssiuu.runs.read import read_runs
from tests.support.run_folders import attack_result

GROUP = AttackGroup("harmful", 0.3, "full", "wrong")


def attacked(record, *curves):
    """The run with harmful attacks of these (rate, seed, unseen FS at every evaluation)."""
    attacks = []
    for rate, seed, scores in curves:
        steps = [{"step": 5 * i, "fs": 0.5, "unseen_fs": fs} for i, fs in enumerate(scores)]
        attacks.append(attack_result("harmful", 0.3, rate, seed, steps=steps))
    return replace(record, attacks=attacks)


@pytest.fixture
def record(runs):
    return read_runs(runs[:1])[0]


def test_the_maximum_is_over_run_and_rates_and_the_mean_over_seeds(record):
    record = attacked(
        record,
        (1e-5, 0, [0.0, 0.25, 0.125]), (1e-6, 0, [0.0, 0.0, 0.5]),  # 0.5
        (1e-5, 1, [0.0, 0.25, 0.25]), (1e-6, 1, [0.0, 0.0, 0.0]),  # 0.25
    )  # fmt: skip
    assert attack_summary(record, GROUP) == {
        "attacks": 4,
        "seeds": 2,
        "rates": 2,
        "facts": 6,  # eight in the pool, less floor(0.3 * 8)
        "steps": [10, 10],
        "max_unseen_fs": 0.375,
        "sd_unseen_fs": pytest.approx(0.125 * 2**0.5),
        "max_fs": 0.5,
        "sd_fs": 0.0,
    }


def test_a_seed_that_lacks_a_rate_is_left_out(record):
    summary = attack_summary(attacked(record, (1e-5, 0, [0.5]), (1e-6, 0, [0.25]), (1e-5, 1, [1.0])), GROUP)
    assert (summary["seeds"], summary["attacks"], summary["max_unseen_fs"]) == (1, 3, 0.5)


def test_no_seed_with_all_rates(record):
    summary = attack_summary(attacked(record, (1e-5, 0, [0.5]), (1e-6, 1, [0.25])), GROUP)
    assert (summary["seeds"], summary["max_unseen_fs"]) == (0, None)


def test_pools_and_tunings_are_groups_of_their_own(record):
    steps = [{"step": 0, "fs": 0.0, "unseen_fs": 0.0}]
    pools = [{"pool": {"name": name}} for name in (WHOLE, "all", "wrong")]
    attacks = [attack_result(steps=steps, tuning=tuning, **pool) for pool in pools for tuning in ("lora", "full")]
    titles = [group.title for group in attack_groups([replace(record, attacks=attacks)])]
    assert titles == [
        "harmful p = 0.3 (wrong)", "harmful p = 0.3 (all)", "harmful p = 0.3 (whole set, ceil)",
        "harmful p = 0.3 LoRA (wrong)", "harmful p = 0.3 LoRA (all)", "harmful p = 0.3 LoRA (whole set, ceil)",
    ]  # fmt: skip


def curves(*measured, flat=None):
    steps = ([{"step": step, "fs": fs} for step, fs in points.items()] for points in measured)
    return [{"steps": points, "flat": flat} for points in steps]


def test_mean_curve_keeps_to_the_steps_that_all_have():
    steps, values = mean_curve(curves({0: 0.2, 1: 0.2, 2: 0.2}, {0: 0.4, 2: 0.4}), "fs")
    assert steps == [0, 2]
    assert values == pytest.approx([0.3, 0.3])


def test_an_attack_that_ended_flat_keeps_its_last_value():
    measured = ({0: 0.0, 5: 0.2}, {0: 0.0, 5: 0.0, 10: 1.0})
    assert mean_curve(curves(*measured), "fs") == ([0, 5], [0.0, 0.1])
    assert mean_curve(curves(*measured, flat=True), "fs") == ([0, 5, 10], [0.0, 0.1, 0.6])


def test_groups_are_in_the_order_of_the_kinds(runs):
    titles = [group.title for group in attack_groups(read_runs(runs))]
    assert titles == ["harmful p = 0.1 (wrong)", "harmful p = 0.3 (wrong)", "benign (wrong)"]


def test_an_attack_of_an_unknown_kind_is_named(record):
    record.attacks[-1]["kind"] = "evil"
    with pytest.raises(ValueError, match="kind='evil' is unknown; expected one of harmful, benign"):
        attack_groups([record])
