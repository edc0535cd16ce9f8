"""SSIUU with A of the original model as the anchor, over the facts that each step sees."""

from dataclasses import replace

import pytest
import torch
import transformers

import ssiuu_kernels as sk
from ssiuu.commands.unlearn import unlearn
from ssiuu.optimizers import OptimizerOptions
from ssiuu.regularizers import ssiuu as ssiuu_module
from tests.support.small_runs import assert_resumes_bit_for_bit, by, lines

WEIGHT = 1e5
RATE = OptimizerOptions(3e-3, weight_decay=0.1)

# Micro-batches of forget facts of three steps, and the run's options that say how many there are.
STEPS = {
    "all facts at once": ([[[0, 1, 2]], [[2, 1, 0]], [[1, 0, 2]]], {}),
    "all facts in parts": ([[[0], [1], [2]], [[2], [1], [0]], [[1], [0], [2]]], {"forget_batch": 1, "accumulate": 3}),
    "some facts": ([[[0, 1]], [[2, 0]], [[1, 2]]], {"forget_batch": 2}),
    "some facts in parts": ([[[0], [1]], [[2], [0]], [[1], [2]]], {"forget_batch": 1, "accumulate": 2}),
    "a fact twice": ([[[0, 1], [2, 0]], [[1, 2], [1, 0]], [[2, 0], [1, 2]]], {"forget_batch": 2, "accumulate": 2}),
}


