"""Attacks of made-up run folders, in groups."""

import json

import pytest

from ssiuu.report.groups import attack_groups, attack_summary, mean_curve
from ssiuu.runs.read import read_runs


def test_attacks_are_means_over_learning_rates_of_the_maximum(runs):
    record = read_runs(runs[:1])[0]
    maxima = [json.loads(file.read_text())["max_fs"] for file in (runs[0] / "attacks").glob("harmful-0.3-*.json")]
    summary = attack_summary(record, ("harmful", 0.3))
    assert len(maxima) == summary["attacks"] == 2
    assert summary["max_fs"] == pytest.approx(sum(maxima) / 2)


def test_mean_curve_keeps_to_the_steps_that_all_have():
    measured = ({0: 0.2, 1: 0.2, 2: 0.2}, {0: 0.4, 2: 0.4})
    attacks = [{"steps": [{"step": step, "fs": fs} for step, fs in points.items()]} for points in measured]
    steps, values = mean_curve(attacks, "fs")
    assert steps == [0, 2]
    assert values == pytest.approx([0.3, 0.3])


def test_groups_are_in_the_order_of_the_kinds(runs):
    assert list(attack_groups(read_runs(runs)).values()) == ["harmful p = 0.1", "harmful p = 0.3", "benign"]


def test_an_attack_of_an_unknown_kind_is_named(runs):
    record = read_runs(runs[:1])[0]
    record.attacks[-1]["kind"] = "evil"
    with pytest.raises(ValueError, match="kind='evil' is unknown; expected one of harmful, benign"):
        attack_groups([record])
