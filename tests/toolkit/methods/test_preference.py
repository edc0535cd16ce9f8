"""DPO, NPO and SimNPO: their losses, the reference they are held against, and runs of each."""

import math
from dataclasses import replace

import pytest
import torch
import transformers
from torch.nn.functional import logsigmoid

import ssiuu_kernels as sk
from ssiuu.commands import unlearn as unlearn_module
from ssiuu.commands.unlearn import unlearn
from ssiuu.data.facts import Split
from ssiuu.data.prompts import PromptFormat
from ssiuu.methods.base import UnlearnData
from ssiuu.methods.reference import Reference
from ssiuu.options import UnlearnOptions
from ssiuu.pairs import make
from ssiuu.training.unlearn_trainer import UnlearnTrainer
from tests.support.small_runs import assert_resumes_bit_for_bit, by, lines
from tests.support.unlearn_data import batch_of

from ..conftest import tiny_facts

METHODS = ("dpo", "npo", "simnpo")
REFUSAL = "say no"


def split_of_all_lengths():
    """Four facts to forget and four to retain, with answers of 1, 2, 3 and 5 tokens in a random order, in other words.

    No two pairs of answers have equally many tokens, so every division into micro-batches is uneven.
    """

    def answered(facts, words):
        lengths = torch.tensor([1, 2, 3, 5])[torch.randperm(4)]
        texts = (" ".join(words[i] for i in torch.randint(2, (length,))) for length in lengths)
        return [replace(fact, answer=text, false_options=("no",)) for fact, text in zip(facts, texts, strict=True)]

    facts = tiny_facts()
    return Split(answered(facts[:4], ("rome", "oslo")), answered(facts[4:8], ("lima", "yes")), [])


@pytest.fixture
def data(loaded):
    prompts, split = PromptFormat(loaded[1], 0), split_of_all_lengths()
    samples = (prompts.encode_facts(facts) for facts in (split.forget, split.retain))
    return UnlearnData(split.forget, split.retain, *samples, prompts=prompts, seed=0)


@pytest.fixture
def refusals(data):
    return [data.prompts.encode(fact.question, REFUSAL) for fact in data.forget]


@pytest.fixture
def model(loaded):
    return loaded[0].double()


def log_probs(model, samples):
    """Of each sample alone, float64, without padding."""
    found = []
    for prompt, answer in samples:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0]
        rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
        found.append(sum(row[token] for row, token in zip(rows, answer, strict=True)))
    return torch.stack(found)


def npo(s, reference, _lengths, beta):
    return -2 / beta * logsigmoid(-beta * (s["forget"] - reference["forget"])).mean()


def dpo(s, reference, _lengths, beta):
    growth = {kind: s[kind] - reference[kind] for kind in ("forget", "refusal")}
    return -1 / beta * logsigmoid(beta * (growth["refusal"] - growth["forget"])).mean()


def simnpo(s, _reference, lengths, beta, gamma):
    return -2 / beta * logsigmoid(-beta / lengths * s["forget"] - gamma).mean()


FORMULAS = {
    "npo": (npo, {"beta": 0.3}, {}),
    "dpo": (dpo, {"beta": 0.4}, {"refusal": REFUSAL}),
    "simnpo": (simnpo, {"beta": 1.7, "gamma": 0.6}, {}),
    "npo's defaults": (npo, {"beta": 0.1}, None),
    "simnpo's defaults": (simnpo, {"beta": 2.5, "gamma": 0.0}, None),
}


@pytest.mark.parametrize(("formula", "numbers", "texts"), FORMULAS.values(), ids=FORMULAS)
def test_the_loss_is_the_formula(model, data, refusals, formula, numbers, texts):
    settings = {} if texts is None else numbers | texts
    method, _ = make(UnlearnOptions(method=formula.__name__, settings=settings))
    forget, retain = torch.randperm(4).tolist()[:3], torch.randperm(4).tolist()[:2]
    chosen = {
        "forget": [data.forget_samples[i] for i in forget],
        "refusal": [refusals[i] for i in forget],
        "retain": [data.retain_samples[i] for i in retain],
    }
    reference = {kind: log_probs(model, samples) for kind, samples in chosen.items()}
    with sk.patch(model, scope="all") as handle:
        method.setup(model, handle, data)
        with torch.no_grad():
            for param in model.parameters():
                param.add_(0.03 * torch.randn_like(param))
        loss = method.loss(batch_of(data, forget, retain, method.companions(data))).value
    s = {kind: log_probs(model, samples) for kind, samples in chosen.items()}
    lengths = {kind: torch.tensor([len(sample.answer) for sample in samples]) for kind, samples in chosen.items()}
    expected = formula(s, reference, lengths["forget"], **numbers) - s["retain"].sum() / lengths["retain"].sum()
    assert torch.allclose(loss, expected, rtol=1e-9)


def test_dpo_prefers_the_papers_refusal(data):
    method, _ = make(UnlearnOptions(method="dpo"))
    expected = [data.prompts.encode(fact.question, "I can't answer the question.") for fact in data.forget]
    assert method.companions(data) == expected


@pytest.mark.parametrize("with_companions", [False, True])
def test_the_reference_of_a_batch(model, data, refusals, with_companions):
    companions = refusals if with_companions else None
    reference = Reference(model, data, companions)
    forget = torch.randperm(4).tolist()[:3]
    found = reference.log_probs(batch_of(data, forget, [2, 3], companions))
    samples = [part[i] for part in (data.forget_samples, companions or []) for i in forget[: len(part)]]
    assert torch.allclose(found, torch.cat([log_probs(model, samples), torch.zeros(2)]), rtol=1e-9)
    assert not found.requires_grad


