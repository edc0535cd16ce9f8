"""KLUE: its score, the neurons that it trains, and the facts that leave the batches."""

import copy
import math

import pytest
import torch
import transformers

import ssiuu_kernels as sk
from ssiuu.commands import unlearn as unlearn_module
from ssiuu.commands.unlearn import unlearn
from ssiuu.data.facts import Fact
from ssiuu.data.prompts import PromptFormat
from ssiuu.methods.klue import Klue
from ssiuu.models.load import load_model
from ssiuu.options import UnlearnOptions
from ssiuu.pairs import make
from tests.support.models import PARTS, SIZES, tiny_model
from tests.support.small_runs import assert_resumes_bit_for_bit, by, lines, weights
from tests.support.unlearn_data import batch_of, data_of

FORGET = [Fact("where ann born", "rome", ("oslo",)), Fact("where bob born", "oslo lima", ("rome",))]
RETAIN = [Fact("where cid lives", "lima", ("rome",)), Fact("where dee lives", "lima", ("rome",))]
QUESTIONS = 3  # all others of either fact, so that nothing is left to the draw


def rows(chosen, grad):
    return grad * chosen.view(-1, *[1] * (grad.dim() - 1))


def rows_of_two(chosen, grad):
    return rows(chosen.repeat(2), grad)


def columns(chosen, grad):
    return grad * chosen


# What of a layer's MLP belongs to its neurons: gate and up apart and in one, and weights that are [in, out].
NEURONS = {
    "llama": {"mlp.gate_proj.weight": rows, "mlp.up_proj.weight": rows, "mlp.down_proj.weight": columns},
    "phi3": {"mlp.gate_up_proj.weight": rows_of_two, "mlp.down_proj.weight": columns},
    "gpt2": {"mlp.c_fc.weight": columns, "mlp.c_fc.bias": rows, "mlp.c_proj.weight": rows},
    "opt": {"fc1.weight": rows, "fc1.bias": rows, "fc2.weight": columns},
}


@pytest.fixture
def data(loaded):
    return data_of(PromptFormat(loaded[1], 0), FORGET, RETAIN)


def klue(**settings):
    return make(UnlearnOptions(method="klue", settings={"klue_questions": QUESTIONS, **settings}))[0]


def down_projections(model, family):
    part = next(name for name, kind in PARTS[family].items() if kind == "down")
    return [module for name, module in model.named_modules() if name.endswith(f".{part}")]


def importance(model, family, prompts, question, answer):
    """`max over tokens of h dP(a given q)/dh` of every neuron, all layers behind one another."""
    prompt, text = prompts.encode(question, answer)
    kept = []
    hooks = [down.register_forward_pre_hook(lambda _, x: kept.append(x[0])) for down in down_projections(model, family)]
    logits = model(input_ids=torch.tensor([prompt + text])).logits[0]
    rows = logits[len(prompt) - 1 : -1].softmax(-1)
    probability = torch.stack([row[token] for row, token in zip(rows, text, strict=True)]).prod()
    grads = torch.autograd.grad(probability, kept)
    for hook in hooks:
        hook.remove()
    return torch.cat([(h * grad).reshape(-1, h.shape[-1]).amax(0) for h, grad in zip(kept, grads, strict=True)])


def scores_by_formula(model, family, prompts, alpha):
    total = 0
    for fact in FORGET:
        others = [other.question for other in (*FORGET, *RETAIN) if other is not fact]
        wrong = [importance(model, family, prompts, question, fact.answer) for question in others]
        total = total + importance(model, family, prompts, fact.question, fact.answer)
        total = total - alpha * sum(wrong) / len(wrong)
    return total


@pytest.mark.parametrize("family", NEURONS)
def test_the_score_is_the_formula(data, family):
    model = tiny_model(family, torch.float64)
    alpha = 0.5 + 2 * torch.rand(()).item()
    expected = scores_by_formula(copy.deepcopy(model).eval(), family, data.prompts, alpha)
    method = klue(klue_alpha=alpha)
    with sk.patch(model, scope="all") as handle:
        method.setup(model, handle, data)
        actual = torch.cat(list(method.scores().values()))
    assert actual.shape == expected.shape
    assert (actual - expected).norm() < 1e-5 * expected.norm()


def test_the_score_is_of_a_model_in_eval_mode(data):
    model, method = tiny_model("gpt2", embd_pdrop=0.5), klue()
    with sk.patch(model, scope="all") as handle:
        method.setup(model, handle, data)
        first, second = method.scores(), method.scores()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert model.training


