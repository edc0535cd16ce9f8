"""MU-Mis: its two norms, the tokens that it draws, and its stop."""

import copy
import math

import pytest
import torch

import ssiuu_kernels as sk
from ssiuu.commands.unlearn import unlearn
from ssiuu.data.facts import Fact, Split
from ssiuu.data.prompts import PromptFormat
from ssiuu.methods.mu_mis import MuMis
from ssiuu.options import UnlearnOptions
from ssiuu.pairs import make
from tests.support.models import tiny_model
from tests.support.small_runs import assert_resumes_bit_for_bit, by, lines, weights
from tests.support.unlearn_data import batch_of, data_of

FORGET = [
    Fact("where ann born", "rome"),
    Fact("where bob lives", "oslo lima rome"),
    Fact("where cid born", "lima oslo"),
]
RETAIN = [Fact("where dee lives", "lima oslo lima rome")]
# A form of MLP each; weights that are [in, out]; learned positions; embeddings that are scaled, and tied.
FAMILIES = ["llama", "phi3", "gpt2", "opt", "gemma"]
OPTIONS = {"parameter": {"scope": "all"}, "neuron": {"level": "neuron", "forget_samples": 3}}


@pytest.fixture
def data(loaded):
    return data_of(PromptFormat(loaded[1], 0), FORGET, RETAIN)


@pytest.fixture
def batch(data):
    return batch_of(data, [0, 1, 2], [0])


def mu_mis(**settings):
    return make(UnlearnOptions(method="mu-mis", settings=settings))[0]


@pytest.fixture
def others(data, monkeypatch):
    """Other tokens than those of the forget answers, in one row, which every loss takes."""
    answers = torch.tensor([token for sample in data.forget_samples for token in sample.answer])
    tokens = (answers + torch.randint(1, 61, answers.shape)) % 61
    monkeypatch.setattr(MuMis, "_other_tokens", lambda *_: tokens)
    return tokens


def norms_by_formula(model, samples, others):
    """`|grad_x f_c|^2` and `|grad_x f_c'|^2` of each sample alone, without padding, on eager attention."""
    model.set_attn_implementation("eager")
    left, found = list(others), []
    for prompt, answer in samples:
        x = model.get_input_embeddings()(torch.tensor([prompt + answer]))
        logits = model(inputs_embeds=x, use_cache=False).logits[0, len(prompt) - 1 : -1]
        replaced, left = left[: len(answer)], left[len(answer) :]
        for tokens in (answer, replaced):
            mean = sum(row[token] for row, token in zip(logits, tokens, strict=True)) / len(answer)
            found.append((torch.autograd.grad(mean, x, create_graph=True)[0] ** 2).sum())
    return torch.stack(found[::2]), torch.stack(found[1::2])


def assert_near(grads, expected):
    """Each is as expected but for rounding, float32's in transformers' softmax; keys' biases have nothing but that."""
    room = 1e-6 * torch.stack([grad.norm() for grad in expected]).norm()
    for actual, grad in zip(grads, expected, strict=True):
        assert ((0 if actual is None else actual) - grad).norm() < 1e-5 * grad.norm() + room


@pytest.mark.parametrize("level", OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_norms_and_the_gradient_are_the_formula(data, batch, others, family, level):
    model = tiny_model(family, torch.float64).eval()
    plain, method = copy.deepcopy(model), mu_mis()
    answer, other = norms_by_formula(plain, data.forget_samples, others)
    # A bias behind the last activation is in no gradient.
    expected = torch.autograd.grad((answer - other).sum() / 3, list(plain.parameters()), materialize_grads=True)
    with sk.patch(model, **OPTIONS[level]) as handle:
        method.setup(model, handle, data)
        found = method.sensitivities(batch.only(batch.forget))
        method.loss(batch).value.backward()
    assert torch.allclose(found.answer, answer, rtol=1e-5)
    assert torch.allclose(found.other, other, rtol=1e-5)
    assert_near([param.grad for param in model.parameters()], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_penalty_gets_the_gradient_of_the_probabilities(data, batch, others, family):
    model = tiny_model(family, torch.float64).eval()
    plain = copy.deepcopy(model)
    method, regularizer = make(UnlearnOptions(method="mu-mis", regularizer="ssiuu"))
    logits = plain(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    probability = sk.sequence_log_probs(logits, batch.labels)[batch.forget].exp().sum()
    targets = torch.autograd.grad(probability, list(plain.parameters()), materialize_grads=True)
    with sk.patch(model, scope="all") as handle:
        method.setup(model, handle, data)
        regularizer.setup(model, handle, method, data)
        params = list(model.parameters())
        grads = torch.autograd.grad(method.loss(batch).value, params, materialize_grads=True)
        regularizer.loss(batch).backward()
        assert_near([param.target_grad for param in params], targets)
        assert_near([param.grad for param in params], grads)


def test_frozen_embeddings_change_nothing_else(data, batch, others):
    model, method = tiny_model("qwen2"), mu_mis()
    trained = [param for param in model.parameters() if param is not model.get_input_embeddings().weight]
    with sk.patch(model, scope="all") as handle:
        method.setup(model, handle, data)
        whole = torch.autograd.grad(method.loss(batch).value, trained)
        model.get_input_embeddings().weight.requires_grad_(False)
        part = torch.autograd.grad(method.loss(batch).value, trained)
    assert all(torch.equal(*pair) for pair in zip(whole, part, strict=True))


def test_autocast_is_as_near_as_bfloat16(data, batch, others):
    model, method, found = tiny_model(), mu_mis(), []
    with sk.patch(model, scope="all") as handle:
        method.setup(model, handle, data)
        for enabled in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                loss = method.loss(batch).value
            found.append(torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(model.parameters()))]))
    assert (found[1] - found[0]).norm() < 0.1 * found[0].norm()
    assert not torch.equal(*found)


