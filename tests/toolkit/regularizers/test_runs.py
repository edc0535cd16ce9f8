"""Every regularizer of a method's own gradients or steps under GD: it unlearns, resumes, and refuses bad options."""

import math

import pytest

from ssiuu.commands import unlearn as unlearn_module
from ssiuu.commands.unlearn import unlearn
from tests.support.small_runs import assert_resumes_bit_for_bit, by, lines

# Settings with which each has an effect on the tiny model.
REGULARIZERS = {
    "l2": {"l2_weight": 1.0},
    "mask": {},
    "sam": {},
    "ssiuu-neuron": {"penalty_weight": 1e4},
    "uniform": {},
}


@pytest.mark.parametrize("name", REGULARIZERS)
def test_three_steps_lower_the_forget_probability(options, tmp_path, name):
    options = by(options, "gd", name, max_steps=3, learning_rate=3e-3, **REGULARIZERS[name])
    run = unlearn(options, tmp_path / "run")
    scores = run.read("evaluation.json")
    assert scores["after"]["forget_probability"] < scores["before"]["forget_probability"]
    assert {line["engine"] for line in lines(run)} == {"plain"}


# dpo's batches hold refusals too; rmu's loss is not a function of log-likelihoods, and trains some of the parameters.
OTHERS = [("dpo", name, {}) for name in REGULARIZERS]
OTHERS += [("rmu", name, {"rmu_layer": 1}) for name in REGULARIZERS if name != "ssiuu-neuron"]


@pytest.mark.parametrize(("method", "name", "settings"), OTHERS, ids=str)
def test_it_goes_with_other_methods(options, tmp_path, method, name, settings):
    run = unlearn(by(options, method, name, max_steps=2, **settings, **REGULARIZERS[name]), tmp_path / "run")
    assert lines(run)[1].get("penalty", 1) > 0


@pytest.mark.parametrize("name", REGULARIZERS)
def test_a_killed_run_resumes_bit_for_bit(options, tmp_path, monkeypatch, name):
    options = by(options, "gd", name, accumulate=2, forget_batch=2, max_steps=4, **REGULARIZERS[name])
    assert_resumes_bit_for_bit(options, tmp_path, monkeypatch, 3)


BAD = {
    "l2, negative": ("l2_weight=-1; expected a finite number, at least 0", "l2", {"l2_weight": -1}),
    "l2, nan": ("l2_weight=nan; expected a finite number", "l2", {"l2_weight": math.nan}),
    "l2, too large": (r"l2_weight=1e\+300; expected at most 1e\+30", "l2", {"l2_weight": 1e300}),
    "mask, negative": ("mask_beta=-1; expected a finite number, at least 0", "mask", {"mask_beta": -1}),
    "mask, infinite": ("mask_beta=inf; expected a finite number", "mask", {"mask_beta": math.inf}),
    "mask, bfloat16": ("dtype='bfloat16' with regularizer='mask'.*--bf16", "mask", {"dtype": "bfloat16"}),
    "sam, 0": ("sam_radius=0; expected a finite number above 0", "sam", {"sam_radius": 0}),
    "sam, infinite": ("sam_radius=inf; expected a finite number", "sam", {"sam_radius": math.inf}),
    "sam, bfloat16": ("dtype='bfloat16' with regularizer='sam'.*--bf16", "sam", {"dtype": "bfloat16"}),
    "neurons, negative": ("penalty_weight=-1; expected at least 0", "ssiuu-neuron", {"penalty_weight": -1}),
    "neurons, target": ("target='loss' is unknown; expected one of prob", "ssiuu-neuron", {"target": "loss"}),
    "uniform, 1": ("uniform_share=1; expected a fraction, at least 0 and below 1", "uniform", {"uniform_share": 1}),
    "uniform, nan": ("uniform_share=nan; expected a fraction", "uniform", {"uniform_share": math.nan}),
} | {
    f"{name}, in backward": (
        f"update_in_backward=True with regularizer='{name}', whose optimizer cannot do it",
        name,
        {"update_in_backward": True},
    )
    for name in REGULARIZERS
}  # fmt: skip


@pytest.mark.parametrize(("message", "name", "changes"), BAD.values(), ids=BAD)
def test_bad_options_are_refused_before_any_work(options, tmp_path, monkeypatch, message, name, changes):
    monkeypatch.setattr(unlearn_module, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=message):
        unlearn(by(options, "gd", name, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()
