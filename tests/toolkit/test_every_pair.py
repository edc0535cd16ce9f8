"""Every method, alone and with the penalty, and every regularizer: three steps of a run."""

import math

import pytest

from ssiuu.commands.unlearn import unlearn
from ssiuu.methods.registry import methods
from ssiuu.regularizers.registry import regularizers
from tests.support.small_runs import by, lines

# What the paper's models have and the tiny one lacks, or the other way round.
SETTINGS = {"rmu": {"rmu_layer": 1}, "erase-at-core": {"eac_layers": 1}, "klue": {"klue_questions": 2}}
PAIRS = [(method, regularizer) for method in methods() for regularizer in ("none", "ssiuu")]
PAIRS += [("gd", regularizer) for regularizer in regularizers() if regularizer not in ("none", "ssiuu")]


def options_of(options, method, regularizer, **changes):
    settings = SETTINGS.get(method, {}) | ({"penalty_weight": 1.0} if regularizer == "ssiuu" else {})
    return by(options, method, regularizer, **settings, **changes)


@pytest.mark.parametrize(("method", "regularizer"), PAIRS, ids=["+".join(pair) for pair in PAIRS])
def test_three_steps(options, tmp_path, method, regularizer):
    run = unlearn(options_of(options, method, regularizer, max_steps=3), tmp_path / "run")
    found = lines(run)
    assert [line["step"] for line in found] == [1, 2, 3]
    assert all(math.isfinite(line["loss"]) and line["loss_grad_norm"] > 0 for line in found)
    assert ("share" in found[-1]) == (regularizer == "ssiuu")
