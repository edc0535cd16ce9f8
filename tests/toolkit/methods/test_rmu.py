"""RMU: its loss, what trains, and the states before unlearning that it compares with."""

import copy
import math

import pytest
import torch

import ssiuu_kernels as sk
from ssiuu.commands.unlearn import unlearn
from ssiuu.data.facts import Fact, Split
from ssiuu.data.prompts import PromptFormat
from ssiuu.models.load import load_model
from ssiuu.options import UnlearnOptions
from ssiuu.pairs import make
from tests.support.models import tiny_model
from tests.support.small_runs import assert_resumes_bit_for_bit, by, lines, weights
from tests.support.unlearn_data import batch_of, data_of

# Answers of one to four tokens, so that samples differ in length.
FORGET = [Fact("where ann born", "rome"), Fact("where bob born", "oslo lima rome oslo")]
RETAIN = [Fact("where cid lives", "lima rome"), Fact("where", "lima"), Fact("where dee lives", "oslo lima rome")]
FAMILIES = ("llama", "phi3", "gpt2", "gpt_neox", "opt")
REFERENCES = ("cached", "live")


@pytest.fixture
def data(loaded):
    return data_of(PromptFormat(loaded[1], 0), FORGET, RETAIN)


def rmu(**settings):
    return make(UnlearnOptions(method="rmu", settings={"rmu_layer": 0, **settings}))[0]


def freeze_others(model, trained):
    for param in model.parameters():
        param.requires_grad_(any(param is other for other in trained))


def set_up(method, model, data):
    """A handle of the model with the method's parameters alone trainable; the caller unpatches it."""
    freeze_others(model, method.parameters(model))
    handle = sk.patch(model, scope="all")
    method.setup(model, handle, data)
    return handle


@torch.no_grad()
def move(params):
    """As some steps of training would."""
    for param in params:
        param += 0.1 * torch.randn_like(param)


def states(model, sample, layer):
    """`[tokens, D]` after a decoder layer that is not the last, of the sample alone."""
    output = model(input_ids=torch.tensor([sample.prompt + sample.answer]), output_hidden_states=True, use_cache=False)
    return output.hidden_states[layer + 1][0]