def test_a_loss_leaves_the_model_as_it_was(data, batch):
    model, method, state = tiny_model(), mu_mis(), torch.get_rng_state()
    with sk.patch(model, scope="all") as handle:
        method.setup(model, handle, data)
        method.loss(batch)
        assert handle.attribute({name: getattr(batch, name) for name in ("input_ids", "attention_mask", "labels")})
    assert not model.get_input_embeddings()._forward_hooks
    assert torch.equal(torch.get_rng_state(), state)


def drawn(data, tokens, times, vocabulary=5):
    method = mu_mis()
    method.setup(tiny_model(), None, data)
    return torch.stack([method._other_tokens(tokens, vocabulary) for _ in range(times)])


def test_other_tokens_are_all_but_the_answers(data):
    tokens = torch.arange(5)
    found = drawn(data, tokens, 200)
    for token, column in zip(tokens.tolist(), found.T.tolist(), strict=True):
        assert set(column) == set(range(5)) - {token}


def test_other_tokens_are_drawn_by_the_seed(data):
    tokens = torch.zeros(40, dtype=torch.int64)
    assert torch.equal(drawn(data, tokens, 2), drawn(data, tokens, 2))
    assert not torch.equal(*drawn(data, tokens, 2))
    assert not torch.equal(drawn(data_of(data.prompts, FORGET, RETAIN, seed=1), tokens, 1), drawn(data, tokens, 1))


COURSES = {
    "back at delta": ([[10, 10, 10], [5, 5, 5], [9, 9, 9]], [False, False, True]),
    "back below delta": ([[10, 10, 10], [5, 5, 5], [8, 8, 8]], [False, False, False]),
    "never below delta": ([[10, 10, 10], [9.5, 9, 9], [12, 12, 12]], [False, False, False]),
    "by its sum": ([[10, 10, 10], [20, 1, 1], [20, 1, 6]], [False, False, True]),
}


@pytest.mark.parametrize(("course", "expected"), COURSES.values(), ids=COURSES)
@pytest.mark.parametrize("size", [3, 1], ids=["all facts", "one fact"])
def test_the_stop(data, batch, monkeypatch, course, expected, size):
    model, method, found = tiny_model(), mu_mis(), []
    values = iter(part for step in course for part in torch.tensor(step, dtype=torch.float32).split(size))
    zero = torch.zeros((), requires_grad=True)
    monkeypatch.setattr(MuMis, "sensitivities", lambda *_: (zero, next(values) + zero))
    with sk.patch(model, scope="all") as handle:
        method.setup(model, handle, data)
        for _ in course:
            for ids in range(0, 3, size):
                method.loss(batch.only((batch.ids >= ids) & (batch.ids < ids + size) & batch.forget))
            found.append(method.finished)
    assert found == expected


def test_a_run_stops_when_the_method_has_finished(options, tmp_path, monkeypatch):
    levels = iter([1.0, 0.5, 0.6, 0.95, 0.95])
    monkeypatch.setattr(MuMis, "_level", lambda _: next(levels))
    run = unlearn(by(options, "mu-mis", evaluate_every=1), tmp_path / "run")
    assert len(lines(run)) == 3


