"""The penalty on neurons (Eq. 3) as a run uses it."""

import pytest
import torch
import transformers

import ssiuu_kernels as sk
from ssiuu.commands.unlearn import unlearn
from ssiuu.methods.base import Loss, Method
from ssiuu.optimizers import OptimizerOptions
from ssiuu.options import UnlearnOptions
from tests.support.small_runs import by, lines, weights

WEIGHT = 3.0


@pytest.fixture
def one_layer(setting):
    """With one MLP, whose gradient the penalty of no other changes."""
    del setting.model.model.layers[1:]
    return setting


def definition(setting, batch, previous):
    """(gradients of `L + lambda R` with dP/dh held constant, R, A `[forget samples, F]`) by autograd."""
    hidden = []
    mlp = setting.model.model.layers[0].mlp
    hook = mlp.down_proj.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    log_probs = setting.log_probs(batch)
    hook.remove()
    (signal,) = torch.autograd.grad(log_probs[batch.forget].exp().sum(), hidden, retain_graph=True)
    attribution = (hidden[0] * signal).sum(1)[batch.forget]
    growth = torch.where(attribution < 0, attribution - previous, 0)
    value = growth.square().sum()
    loss = log_probs[batch.forget].sum() / batch.forget_tokens
    loss = loss - log_probs[batch.retain].sum() / batch.retain_tokens
    grads = torch.autograd.grad(loss + WEIGHT * value, list(setting.model.parameters()))
    return grads, value.item(), attribution.detach()


def move(model):
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param), alpha=0.05)


@pytest.mark.parametrize("micro_batches", [[[0, 1, 2]], [[2, 0], [1]]], ids=["whole", "accumulated"])
def test_a_step_is_that_of_the_definition(one_layer, made, monkeypatch, micro_batches):
    """The second step, which has attributions to compare with; the forget set's order is another in each step."""
    setting = one_layer
    regularizer, method = made("ssiuu-neuron", penalty_weight=WEIGHT)
    step = ([0, 1, 2], [0, 1, 2])
    _, _, previous = definition(setting, setting.batch(*step), 0.0)
    first = [setting.batch(ids, ids, len(micro_batches), step) for ids in ([[1, 0, 2]], [[0, 1], [2]])[
        len(micro_batches) - 1]]  # fmt: skip
    second = [setting.batch(ids, ids, len(micro_batches), step) for ids in micro_batches]
    patch = regularizer.patch_options(len(setting.data.forget))
    with sk.patch(setting.model, scope="all", **patch) as handle:
        method.setup(setting.model, handle, setting.data)
        regularizer.setup(setting.model, handle, method, setting.data)
        optimizer = regularizer.optimizer(setting.model.parameters(), OptimizerOptions(0.0))
        found = []
        for batches in (first, second):
            setting.model.zero_grad()
            for batch in batches:
                regularizer.forward_backward(lambda batch=batch: backward(regularizer.loss(batch)))
            optimizer.step()
            found.append(regularizer.metrics())
            actual = [param.grad for param in setting.model.parameters()]
            if batches is first:
                move(setting.model)
    assert found[0] == {"penalty": 0.0, "lambda": WEIGHT}
    parts = [definition(setting, batch, previous[batch.ids[batch.forget]]) for batch in second]
    assert found[1]["penalty"] == pytest.approx(sum(value for _, value, _ in parts), rel=1e-6)
    for grad, *terms in zip(actual, *(grads for grads, _, _ in parts), strict=True):
        expected = sum(terms)
        assert (grad - expected).norm() < 1e-6 * expected.norm()
    assert found[1]["penalty"] > 0


def backward(loss):
    loss.backward()
    return loss.detach()


def test_the_penalty_changes_the_run(options, tmp_path):
    gd = weights(unlearn(by(options, "gd", max_steps=3), tmp_path / "gd"))
    run = unlearn(by(options, "gd", "ssiuu-neuron", max_steps=3, penalty_weight=1e4), tmp_path / "run")
    assert any(not torch.equal(gd[name], tensor) for name, tensor in weights(run).items())
    assert [line["penalty"] > 0 for line in lines(run)] == [False, True, True]
    assert {line["lambda"] for line in lines(run)} == {1e4}


@pytest.mark.parametrize("memory", ["bf16", "gradient_checkpointing"])
def test_it_takes_what_saves_memory(options, tmp_path, memory):
    plain = unlearn(by(options, "gd", "ssiuu-neuron", max_steps=2, penalty_weight=1e4), tmp_path / "plain")
    saving = by(options, "gd", "ssiuu-neuron", max_steps=2, penalty_weight=1e4, **{memory: True})
    penalties = [lines(run)[1]["penalty"] for run in (plain, unlearn(saving, tmp_path / "saving"))]
    assert penalties[1] == pytest.approx(penalties[0], rel=0.2)


@pytest.mark.parametrize(
    "changes", [{"accumulate": 2}, {"forget_batch": 3}, {"forget_batch": 2, "accumulate": 4}], ids=str
)
def test_a_step_that_may_see_a_fact_twice_is_refused(options, tmp_path, changes):
    with pytest.raises(ValueError, match=r"forget samples .*does not divide the 4 forget facts.*--accumulate"):
        unlearn(by(options, "gd", "ssiuu-neuron", **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_method_of_another_loss_is_refused(made):
    class Other(Method):
        name = "other"

        def loss(self, batch):
            return Loss(torch.zeros(()), torch.zeros(()))

    regularizer, _ = made("ssiuu-neuron")
    with pytest.raises(ValueError, match=r"method 'other' has another; expected one of .*gd.* --regularizer ssiuu$"):
        regularizer.check(Other(Other.Options()), UnlearnOptions())


def test_a_model_without_a_known_mlp_is_refused(options, tmp_path):
    config = transformers.MambaConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1, state_size=4)
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(options.model).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="MambaForCausalLM has no MLP of a form that is known") as refused:
        unlearn(by(options, "gd", "ssiuu-neuron", model=str(tmp_path / "model")), tmp_path / "run")
    print(refused.value)
    assert not (tmp_path / "run").exists()
