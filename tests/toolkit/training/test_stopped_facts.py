"""Facts that leave the loss once they are forgotten: which, what is then trained, and what the penalty compares."""

import math
from dataclasses import replace

import pytest
import torch

import ssiuu_kernels as sk
from ssiuu.commands.unlearn import unlearn
from ssiuu.data.facts import Fact, Split
from ssiuu.data.prompts import PromptFormat
from ssiuu.evaluation.likelihood import FactScores
from ssiuu.evaluation.protocol import Protocol
from ssiuu.methods.likelihood import GradientDifference
from ssiuu.methods.mu_mis import MuMis
from ssiuu.methods.registry import methods
from ssiuu.options import UnlearnOptions
from ssiuu.pairs import make
from ssiuu.training.stopped_facts import StoppedFacts
from tests.support.models import tiny_model
from tests.support.small_runs import assert_resumes_bit_for_bit, by, lines
from tests.support.unlearn_data import batch_of, data_of

from ..conftest import tiny_facts

SETTINGS = {
    "rmu": {"rmu_layer": 1, "rmu_c": 2.0},
    "erase-at-core": {"eac_layers": 1},
    "klue": {"klue_questions": 1},
    "dpo": {"refusal": "say no"},
    "simnpo": {"beta": 0.1},  # at the default, answers as unlikely as these no longer count
}


def scores(values, margins=None):
    values = torch.tensor(values)
    return FactScores(values, values, torch.full_like(values, math.nan) if margins is None else torch.tensor(margins))


LEAVE = {
    "with options": ([1.0, 0.0, 0.0, 1.0], 1 / 3, [1, 2]),
    "free text": ([0.5, 0.1971, 0.2, 0.0], 0.1971, [1, 3]),
    "without a stop": ([1.0, 0.0, 0.5, 1.0], -1.0, [1]),
}


@pytest.mark.parametrize(("values", "threshold", "expected"), LEAVE.values(), ids=LEAVE)
def test_facts_at_the_threshold_leave(values, threshold, expected):
    stopped = StoppedFacts(0.0)
    assert stopped.ids == []
    stopped.observe(scores(values), threshold)
    assert stopped.ids == expected


# Margins of one fact, evaluation by evaluation -> whether it has left after each, by a margin of 0.5.
COURSES = {
    "wrong by less than the margin": ([0.1, -0.4], [False, False]),
    "wrong by the margin": ([0.1, -0.5], [False, True]),
    "out, and still wrong": ([-0.7, -0.1, 0.0], [True, True, True]),
    "answered again": ([-0.7, 0.1, -0.4], [True, False, False]),
}


@pytest.mark.parametrize(("margins", "expected"), COURSES.values(), ids=COURSES)
def test_a_margin_holds_facts_in_and_out(margins, expected):
    stopped, found = StoppedFacts(0.5), []
    for margin in margins:
        stopped.observe(scores([1.0, float(margin > 0)], [1.0, margin]), 1 / 3)
        found.append(stopped.ids == [1])
    assert found == expected


def of_run(options, method, regularizer="none", **changes):
    settings = SETTINGS.get(method, {}) | ({"penalty_weight": 1.0} if regularizer.startswith("ssiuu") else {})
    return by(options, method, regularizer, **{"stop_facts": True, **settings, **changes})


def test_a_run_trains_on_what_is_left_at_each_evaluation(options, tmp_path, monkeypatch):
    seen, loss, score = [], GradientDifference.loss, Protocol.score
    between = iter(
        torch.tensor(line).float() for line in ([1, 0, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]) for _ in ("forget", "retain")
    )
    monkeypatch.setattr(
        GradientDifference,
        "loss",
        lambda method, batch: seen.append(sorted(batch.ids[batch.forget].tolist())) or loss(method, batch),
    )
    monkeypatch.setattr(
        Protocol, "score", lambda *given, **bar: score(*given, **bar) if bar else FactScores(*[next(between)] * 3)
    )
    run = unlearn(of_run(options, "gd", max_steps=3, evaluate_every=1), tmp_path / "run")
    assert seen == [[0, 1, 2, 3], [0, 2], [0, 1, 2]]
    assert [line["facts_in_loss"] for line in lines(run)] == [4, 2, 3]


def test_facts_stay_where_nothing_was_asked_for(options, tmp_path, monkeypatch):
    monkeypatch.setattr(StoppedFacts, "observe", lambda *_: 1 / 0)
    unlearn(of_run(options, "gd", stop_facts=False, max_steps=1), tmp_path / "run")


@pytest.mark.parametrize("method", methods())
def test_micro_batches_count_by_what_is_left(options, tmp_path, monkeypatch, method):
    monkeypatch.setattr(MuMis, "_other_tokens", lambda _self, tokens, vocabulary: (tokens + 1) % vocabulary)
    monkeypatch.setattr(StoppedFacts, "ids", property(lambda _: [2], lambda *_: None), raising=False)
    texts = ["rome", "rome oslo", "oslo lima rome", "lima oslo", "rome lima"] * 2
    facts = [Fact(fact.question, text, ("yes",)) for fact, text in zip(tiny_facts(), texts, strict=False)]
    split, found = Split(facts[:4], facts[4:8], []), []
    for accumulate in (1, 2):
        batches = dict.fromkeys(("forget_batch", "retain_batch"), 4 // accumulate)
        steps = of_run(options, method, max_steps=1, accumulate=accumulate, **batches)
        found.append(lines(unlearn(steps, tmp_path / str(accumulate), split=split))[0])
    whole, parts = found
    assert parts["facts_in_loss"] == 3
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-4)
    assert parts["loss_grad_norm"] == pytest.approx(whole["loss_grad_norm"], rel=1e-4)


