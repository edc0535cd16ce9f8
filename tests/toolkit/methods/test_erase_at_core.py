"""Erase at the Core: its loss, the states that it compares with, and what it refuses."""

import copy
import math
import random
from dataclasses import replace

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

# Answers of one to three tokens, so that samples differ in length. Each forget fact has two retain facts with another
# answer, so that nothing is left to the draw.
FORGET = [Fact("where ann born", "rome"), Fact("where bob born", "oslo lima rome")]
RETAIN = [Fact("where cid lives", "lima rome"), Fact("where", "rome"), Fact("where dee lives", "oslo lima rome")]
# The option with the number of layers, and where these and the final norm are.
PLACES = {
    "llama": ("num_hidden_layers", "model.layers", "model.norm"),
    "phi3": ("num_hidden_layers", "model.layers", "model.norm"),
    "gpt2": ("n_layer", "transformer.h", "transformer.ln_f"),
    "gpt_neox": ("num_hidden_layers", "gpt_neox.layers", "gpt_neox.final_layer_norm"),
    "opt": ("num_hidden_layers", "model.decoder.layers", "model.decoder.final_layer_norm"),
}


@pytest.fixture
def data(loaded):
    return data_of(PromptFormat(loaded[1], 0), FORGET, RETAIN)


def erase_at_core(**settings):
    return make(UnlearnOptions(method="erase-at-core", settings={"eac_layers": 2, **settings}))[0]


def set_up(method, model, data):
    """A handle of the model with the method's parameters alone trainable; the caller unpatches it."""
    trained = method.parameters(model)
    for param in model.parameters():
        param.requires_grad_(any(param is other for other in trained))
    handle = sk.patch(model, scope="all")
    method.setup(model, handle, data)
    return handle


@torch.no_grad()
def move(params):
    """As some steps of training would."""
    for param in params:
        param += 0.1 * torch.randn_like(param)


def states_and_logits(model, sample, modules):
    """`[tokens, D]` after each of the modules of these names, and logits, of the sample alone."""
    found = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, output, name=name: found.update({name: output[0] if isinstance(output, tuple) else output})
        )
        for name in modules
    ]
    logits = model(input_ids=torch.tensor([sample.prompt + sample.answer]), use_cache=False).logits[0]
    for hook in hooks:
        hook.remove()
    return [found[name][0] for name in modules], logits


def nll(logits, sample):
    rows = logits[len(sample.prompt) - 1 : -1].log_softmax(-1)
    return -sum(row[token] for row, token in zip(rows, sample.answer, strict=True))


def cosine(a, b):
    return (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())


def loss_by_formula(model, before, data, forget, retain, modules, norm, options):
    """With every retain fact of another answer as a positive."""
    temperature, contrast, output, inner = options["eac_temperature"], [], 0, 0
    for index in forget:
        sample = data.forget_samples[index]
        now, then = (question_states(net, sample, modules) for net in (model, before))
        for other, fact in zip(data.retain_samples, data.retain, strict=True):
            if fact.answer != data.forget[index].answer:
                for h, o, p in zip(now, then, question_states(before, other, modules), strict=True):
                    pull, push = ((cosine(h, x.detach()) / temperature).exp() for x in (p, o))
                    contrast.append(-(pull / (pull + push)).log())
    for index in retain:
        sample = data.retain_samples[index]
        states, logits = states_and_logits(model, sample, modules)
        output = output + nll(logits, sample)
        lens = [model.get_output_embeddings()(model.get_submodule(norm)(h)) for h in states[:-1]]
        inner = inner + sum(nll(logits, sample) for logits in lens) / max(1, len(lens))
    tokens = sum(len(data.retain_samples[index].answer) for index in retain)
    forget_loss = options["eac_forget_weight"] * sum(contrast) / len(contrast)
    return (output + options["eac_retain_weight"] * inner) / tokens + forget_loss


def question_states(model, sample, modules):
    states, _ = states_and_logits(model, sample, modules)
    return [at_layer[len(sample.prompt) - 1] for at_layer in states]