def test_the_score_leaves_the_global_generator_alone(data):
    model, state = tiny_model(), torch.get_rng_state()
    with sk.patch(model, scope="all") as handle:
        klue().setup(model, handle, data)
    assert torch.equal(torch.get_rng_state(), state)


def mismatched(prompts, forget, retain, monkeypatch, questions, seed=0):
    """The (question, answer) pairs that are attributed beside the facts."""
    pairs, encode, model = [], prompts.encode, tiny_model()
    with monkeypatch.context() as patched, sk.patch(model, scope="all") as handle:
        patched.setattr(prompts, "encode", lambda *pair: pairs.append(pair) or encode(*pair))
        klue(klue_questions=questions).setup(model, handle, data_of(prompts, forget, retain, seed))
    return pairs


def test_other_questions_have_another_answer(data, facts, monkeypatch):
    # One fact more with the first one's answer, and a second answer to the first one's question.
    retain = [*facts[4:], Fact("where gus born", facts[0].answer), Fact(facts[0].question, "paris")]
    pairs = mismatched(data.prompts, facts[:4], retain, monkeypatch, questions=5)
    assert [answer for _, answer in pairs] == [fact.answer for fact in facts[:4] for _ in range(5)]
    true = {(fact.question, fact.answer) for fact in facts[:4] + retain}
    assert not true & set(pairs)
    assert all(len(set(pairs[i : i + 5])) == 5 for i in range(0, 20, 5))


def test_other_questions_are_drawn_by_the_seed(data, facts, monkeypatch):
    def drawn(seed):
        return mismatched(data.prompts, facts[:2], facts[2:], monkeypatch, 2, seed)

    assert drawn(0) == drawn(0)
    assert any(drawn(seed) != drawn(0) for seed in range(1, 9))


@pytest.mark.parametrize("family", NEURONS)
def test_the_neurons_with_the_highest_scores_train(data, family):
    model, method, batch = tiny_model(family), klue(), batch_of(data, [0, 1], [0, 1])
    trained = method.parameters(model)
    for param in model.parameters():
        param.requires_grad_(any(param is other for other in trained))
    with sk.patch(model, scope="all") as handle:
        method.setup(model, handle, data)
        found = [torch.autograd.grad(method.loss(batch).value, trained)]
        method.teardown()
        found.append(torch.autograd.grad(method.loss(batch).value, trained))
        scores = torch.cat(list(method.scores().values()))
    best = torch.zeros_like(scores, dtype=torch.bool)
    ranked = sorted(range(len(scores)), key=lambda neuron: -scores[neuron])  # equal ones (relu) in the layers' order
    best[ranked[: round(0.1 * len(scores))]] = True
    names = [name for param in trained for name, other in model.named_parameters() if other is param]
    parts = {f"{layer}.{part}": (layer, mask) for layer in (0, 1) for part, mask in NEURONS[family].items()}
    assert len(names) == len(parts)
    for name, masked, whole in zip(names, *found, strict=True):
        layer, mask = next(found for part, found in parts.items() if name.endswith(f".{part}"))
        assert torch.equal(masked, mask(best.chunk(2)[layer], whole)), name
        assert whole.count_nonzero() > masked.count_nonzero(), name


def settings(options, regularizer="none", **changes):
    return by(options, "klue", regularizer, **changes)


RUNS = {
    "none": ("none", {}),
    "ssiuu": ("ssiuu", {"penalty_weight": 1e4}),
    "ssiuu, two backwards": ("ssiuu", {"penalty_weight": 1e4, "engine": "two-backward"}),
    "ssiuu, in backward": ("ssiuu", {"penalty_weight": 1e4, "update_in_backward": True}),
    "bfloat16 weights": ("none", {"dtype": "bfloat16"}),
    "autocast and checkpointing": ("ssiuu", {"bf16": True, "gradient_checkpointing": True}),
}


@pytest.mark.parametrize(("regularizer", "changes"), RUNS.values(), ids=RUNS)
def test_a_run_changes_no_bit_of_other_weights(options, tmp_path, monkeypatch, regularizer, changes):
    monkeypatch.setattr("ssiuu_kernels.optim.update_in_backward.WAITING", 100)
    chosen = {}
    choose = Klue.chosen
    monkeypatch.setattr(Klue, "chosen", lambda *args: chosen.update(choose(*args)) or chosen)
    options = settings(options, regularizer, max_steps=3, klue_questions=3, **changes)
    before = load_model(options.model, dtype=options.dtype)[0].state_dict()
    after = weights(unlearn(options, tmp_path / "run"))
    assert sum(int(neurons.sum()) for neurons in chosen.values()) == 10  # of 2 layers of 48
    for name, weight in after.items():
        moved = weight != before[name]
        mlp, _, part = name.removesuffix(".weight").rpartition(".")
        if mlp in chosen:
            mask = NEURONS["llama"][f"mlp.{part}.weight"]
            assert not (moved & ~mask(chosen[mlp], torch.ones_like(moved)).bool()).any(), name
            assert moved.any() == chosen[mlp].any(), name
        else:
            assert not moved.any(), name