@pytest.mark.parametrize("method", ["gd", "rmu", "mu-mis"])
def test_a_run_goes_on_without_forget_facts(options, tmp_path, monkeypatch, method):
    monkeypatch.setattr(StoppedFacts, "ids", property(lambda _: range(4), lambda *_: None), raising=False)
    found = lines(unlearn(of_run(options, method, "ssiuu", max_steps=3), tmp_path / "run"))
    assert [line["facts_in_loss"] for line in found] == [0, 0, 0]
    assert all(math.isfinite(line["loss"]) for line in found)


@pytest.fixture
def data(loaded):
    return data_of(PromptFormat(loaded[1], 0), tiny_facts()[:4], tiny_facts()[4:8])


FORGET, RETAIN, STOPPED = [2, 0, 3], [1, 0], [0, 3]


class Gradients:
    """Those of a loss by a method and a regularizer, with each batch at the same moved weights."""

    def __init__(self, data, case, regularizer):
        self.data = data
        settings = SETTINGS.get(case, {})
        self.method, self.penalty = make(UnlearnOptions(method=case, regularizer=regularizer, settings=settings))
        self.model = tiny_model(dtype=torch.float64)
        self.moved = {name: value + 0.02 * torch.randn_like(value) for name, value in self.model.state_dict().items()}

    def __enter__(self):
        params = self.method.parameters(self.model)
        self.model.requires_grad_(False)
        self.params = [param.requires_grad_() for param in params]
        patch = self.penalty.patch_options(len(self.data.forget))
        self.handle = sk.patch(self.model, scope="all", **patch)
        self.method.setup(self.model, self.handle, self.data)
        self.penalty.setup(self.model, self.handle, self.method, self.data)
        self.model.load_state_dict(self.moved)
        return self

    def __exit__(self, *_):
        self.method.teardown()
        self.handle.unpatch()

    def of(self, loss, forget, stopped=()):
        """Gradients and target gradients of `loss(batch)`."""
        state = {name: value.clone() if torch.is_tensor(value) else value
                 for name, value in self.method.state_dict().items()}  # fmt: skip
        self.model.zero_grad()
        loss(batch_of(self.data, forget, RETAIN, self.method.companions(self.data), stopped)).backward()
        self.method.load_state_dict(state)
        found = []
        for name in ("grad", "target_grad"):
            grads = [getattr(param, name, None) for param in self.params]
            found.append(torch.cat([torch.zeros(p.numel()) if g is None else g.flatten()
                                    for p, g in zip(self.params, grads, strict=True)]))  # fmt: skip
        for param in self.params:
            param.target_grad = None
        return found


@pytest.fixture(params=methods())
def gradients(request, data):
    with Gradients(data, request.param, "ssiuu") as found:
        yield found


def assert_near(actual, expected):
    assert expected.norm() > 0
    assert (actual - expected).norm() <= 1e-5 * expected.norm()  # transformers' norms compute in float32


def test_the_loss_with_a_penalty_is_of_the_facts_that_are_left(gradients):
    actual, _ = gradients.of(gradients.penalty.loss, FORGET, STOPPED)
    expected, _ = gradients.of(lambda batch: gradients.method.loss(batch).value, [2])
    assert_near(actual, expected)


def test_the_penalty_stays_on_all_facts(gradients):
    _, actual = gradients.of(gradients.penalty.loss, FORGET, STOPPED)
    _, expected = gradients.of(gradients.penalty.loss, FORGET)
    assert_near(actual, expected)


def test_the_penalty_on_neurons_keeps_the_value_that_a_fact_left_with(data):
    with Gradients(data, "gd", "ssiuu-neuron") as gradients:
        gradients.of(gradients.penalty.loss, FORGET)
        banks = gradients.handle.neurons.banks
        before = {name: bank.clone() for name, bank in banks.items()}
        with torch.no_grad():
            for param in gradients.params:
                param += 0.02 * torch.randn_like(param)
        gradients.of(gradients.penalty.loss, FORGET, STOPPED)
    for name, bank in banks.items():
        changed = (bank != before[name]).any(1) & ~before[name].isnan().any(1)
        assert changed.nonzero().flatten().tolist() == [2]


@pytest.mark.parametrize("step", [1, 3])
def test_a_killed_run_resumes_bit_for_bit(options, tmp_path, monkeypatch, step):
    def alternating(stopped, found, _threshold):
        stopped.ids = [len(found.score) - 1] if stopped.ids == [0] else [0]

    monkeypatch.setattr(StoppedFacts, "observe", alternating)
    assert_resumes_bit_for_bit(of_run(options, "gd", "ssiuu", evaluate_every=1), tmp_path, monkeypatch, step)


BAD = {
    "below 0": ("stop_margin=-1.0; expected at least 0", {"stop_margin": -1.0}),
    "alone": ("stop_margin=1.0 without stop_facts has no effect", {"stop_margin": 1.0, "stop_facts": False}),
}


@pytest.mark.parametrize(("message", "changes"), BAD.values(), ids=BAD)
def test_bad_options_are_refused_before_a_model_is_loaded(options, tmp_path, message, changes):
    with pytest.raises(ValueError, match=message):
        unlearn(of_run(options, "gd", model="nowhere", **changes), tmp_path / "run")


def test_a_margin_of_facts_without_options(options, tmp_path):
    facts = [replace(fact, false_options=()) for fact in tiny_facts()]
    with pytest.raises(ValueError, match=r"stop_margin=1\.0 with forget facts that have no options"):
        unlearn(
            of_run(options, "gd", model="nowhere", stop_margin=1.0),
            tmp_path / "run",
            split=Split(facts[:4], facts[4:8], []),
        )