def loss_by_formula(model, before, data, forget, retain, options):
    """With a fresh u from the documented draw."""
    drawn = torch.rand(32, generator=torch.Generator().manual_seed(data.seed))
    target = (options["rmu_c"] * drawn / drawn.square().sum().sqrt()).double()
    loss = 0
    for index in forget:
        error = states(model, data.forget_samples[index], 0) - target
        loss = loss + (error**2).sum() / error.numel() / len(forget)
    for index in retain:
        sample = data.retain_samples[index]
        error = states(model, sample, 0) - states(before, sample, 0).detach()
        loss = loss + options["rmu_alpha"] * (error**2).sum() / error.numel() / len(retain)
    return loss


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_and_its_gradients_are_the_formula(data, family, reference):
    model = tiny_model(family, torch.float64)
    before, plain = copy.deepcopy(model), copy.deepcopy(model)
    options = {"rmu_c": 1 + torch.rand(()).item(), "rmu_alpha": 5 * torch.rand(()).item()}
    method = rmu(**options, reference_model=reference)
    trained = method.parameters(model)
    with set_up(method, model, data):
        move(trained)
        plain.load_state_dict(model.state_dict())
        loss, logits = method.loss(batch_of(data, [1, 0], [2, 0]))
        actual = torch.autograd.grad(loss, trained)
    expected = loss_by_formula(plain, before, data, [1, 0], [2, 0], options)
    assert torch.allclose(loss, expected, rtol=1e-6)
    for one, other in zip(actual, torch.autograd.grad(expected, method.parameters(plain)), strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()
    assert logits.shape[:2] == (4, max(len(p) + len(a) for p, a in (data.forget_samples[1], data.retain_samples[2])))


@pytest.mark.parametrize("reference", REFERENCES)
def test_states_before_unlearning_are_of_a_model_in_eval_mode(data, reference):
    model = tiny_model("gpt2", torch.float64, resid_pdrop=0.5)
    plain, method = copy.deepcopy(model).eval(), rmu(reference_model=reference)
    with set_up(method, model, data):
        (found,) = method._before(batch_of(data, [], [1]))
    assert torch.allclose(found, states(plain, data.retain_samples[1], 0))
    assert model.training


@pytest.mark.parametrize("reference", REFERENCES)
def test_the_retain_term_begins_at_zero(data, reference):
    model, method = tiny_model(), rmu(rmu_alpha=1e6, rmu_c=0.0, reference_model=reference)
    with set_up(method, model, data):
        loss = method.loss(batch_of(data, [0], [0, 1, 2])).value
    assert loss < 1


def test_a_step_is_the_mean_of_its_micro_batches(data):
    model, method = tiny_model(dtype=torch.float64), rmu()
    trained = method.parameters(model)
    with set_up(method, model, data):
        move(trained)
        whole, *parts = (
            torch.autograd.grad(method.loss(batch_of(data, forget, retain)).value, trained)
            for forget, retain in (([0, 1], [0, 2]), ([1], [0]), ([0], [2]))
        )
    for grad, first, second in zip(whole, *parts, strict=True):
        assert (grad - (first + second) / 2).norm() < 1e-10 * grad.norm()


def test_micro_batches_of_a_run_add_up(options, tmp_path, facts):
    split = Split([Fact(fact.question, text) for fact, text in zip(facts, ["rome", "oslo lima rome"], strict=False)],
                  facts[4:6], [])  # fmt: skip
    found = []
    for accumulate in (1, 2):
        batches = dict.fromkeys(("forget_batch", "retain_batch"), 2 // accumulate)
        steps = settings(options, max_steps=1, accumulate=accumulate, **batches)
        found.append(lines(unlearn(steps, tmp_path / str(accumulate), split=split))[0])
    whole, parts = found
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert parts["loss_grad_norm"] == pytest.approx(whole["loss_grad_norm"], rel=1e-4)


def steering_vector(data, seed):
    method, model = rmu(rmu_c=1.0), tiny_model()
    with set_up(method, model, data_of(data.prompts, FORGET, RETAIN, seed)):
        return method.target


def test_the_steering_vector_is_drawn_by_the_seed_alone(data):
    state = torch.get_rng_state()
    tiny_model()
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    first = steering_vector(data, 3)
    assert torch.equal(torch.get_rng_state(), after)  # but for the model, nothing is drawn globally
    assert torch.equal(first, steering_vector(data, 3))
    assert not torch.equal(first, steering_vector(data, 4))
    assert first.min() >= 0
    assert first.norm() == pytest.approx(1.0)


TRAINED = {
    "the three layers up to it": ({"rmu_layer": 3}, [f"{layer}.mlp.down_proj.weight" for layer in (1, 2, 3)]),
    "as many as there are": ({"rmu_layer": 1}, [f"{layer}.mlp.down_proj.weight" for layer in (0, 1)]),
    "all of a layer": (
        {"rmu_layer": 0, "rmu_tensors": "all"},
        [f"0.self_attn.{kind}_proj.weight" for kind in "qkvo"]
        + [f"0.mlp.{kind}_proj.weight" for kind in ("gate", "up", "down")]
        + ["0.input_layernorm.weight", "0.post_attention_layernorm.weight"],
    ),
}


@pytest.mark.parametrize(("options", "expected"), TRAINED.values(), ids=TRAINED)
def test_what_trains(options, expected):
    model = tiny_model(num_hidden_layers=5)
    trained = rmu(**options).parameters(model)
    names = [name for param in trained for name, other in model.named_parameters() if other is param]
    assert names == [f"model.layers.{name}" for name in expected]


def test_a_bias_of_the_down_projection_trains_too():
    model = tiny_model("gpt2")
    down = model.transformer.h[0].mlp.c_proj
    trained = rmu().parameters(model)
    assert [id(param) for param in trained] == [id(down.weight), id(down.bias)]


def test_a_live_reference_keeps_the_weights_that_train_alone(data):
    model, method = tiny_model(), rmu(reference_model="live")
    with set_up(method, model, data):
        move(method.layer.mlp.down_proj.parameters())
        assert set(method.original) == {"model.layers.0.mlp.down_proj.weight"}
        moved = model.model.layers[0].mlp.down_proj.weight.clone()
        method.loss(batch_of(data, [0], [0]))
        assert torch.equal(model.model.layers[0].mlp.down_proj.weight, moved)


@pytest.mark.parametrize("engine", ["one-backward", "two-backward"])
@pytest.mark.parametrize("reference", REFERENCES)
def test_with_ssiuu_both_gradients_are_autograds(data, reference, engine):
    model = tiny_model(dtype=torch.float64)
    before, plain = copy.deepcopy(model), copy.deepcopy(model)
    options = {"rmu_c": 2.0, "rmu_alpha": 3.0, "rmu_tensors": "all"}
    settings = {"rmu_layer": 0, **options, "reference_model": reference, "target": "prob"}
    method, regularizer = make(UnlearnOptions(method="rmu", regularizer="ssiuu", settings=settings))
    trained = method.parameters(model)
    freeze_others(model, trained)
    with sk.patch(model, scope="all", engine=engine) as handle:
        method.setup(model, handle, data)
        regularizer.setup(model, handle, method, data)
        move(trained)
        plain.load_state_dict(model.state_dict())
        regularizer.loss(batch_of(data, [0, 1], [1])).backward()
        found = [(param.grad, param.target_grad) for param in trained]
    loss = loss_by_formula(plain, before, data, [0, 1], [1], options)
    parameters = method.parameters(plain)
    probability = sum(sequence_probability(plain, sample) for sample in data.forget_samples)
    for (grad, target_grad), *expected in zip(
        found, torch.autograd.grad(loss, parameters), torch.autograd.grad(probability, parameters), strict=True
    ):
        assert (grad - expected[0]).norm() <= 1e-5 * expected[0].norm()
        assert (target_grad - expected[1]).norm() <= 1e-5 * expected[1].norm()


def sequence_probability(model, sample):
    logits = model(input_ids=torch.tensor([sample.prompt + sample.answer]), use_cache=False).logits[0]
    rows = logits[len(sample.prompt) - 1 : -1].softmax(-1)
    return torch.stack([row[token] for row, token in zip(rows, sample.answer, strict=True)]).prod()


def settings(options, regularizer="none", **changes):
    return by(options, "rmu", regularizer, **{"rmu_layer": 1, "rmu_c": 2.0, "rmu_alpha": 1.0, **changes})


RUNS = {
    "cached": ("none", {}),
    "live": ("none", {"reference_model": "live"}),
    "ssiuu": ("ssiuu", {"penalty_weight": 1e4}),
    "ssiuu, live": ("ssiuu", {"penalty_weight": 1e4, "reference_model": "live"}),
    "ssiuu, all": ("ssiuu", {"penalty_weight": 1e4, "rmu_tensors": "all"}),
    "autocast and checkpointing": ("none", {"bf16": True, "gradient_checkpointing": True}),
    "live, autocast and checkpointing": (
        "ssiuu",
        {"bf16": True, "gradient_checkpointing": True, "reference_model": "live"},
    ),
    "bfloat16 weights": ("none", {"dtype": "bfloat16"}),
}


@pytest.mark.parametrize(("regularizer", "changes"), RUNS.values(), ids=RUNS)
def test_a_run_lowers_the_loss_and_trains_nothing_else(options, tmp_path, regularizer, changes):
    options = settings(options, regularizer, max_steps=3, learning_rate=3e-2, **changes)
    before = load_model(options.model, dtype=options.dtype)[0].state_dict()
    run = unlearn(options, tmp_path / "run")
    losses = [line["loss"] for line in lines(run)]
    assert losses[-1] < losses[0]
    moved = {name for name, weight in weights(run).items() if not torch.equal(weight, before[name])}
    inside = {name for name in before if ".layers." in name}
    down = {name for name in inside if "down_proj" in name}
    assert moved == (inside if changes.get("rmu_tensors") == "all" else down)


def test_both_references_unlearn_alike(options, tmp_path):
    runs = [unlearn(settings(options, reference_model=kind), tmp_path / kind) for kind in REFERENCES]
    first, second = ([line["loss"] for line in lines(run)] for run in runs)
    assert first == pytest.approx(second, rel=1e-4)


@pytest.mark.parametrize("regularizer", ["none", "ssiuu"])
@pytest.mark.parametrize("reference", REFERENCES)
def test_a_killed_run_resumes_bit_for_bit(options, tmp_path, monkeypatch, reference, regularizer):
    options = settings(options, regularizer, reference_model=reference)
    assert_resumes_bit_for_bit(options, tmp_path, monkeypatch, step=3)


BAD = {
    "a negative layer": ("rmu_layer=-1; expected at least 0", {"rmu_layer": -1}),
    "a negative c": ("rmu_c=-1.0; expected a finite number", {"rmu_c": -1.0}),
    "an infinite alpha": ("rmu_alpha=inf; expected a finite number", {"rmu_alpha": math.inf}),
    "unknown tensors": ("rmu_tensors='up' is unknown; expected one of down, all", {"rmu_tensors": "up"}),
    "an unknown reference": (
        "reference_model='disk' is unknown; expected one of cached, live",
        {"reference_model": "disk"},
    ),
}


@pytest.mark.parametrize(("message", "changes"), BAD.values(), ids=BAD)
def test_bad_options_are_refused_before_a_model_is_loaded(options, tmp_path, message, changes):
    with pytest.raises(ValueError, match=message):
        unlearn(settings(options, model="nowhere", **changes), tmp_path / "run")


def test_a_layer_out_of_range_is_refused_before_anything_is_written(options, tmp_path):
    with pytest.raises(ValueError, match="rmu_layer=2, but the model has 2 decoder layers; expected 0 to 1"):
        unlearn(settings(options, rmu_layer=2), tmp_path / "run")
    assert not (tmp_path / "run").exists()