def test_the_reference_is_of_a_model_in_eval_mode(loaded, data):
    config = transformers.GPT2Config(vocab_size=len(loaded[1]), n_embd=8, n_layer=1, n_head=2, n_positions=64)
    model = transformers.GPT2LMHeadModel(config).train()  # with dropout
    found = Reference(model, data, None).log_probs(batch_of(data, range(4), []))
    assert model.training
    assert torch.allclose(found, log_probs(model.eval(), data.forget_samples), rtol=1e-4)


def test_a_reference_that_is_not_finite_is_refused(model, data, refusals):
    with torch.no_grad():  # the first token of every refusal, from which its second is predicted
        model.get_input_embeddings().weight[refusals[0].answer[0]] = math.nan
    said = f"the answer '{REFUSAL}' to '{data.forget[0].question}' a log-probability of nan; expected a finite one"
    with pytest.raises(ValueError, match=said):
        Reference(model, data, refusals)


@pytest.mark.parametrize(("method", "forgetting"), [("npo", 2 * math.log(2) / 0.1), ("dpo", math.log(2) / 0.1)])
def test_a_run_starts_at_the_reference(options, loaded, tmp_path, method, forgetting):
    split = split_of_all_lengths()
    run = unlearn(by(options, method, max_steps=1), tmp_path / "run", split=split)
    retain = PromptFormat(loaded[1], 0).encode_facts(split.retain)
    tokens = sum(len(sample.answer) for sample in retain)
    expected = forgetting - log_probs(loaded[0], retain).sum().item() / tokens
    assert lines(run)[0]["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_give_the_gradients_of_the_whole_step(options, tmp_path, monkeypatch, method):
    split, found = split_of_all_lengths(), []

    def look(trainer):
        named = trainer.model.named_parameters()
        found.append({name: (param.grad.clone(), param.target_grad.clone()) for name, param in named})
        return {}

    monkeypatch.setattr(UnlearnTrainer, "gradient_metrics", look)
    losses = []
    for changes in ({"forget_batch": 4}, {"forget_batch": 2, "accumulate": 2}):
        run = unlearn(by(options, method, "ssiuu", max_steps=1, **changes), tmp_path / str(len(losses)), split=split)
        losses.append(lines(run)[0]["loss"])
    (whole, parts) = found
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for name, gradients in whole.items():
        for gradient, actual in zip(gradients, parts[name], strict=True):
            assert torch.allclose(actual, gradient, rtol=1e-3, atol=1e-6 + 1e-4 * gradient.abs().max()), name


@pytest.mark.parametrize(("regularizer", "engine"), [("none", "plain"), ("ssiuu", "one-backward")])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_moves_the_forget_probability(options, tmp_path, method, regularizer, engine):
    """Where to, in three steps of a random model, is a matter of its weights; the losses are tested above."""
    run = unlearn(by(options, method, regularizer, max_steps=3), tmp_path / "run", split=split_of_all_lengths())
    assert {line["engine"] for line in lines(run)} == {engine}
    evaluation = run.read("evaluation.json")
    assert evaluation["after"]["forget_probability"] != evaluation["before"]["forget_probability"]


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_resumes_bit_for_bit(options, tmp_path, monkeypatch, method):
    options = by(options, method, "ssiuu", accumulate=2, forget_batch=2, max_steps=4)
    assert_resumes_bit_for_bit(options, tmp_path, monkeypatch, 3)


BAD = {
    "no beta": ("beta=0; expected a finite number above 0", "npo", {"beta": 0}),
    "a beta that is not finite": ("beta=inf", "dpo", {"beta": math.inf}),
    "a beta that is not a number": ("beta=nan", "simnpo", {"beta": math.nan}),
    "a negative gamma": (r"gamma=-0.1; expected a finite number, at least 0", "simnpo", {"gamma": -0.1}),
    "a gamma that is not finite": ("gamma=nan", "simnpo", {"gamma": math.nan}),
    "no refusal": ("refusal=''; expected the text to prefer .* such as \"I can't answer", "dpo", {"refusal": ""}),
    "a blank refusal": (r"refusal=' \\n'; expected the text", "dpo", {"refusal": " \n"}),
    "no text for a refusal": ("refusal=None; expected the text", "dpo", {"refusal": None}),
    "a refusal that nothing reads": ("refusal is not an option of method 'npo'", "npo", {"refusal": REFUSAL}),
}


@pytest.mark.parametrize(("message", "method", "settings"), BAD.values(), ids=BAD)
def test_bad_options_are_refused_before_any_work(options, tmp_path, monkeypatch, message, method, settings):
    monkeypatch.setattr(unlearn_module, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=message):
        unlearn(by(options, method, **settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_refusal_that_does_not_fit_the_model(options, loaded, tmp_path):
    config = transformers.GPT2Config(vocab_size=60, n_embd=8, n_layer=1, n_head=2, n_positions=20)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    loaded[1].save_pretrained(tmp_path / "model")
    message = r"no no no no' has \d+ tokens with its examples, more than the model's 20 positions"
    with pytest.raises(ValueError, match=message):
        unlearn(by(options, "dpo", model=str(tmp_path / "model"), refusal="no " * 20 + "no"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