def test_a_micro_batch_counts_by_its_facts(options, tmp_path, monkeypatch, facts):
    monkeypatch.setattr(MuMis, "_other_tokens", lambda _self, tokens, vocabulary: (tokens + 1) % vocabulary)
    texts = ["rome", "rome oslo", "oslo lima rome", "lima oslo", "rome lima"]
    facts = [Fact(fact.question, text, ("yes",)) for fact, text in zip(facts, texts, strict=False)]
    split, found = Split(facts[:4], facts[4:], []), []
    for accumulate in (1, 2):
        steps = by(options, "mu-mis", max_steps=1, accumulate=accumulate, forget_batch=4 // accumulate, retain_batch=1)
        found.append(lines(unlearn(steps, tmp_path / str(accumulate), split=split))[0])
    whole, parts = found
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-4)
    assert parts["loss_grad_norm"] == pytest.approx(whole["loss_grad_norm"], rel=1e-4)


REGULARIZERS = {"none": {}, "ssiuu": {"penalty_weight": 1.0}}


@pytest.mark.parametrize("regularizer", REGULARIZERS)
def test_a_run_lowers_the_loss(options, tmp_path, monkeypatch, regularizer):
    monkeypatch.setattr(MuMis, "_other_tokens", lambda _self, tokens, vocabulary: (tokens + 1) % vocabulary)
    options = by(options, "mu-mis", regularizer, max_steps=3, **REGULARIZERS[regularizer])
    found = [line["loss"] for line in lines(unlearn(options, tmp_path / "run"))]
    assert found[2] < found[1] < found[0]


def test_updates_in_backward_change_no_bit(options, tmp_path, monkeypatch):
    monkeypatch.setattr("ssiuu_kernels.optim.update_in_backward.WAITING", 100)
    options = by(options, "mu-mis", "ssiuu", max_steps=3, penalty_weight=1e4)
    during = weights(unlearn(options.replace(update_in_backward=True), tmp_path / "during"))
    after = weights(unlearn(options, tmp_path / "after"))
    assert all(torch.equal(during[name], after[name]) for name in after)


@pytest.mark.parametrize("regularizer", REGULARIZERS)
@pytest.mark.parametrize("step", [1, 3])
def test_a_killed_run_resumes_bit_for_bit(options, tmp_path, monkeypatch, step, regularizer):
    options = by(options, "mu-mis", regularizer, accumulate=2, forget_batch=2, **REGULARIZERS[regularizer])
    assert_resumes_bit_for_bit(options, tmp_path, monkeypatch, step)


def test_the_stop_is_resumed(data, batch):
    method, resumed = mu_mis(), mu_mis()
    for made in (method, resumed):
        made.setup(tiny_model(), None, data)
    method._note(torch.arange(3), torch.tensor([4.0, 4.0, 4.0]))
    method._note(torch.arange(3), torch.tensor([1.0, 4.0, 4.0]))
    resumed.load_state_dict(method.state_dict())
    assert not resumed.finished
    resumed._note(torch.tensor([0]), torch.tensor([3.9]))
    assert resumed.finished


BAD = {
    "no fraction": ("mu_mis_delta=0.0; expected a fraction", {"mu_mis_delta": 0.0}),
    "above the start": ("mu_mis_delta=1.5; expected a fraction", {"mu_mis_delta": 1.5}),
    "not a number": ("mu_mis_delta=nan; expected a fraction", {"mu_mis_delta": math.nan}),
    "an attention": (
        "attn_implementation='flash_attention_2' with method",
        {"attn_implementation": "flash_attention_2"},
    ),
    "checkpointing": ("gradient_checkpointing=True with method 'mu-mis'", {"gradient_checkpointing": True}),
}


@pytest.mark.parametrize(("message", "changes"), BAD.values(), ids=BAD)
def test_bad_options_are_refused_before_a_model_is_loaded(options, tmp_path, message, changes):
    with pytest.raises(ValueError, match=message):
        unlearn(by(options, "mu-mis", model="nowhere", **changes), tmp_path / "run")


def test_an_attention_without_second_derivatives(data):
    model = tiny_model()
    model.config._attn_implementation = "flash"
    with pytest.raises(ValueError, match="attn_implementation='flash' with method 'mu-mis', which needs second"):
        mu_mis().setup(model, None, data)


def test_embeddings_that_run_twice(data, batch):
    model, method = tiny_model(), mu_mis()

    def run_them(model, _):
        model.get_input_embeddings()(batch.input_ids)

    model.register_forward_pre_hook(run_them)
    with sk.patch(model, scope="all") as handle:
        method.setup(model, handle, data)
        with pytest.raises(ValueError, match="LlamaForCausalLM ran its input embeddings 2 times in a forward"):
            method.loss(batch)
