"""The distance from the original weights, logged and as a stop."""

import pytest
import torch

from ssiuu.commands.unlearn import unlearn
from ssiuu.models.load import load_model
from tests.support.small_runs import by, lines, weights


def distance_of(run, model):
    """Written out, of the run's model from another."""
    after, before = weights(run), load_model(model)[0].state_dict()
    return sum(((after[name].double() - before[name].double()) ** 2).sum() for name in after).sqrt().item()


def test_it_is_logged_at_each_evaluation_where_asked_for(options, tmp_path):
    run = unlearn(by(options, "gd", log_distance=True), tmp_path / "run")
    assert ["distance" in line for line in lines(run)] == ["fs" in line for line in lines(run)]
    assert lines(run)[-1]["distance"] == pytest.approx(distance_of(run, options.model), rel=1e-6)
    assert "distance" not in lines(unlearn(by(options, "gd"), tmp_path / "other"))[-1]


def test_it_does_not_change_the_run(options, tmp_path):
    plain = weights(unlearn(by(options, "gd"), tmp_path / "plain"))
    logged = weights(unlearn(by(options, "gd", log_distance=True), tmp_path / "logged"))
    assert all(torch.equal(plain[name], logged[name]) for name in plain)


def test_a_run_stops_at_a_distance(options, tmp_path):
    reached = [line["distance"] for line in lines(unlearn(by(options, "gd", log_distance=True, evaluate_every=1),
                                                          tmp_path / "whole"))]  # fmt: skip
    goal = (reached[2] + reached[3]) / 2
    # No threshold is given: chance among the options, which this model is below, does not end it.
    run = unlearn(by(options, "gd", stop_distance=goal, threshold=None, evaluate_every=1), tmp_path / "run")
    assert len(lines(run)) == 4
    assert lines(run)[-1]["stopped_by"] == "distance"


def test_a_threshold_beside_a_distance_stops_too(options, tmp_path):
    run = unlearn(by(options, "gd", stop_distance=1e9, threshold=1.0, evaluate_every=1), tmp_path / "run")
    assert [line.get("stopped_by") for line in lines(run)] == ["threshold"]


def test_the_end_of_a_run_that_nothing_stopped(options, tmp_path):
    run = unlearn(by(options, "gd"), tmp_path / "run")
    assert [line.get("stopped_by") for line in lines(run)] == [None] * 5 + ["max_steps"]


@pytest.mark.parametrize("distance", [0.0, -1.0, float("nan"), float("inf")])
def test_a_distance_out_of_range(options, tmp_path, distance):
    with pytest.raises(ValueError, match=r"stop_distance=.*; expected a positive number"):
        unlearn(options.replace(stop_distance=distance), tmp_path / "run")