def random_options():
    names = ("eac_forget_weight", "eac_retain_weight", "eac_temperature")
    return {name: 0.2 + torch.rand(()).item() for name in names}


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("family", PLACES)
def test_the_loss_and_its_gradients_are_the_formula(data, family, number):
    size, layers, norm = PLACES[family]
    model, options = tiny_model(family, torch.float64, **{size: 3}), random_options()
    before, plain = copy.deepcopy(model), copy.deepcopy(model)
    method = erase_at_core(eac_layers=number, **options)
    trained = method.parameters(model)
    with set_up(method, model, data):
        move(trained)
        plain.load_state_dict(model.state_dict())
        loss, logits = method.loss(batch_of(data, [1, 0], [2, 0]))
        actual = torch.autograd.grad(loss, trained)
    modules = [f"{layers}.{index}" for index in (0, 1, 2)[-number:]]
    expected = loss_by_formula(plain, before, data, [1, 0], [2, 0], modules, norm, options)
    assert torch.allclose(loss, expected, rtol=1e-6)
    for one, other in zip(actual, torch.autograd.grad(expected, method.parameters(plain)), strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm() + 1e-12
    assert logits.shape[0] == 4


def test_a_step_is_the_mean_of_its_micro_batches(data):
    model, method = tiny_model(dtype=torch.float64), erase_at_core()
    trained = method.parameters(model)
    with set_up(method, model, data):
        move(trained)
        found = []
        for forget, retain in (([0, 1], [0, 1]), ([1], [0]), ([0], [1])):
            # Three retain tokens in the step, divided by its micro-batches.
            batch = replace(batch_of(data, forget, retain), retain_tokens=3 * len(retain) / 2)
            found.append(torch.autograd.grad(method.loss(batch).value, trained))
    for whole, first, second in zip(*found, strict=True):
        assert (whole - (first + second) / 2).norm() < 1e-6 * whole.norm()


def test_micro_batches_of_a_run_add_up(options, tmp_path):
    split = Split(FORGET, RETAIN[1:], [])
    found = []
    for accumulate in (1, 2):
        batches = dict.fromkeys(("forget_batch", "retain_batch"), 2 // accumulate)
        steps = settings(options, max_steps=1, accumulate=accumulate, **batches)
        found.append(lines(unlearn(steps, tmp_path / str(accumulate), split=split))[0])
    whole, parts = found
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert parts["loss_grad_norm"] == pytest.approx(whole["loss_grad_norm"], rel=1e-4)


def test_states_before_unlearning_are_of_a_model_in_eval_mode(data):
    model = tiny_model("gpt2", torch.float64, resid_pdrop=0.5)
    plain, method = copy.deepcopy(model).eval(), erase_at_core(eac_layers=1)
    with set_up(method, model, data):
        for found, sample in zip(method.original, data.forget_samples, strict=True):
            assert torch.allclose(found, torch.stack(question_states(plain, sample, ["transformer.h.1"])))
    assert model.training


def drawn_positives(data, retain, **changes):
    """For each forget fact, the places in the retain set whose states are its positives."""
    data, method, model = data_of(data.prompts, FORGET, retain, **changes), erase_at_core(eac_positives=2), tiny_model()
    with set_up(method, model, data):
        states = method._question_states(data.retain_samples)
        return [
            [next(i for i, other in enumerate(states) if torch.allclose(other, state)) for state in of_fact]
            for of_fact in method.positives
        ]


def test_positives_are_retain_facts_with_another_answer(data, facts):
    retain = [fact for fact in facts[4:] if fact.answer != "rome"][:4]
    retain += [Fact("where ann lives", "rome"), Fact("where bob lives", "oslo lima rome")]
    for fact, places in zip(FORGET, drawn_positives(data, retain), strict=True):
        assert len(set(places)) == 2
        assert all(retain[place].answer != fact.answer for place in places)


def test_positives_are_as_many_for_every_fact(data):
    assert [len(places) for places in drawn_positives(data, RETAIN[1:])] == [1, 1]


def test_positives_are_drawn_by_the_seed(data, facts):
    def drawn(seed):
        return drawn_positives(data, facts[4:], seed=seed)

    assert drawn(0) == drawn(0)
    assert any(drawn(seed) != drawn(0) for seed in range(1, 9))


def test_setup_leaves_the_global_generator_alone(data):
    model, method, state = tiny_model(), erase_at_core(), torch.get_rng_state()
    of_python = random.getstate()
    with set_up(method, model, data):
        assert torch.equal(torch.get_rng_state(), state)
        assert random.getstate() == of_python


SPACED = {1: [4], 2: [2, 4], 3: [1, 3, 4], 4: [1, 2, 3, 4], 5: [0, 1, 2, 3, 4]}


@pytest.mark.parametrize(("number", "expected"), SPACED.items())
def test_layers_are_evenly_spaced_and_end_with_the_last(data, number, expected):
    model, method = tiny_model(num_hidden_layers=5), erase_at_core(eac_layers=number)
    with set_up(method, model, data):
        assert [list(model.model.layers).index(layer) for layer in method.layers] == expected


def settings(options, regularizer="none", **changes):
    return by(options, "erase-at-core", regularizer, **{"eac_layers": 2, **changes})


RUNS = {
    "none": ("none", {}),
    "ssiuu": ("ssiuu", {"penalty_weight": 1e4}),
    "ssiuu, two backwards": ("ssiuu", {"penalty_weight": 1e4, "engine": "two-backward"}),
    "ssiuu, in backward": ("ssiuu", {"penalty_weight": 1e4, "update_in_backward": True}),
    "autocast and checkpointing": ("none", {"bf16": True, "gradient_checkpointing": True}),
    "ssiuu, autocast and checkpointing": (
        "ssiuu",
        {"penalty_weight": 1e4, "bf16": True, "gradient_checkpointing": True},
    ),
    "bfloat16 weights": ("none", {"dtype": "bfloat16"}),
}


@pytest.mark.parametrize(("regularizer", "changes"), RUNS.values(), ids=RUNS)
def test_a_run_lowers_the_loss_and_trains_the_decoder_layers(options, tmp_path, regularizer, changes):
    options = settings(options, regularizer, max_steps=3, **changes)
    before = load_model(options.model, dtype=options.dtype)[0].state_dict()
    run = unlearn(options, tmp_path / "run")
    losses = [line["loss"] for line in lines(run)]
    assert losses[-1] < losses[0]
    moved = {name for name, weight in weights(run).items() if not torch.equal(weight, before[name])}
    assert moved == {name for name in before if ".layers." in name}


@pytest.mark.parametrize("regularizer", ["none", "ssiuu"])
def test_a_killed_run_resumes_bit_for_bit(options, tmp_path, monkeypatch, regularizer):
    assert_resumes_bit_for_bit(settings(options, regularizer), tmp_path, monkeypatch, step=3)


BAD = {
    "no layers": ("eac_layers=0; expected at least 1", {"eac_layers": 0}),
    "no positives": ("eac_positives=0; expected at least 1", {"eac_positives": 0}),
    "a negative weight": ("eac_forget_weight=-1.0; expected a finite number", {"eac_forget_weight": -1.0}),
    "an infinite weight": ("eac_retain_weight=inf; expected a finite number", {"eac_retain_weight": math.inf}),
    "no temperature": ("eac_temperature=0.0; expected a finite number above 0", {"eac_temperature": 0.0}),
}


@pytest.mark.parametrize(("message", "changes"), BAD.values(), ids=BAD)
def test_bad_options_are_refused_before_a_model_is_loaded(options, tmp_path, message, changes):
    with pytest.raises(ValueError, match=message):
        unlearn(settings(options, model="nowhere", **changes), tmp_path / "run")


def test_more_layers_than_there_are(options, tmp_path):
    with pytest.raises(ValueError, match="eac_layers=3, but the model has 2 decoder layers; expected at most that"):
        unlearn(settings(options, eac_layers=3), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_retain_facts_that_all_have_a_forget_facts_answer(options, tmp_path):
    split = Split(FORGET, [Fact(question, "rome") for question in ("where cid lives", "where dee lives")], [])
    with pytest.raises(ValueError, match="all 2 retain facts have the answer 'rome'; give retain facts with others"):
        unlearn(settings(options), tmp_path / "run", split=split)
    assert not (tmp_path / "run").exists()


def test_a_model_that_caps_its_logits_is_refused(data):
    model, method = tiny_model("gemma2", final_logit_softcapping=1.0), erase_at_core()
    model.model.norm.weight.data += 10.0
    with pytest.raises(ValueError, match="logits are not its output head on its final norm"):
        set_up(method, model, data)