@pytest.fixture
def setting(setting):
    """With a GPT-2, which computes its norms in the model's own float64; Llama does so in float32."""
    config = transformers.GPT2Config(
        vocab_size=setting.model.config.vocab_size, n_embd=16, n_layer=2, n_head=2, n_positions=32,
        initializer_range=0.2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return setting._replace(model=transformers.GPT2LMHeadModel(config).double().eval())


def probability_gradients(setting, facts):
    """`sum_b dP_b/dphi` over these facts, each as often as it is named."""
    params = list(setting.model.parameters())
    total = [torch.zeros_like(param) for param in params]
    for fact in facts:
        probability = setting.log_probs(setting.batch([fact], [])).exp().sum()
        total = [t + g for t, g in zip(total, torch.autograd.grad(probability, params), strict=True)]
    return total


def micro_batches(setting, step):
    every = [fact for facts in step for fact in facts]
    return [setting.batch(facts, facts, len(step), (every, every)) for facts in step]


def three_steps_by_formula(setting, steps):
    """Algorithm 1 with A_0 in the place of A_{t-1} from the second step on: `R_t` of each step; moves the model."""
    params = list(setting.model.parameters())
    original = [param.detach().clone() for param in params]
    of_fact = [probability_gradients(setting, [fact]) for fact in range(3)]  # of the model before the first step
    adamw = torch.optim.AdamW(params, lr=RATE.learning_rate, weight_decay=RATE.weight_decay)
    values = []
    for number, step in enumerate(steps):
        facts = [fact for part in step for fact in part]
        loss = sum(setting.gd(batch) for batch in micro_batches(setting, step)) / len(step)
        loss_grads = torch.autograd.grad(loss, params)
        target_grads = probability_gradients(setting, facts)
        value = 0.0
        for index, (param, grad, target_grad) in enumerate(zip(params, loss_grads, target_grads, strict=True)):
            attribution = param.detach() * target_grad
            before = original[index] * sum(of_fact[fact][index] for fact in facts)
            growth = torch.where(attribution < 0, attribution - before, 0) if number else torch.zeros_like(attribution)
            value += growth.square().sum().item()
            param.grad = grad + 2 * WEIGHT * growth * target_grad
        adamw.step()
        values.append(value)
    return values


@pytest.mark.parametrize("in_backward", [False, True], ids=["in step", "in backward"])
@pytest.mark.parametrize(("steps", "run"), STEPS.values(), ids=STEPS)
def test_three_steps_are_those_of_the_formulas(setting, made, monkeypatch, steps, run, in_backward):
    if in_backward and "accumulate" in run:
        pytest.skip("parameters that are updated in backward take one micro-batch per step")
    monkeypatch.setattr("ssiuu_kernels.optim.update_in_backward.WAITING", 100)
    settings = {"anchor": "original", "penalty_weight": WEIGHT}
    regularizer, method = made("ssiuu", run={**run, "update_in_backward": in_backward}, **settings)
    start, penalties = setting.clones(), []
    with sk.patch(setting.model, scope="all") as handle:
        method.setup(setting.model, handle, setting.data)
        regularizer.setup(setting.model, handle, method, setting.data)
        options = OptimizerOptions(RATE.learning_rate, RATE.weight_decay, update_in_backward=in_backward)
        optimizer = regularizer.optimizer(setting.model.parameters(), options)
        for step in steps:
            optimizer.zero_grad()
            for batch in micro_batches(setting, step):
                loss = regularizer.loss(batch)
                (loss if len(step) == 1 else loss / len(step)).backward()
            optimizer.step()
            penalties.append(regularizer.metrics()["penalty"])
    found = setting.clones()
    for param, value in zip(setting.model.parameters(), start, strict=True):
        param.data.copy_(value)
    values = three_steps_by_formula(setting, steps)
    assert penalties == pytest.approx(values, rel=1e-6)  # a third of the step's tokens is a float32
    assert values[2] > 0
    for actual, expected, begin in zip(found, setting.model.parameters(), start, strict=True):
        assert (actual - expected).norm() < 1e-5 * (expected - begin).norm()


@pytest.mark.parametrize("number", [3, 2], ids=["all facts", "some facts"])
def test_facts_that_left_the_loss_stay_in_the_anchor(setting, made, number):
    facts = list(range(number))
    regularizer, method = made("ssiuu", run={"forget_batch": number}, anchor="original")
    expected = [p.detach() * g for p, g in zip(setting.model.parameters(), probability_gradients(setting, facts),
                                               strict=True)]  # fmt: skip
    batch = setting.batch(facts, [0])
    with sk.patch(setting.model, scope="all") as handle:
        method.setup(setting.model, handle, setting.data)
        regularizer.setup(setting.model, handle, method, setting.data)
        optimizer = regularizer.optimizer(setting.model.parameters(), RATE)
        for stopped in (batch.stopped, batch.forget & (batch.ids == 1)):
            optimizer.zero_grad()
            regularizer.loss(replace(batch, stopped=stopped)).backward()
            optimizer.step()
    for param, anchor in zip(setting.model.parameters(), expected, strict=True):
        assert torch.allclose(optimizer.state[param]["prev_attribution"], anchor, rtol=1e-9, atol=1e-15)


def test_it_changes_the_run_from_the_third_step_on(options, tmp_path):
    """The second step's previous attributions are the original's."""
    settings = {"max_steps": 3, "penalty_weight": 1e4, "penalty_share": None}
    previous, original = (
        lines(unlearn(options.replace(anchor=anchor, **settings), tmp_path / anchor))
        for anchor in ("previous", "original")
    )
    assert original[1]["penalty"] == previous[1]["penalty"]
    assert original[2]["penalty"] > 1.5 * previous[2]["penalty"]


@pytest.mark.parametrize("part", [{}, {"forget_batch": 2}], ids=["all facts", "some facts"])
def test_the_first_step_steers_nothing(options, tmp_path, part):
    """Its attributions are the original's, up to rounding."""
    run = unlearn(options.replace(anchor="original", max_steps=3, **part), tmp_path / "run")
    weights = [line["lambda"] for line in lines(run)]
    assert weights[0] == weights[1]
    assert weights[2] != weights[1]


@pytest.mark.parametrize("changes", [{}, {"forget_batch": 3}], ids=["all facts", "some facts"])
def test_a_killed_run_resumes_bit_for_bit(options, tmp_path, monkeypatch, changes):
    assert_resumes_bit_for_bit(options.replace(anchor="original", **changes), tmp_path, monkeypatch, 3)


def test_attributions_of_all_facts_are_made_where_steps_see_some_alone(options, tmp_path, monkeypatch):
    monkeypatch.setattr(ssiuu_module, "OriginalAttributions", None)
    unlearn(options.replace(anchor="original", max_steps=2, accumulate=2), tmp_path / "all")
    with pytest.raises(AttributeError, match="NoneType"):
        unlearn(options.replace(anchor="original", max_steps=2, forget_batch=2), tmp_path / "some")


def test_attributions_that_are_too_large_are_refused(options, tmp_path, monkeypatch):
    monkeypatch.setattr(ssiuu_module, "ORIGINAL_BYTES", 1000)
    message = (
        "anchor='original' would keep .* each of the 4 forget facts, since a step sees 3 forget samples "
        r"\(--forget-batch 0 .*ORIGINAL_BYTES.*previous"
    )
    with pytest.raises(ValueError, match=message):
        unlearn(by(options, "gd", "ssiuu", anchor="original", forget_batch=3), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_original_attributions_that_are_not_finite_are_refused(setting, made):
    with torch.no_grad():
        setting.model.transformer.ln_f.bias[0] = float("nan")
    regularizer, method = made("ssiuu", run={"forget_batch": 2}, anchor="original")
    with (
        sk.patch(setting.model, scope="all") as handle,
        pytest.raises(ValueError, match=r"attribution of the original model, .* is not finite; check the model"),
    ):
        regularizer.setup(setting.model, handle, method, setting.data)


def test_an_unknown_anchor_is_refused(made):
    with pytest.raises(ValueError, match="anchor='first' is unknown; expected one of previous, original"):
        made("ssiuu", anchor="first")