def mean_log_prob(model, samples):
    """Per answer token."""
    total = 0
    for prompt, answer in samples:
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        total = total + sum(row[token] for row, token in zip(logits.log_softmax(-1), answer, strict=True))
    return total / sum(len(answer) for _, answer in samples)


@pytest.mark.parametrize("stopped", [[], [1], [0, 1]], ids=["none", "one", "all"])
def test_the_loss_is_gradient_difference_of_the_facts_that_are_left(data, stopped):
    model, method = tiny_model(dtype=torch.float64), klue()
    left = [i for i in (0, 1) if i not in stopped]
    forget = mean_log_prob(model, [data.forget_samples[i] for i in left]) if left else 0
    expected = forget - mean_log_prob(model, data.retain_samples)
    batch = batch_of(data, [0, 1], [0, 1], stopped=stopped)
    with sk.patch(model, scope="all") as handle:
        method.setup(model, handle, data)
        loss = method.loss(batch.kept).value
    assert torch.allclose(loss, expected, rtol=1e-6)


def test_forgotten_facts_leave_the_loss_without_being_asked_to(options, tmp_path):
    found = lines(unlearn(settings(options, max_steps=1, klue_questions=3), tmp_path / "run"))
    assert found[0]["facts_in_loss"] == 4


@pytest.mark.parametrize("regularizer", ["none", "ssiuu"])
@pytest.mark.parametrize("step", [1, 3])
def test_a_killed_run_resumes_bit_for_bit(options, tmp_path, monkeypatch, step, regularizer):
    options = settings(options, regularizer, evaluate_every=2, klue_questions=3)
    assert_resumes_bit_for_bit(options, tmp_path, monkeypatch, step)


def test_a_run_leaves_no_hooks(options, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(
        unlearn_module, "load_model", lambda *args, **kwargs: loaded.append(load_model(*args, **kwargs)) or loaded[0]
    )
    monkeypatch.setattr(Klue, "loss", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        unlearn(settings(options, klue_questions=3), tmp_path / "run")
    assert not any(param._backward_hooks for param in loaded[0][0].parameters())


BAD = {
    "no neurons": ("klue_fraction=0.0; expected a fraction above 0 and at most 1", {"klue_fraction": 0.0}),
    "more than all neurons": ("klue_fraction=1.5; expected", {"klue_fraction": 1.5}),
    "a negative alpha": ("klue_alpha=-1.0; expected a finite number", {"klue_alpha": -1.0}),
    "an infinite alpha": ("klue_alpha=inf; expected a finite number", {"klue_alpha": math.inf}),
    "no questions": ("klue_questions=0; expected at least 1", {"klue_questions": 0}),
    "weight decay": ("weight_decay=0.1 with method 'klue' would also move", {"weight_decay": 0.1}),
}


@pytest.mark.parametrize(("message", "changes"), BAD.values(), ids=BAD)
def test_bad_options_are_refused_before_a_model_is_loaded(options, tmp_path, message, changes):
    with pytest.raises(ValueError, match=message):
        unlearn(settings(options, model="nowhere", **changes), tmp_path / "run")


def test_more_questions_than_there_are(options, tmp_path):
    with pytest.raises(
        ValueError, match=r"klue_questions=50 is more than the [67] questions of forget and retain facts"
    ):
        unlearn(settings(options, klue_questions=50), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def vanishing(model):
    model.lm_head.weight.mul_(1e6)


def broken(model):
    model.lm_head.weight.fill_(math.nan)


@pytest.mark.parametrize(("spoil", "message"), [(vanishing, "every score is 0"), (broken, "not finite")])
def test_scores_that_rank_nothing(data, spoil, message):
    model = tiny_model("qwen2")
    with torch.no_grad():
        spoil(model)
    with sk.patch(model, scope="all") as handle, pytest.raises(ValueError, match=message):
        klue().setup(model, handle, data)


def test_a_mixture_of_experts():
    config = transformers.Qwen2MoeConfig(**SIZES, num_experts=2, moe_intermediate_size=8)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"every MLP, and model\.layers\.0\.mlp cannot be attributed"):
        klue().parameters(model)


def test_a_model_without_mlps():
    with pytest.raises(ValueError, match="'klue' needs MLPs, and Linear has none"):
        klue().parameters(torch.nn.Linear(3, 3))
