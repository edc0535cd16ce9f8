"""Inside `handle.suspended()` a patched model is the plain model, and afterwards it is patched as before."""

import copy

import pytest
import torch

import ssiuu_kernels as sk

from ...support.models import logits_of, tiny_batch, tiny_model

OPTIONS = {"parameter": {"scope": "all"}, "neuron": {"level": "neuron", "forget_samples": 4}}
FAMILIES = ["llama", "phi3", "gpt2", "opt"]  # a form of MLP each, and a layer with an MLP of its own
FORGET = torch.tensor([True, False, True, False])


def gradients(model, loss):
    return dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True))


def forwards(model):
    return [vars(module).get("forward") for module in model.modules()]


@pytest.mark.parametrize("level", OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_inside_it_is_the_plain_model(family, level):
    model, batch = tiny_model(family), tiny_batch()
    plain = copy.deepcopy(model)
    expected = logits_of(plain, batch)
    with sk.patch(model, **OPTIONS[level]).suspended():
        actual = logits_of(model, batch)
    assert torch.equal(actual, expected)
    found, own = gradients(model, actual.square().sum()), gradients(plain, expected.square().sum())
    assert all(torch.equal(found[name], own[name]) for name in own)


@pytest.mark.parametrize("level", OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_inside_second_derivatives_are_there(family, level):
    model, batch = tiny_model(family), tiny_batch()
    model.set_attn_implementation("eager")
    plain = copy.deepcopy(model)

    def second(model):
        embeddings = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        logits = model(inputs_embeds=embeddings, attention_mask=batch["attention_mask"], use_cache=False).logits
        (first,) = torch.autograd.grad(logits[..., 3].sum(), embeddings, create_graph=True)
        return torch.autograd.grad(first.square().sum(), model.get_output_embeddings().weight)[0]

    with sk.patch(model, **OPTIONS[level]).suspended():
        actual = second(model)
    assert torch.equal(actual, second(plain))


@pytest.mark.parametrize("family", FAMILIES)
def test_afterwards_it_is_patched_as_before(family):
    model, batch = tiny_model(family), tiny_batch()
    handle = sk.patch(model, scope="all")
    before, logits = forwards(model), logits_of(model, batch)
    with handle.suspended():
        logits_of(model, batch)
    assert forwards(model) == before
    assert torch.equal(logits_of(model, batch), logits)
    assert handle.attribute(batch).keys() >= set(handle.patched)
    handle.unlearning_loss(logits_of(model, batch), batch["labels"], FORGET)
    assert handle.gradient_path.engine == "one-backward"


def test_afterwards_it_is_patched_where_something_was_raised():
    model, batch = tiny_model(), tiny_batch()
    handle = sk.patch(model)
    with pytest.raises(KeyError), handle.suspended():
        raise KeyError
    assert handle.attribute(batch)["model.layers.0.mlp"]["h"].max.abs().max() > 0


def test_another_forward_on_top_stays():
    model, batch = tiny_model(), tiny_batch()
    expected = logits_of(model, batch)
    handle = sk.patch(model, scope="all")
    mlp = model.model.layers[0].mlp
    ours = mlp.forward
    mlp.forward = lambda x: 2 * ours(x)
    with handle.suspended():
        assert not torch.equal(logits_of(model, batch), expected)
        del mlp.forward
        assert torch.equal(logits_of(model, batch), expected)


REFUSED = {
    "attribute": lambda handle, model, batch: handle.attribute(batch),
    "unlearning_loss": lambda handle, model, batch: handle.unlearning_loss(
        logits_of(model, batch), batch["labels"], FORGET
    ),
    "suspended": lambda handle, model, batch: handle.suspended().__enter__(),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
def test_a_suspended_handle_refuses(call):
    model, batch = tiny_model(), tiny_batch()
    handle = sk.patch(model)
    with handle.suspended(), pytest.raises(ValueError, match=r"suspended; leave `with handle\.suspended\(\)` first"):
        call(handle, model, batch)


def test_a_suspended_model_is_still_patched():
    model = tiny_model()
    with sk.patch(model).suspended(), pytest.raises(ValueError, match="already patched"):
        sk.patch(model)


def test_an_unpatched_handle_is_refused():
    handle = sk.patch(tiny_model())
    handle.unpatch()
    with pytest.raises(ValueError, match="was unpatched"), handle.suspended():
        pass


def test_unpatched_inside_it_stays_plain():
    model = tiny_model()
    handle = sk.patch(model, scope="all")
    with handle.suspended():
        handle.unpatch()
    assert not any(forwards(model))
    sk.patch(model, scope="all")


def test_logits_from_inside_take_two_backwards():
    model, batch = tiny_model(dtype=torch.float64), tiny_batch()
    handle = sk.patch(model, scope="all")
    with handle.suspended():
        logits = logits_of(model, batch)
    log_probs = sk.sequence_log_probs(logits, batch["labels"])
    grads = torch.autograd.grad(log_probs[FORGET].exp().sum(), list(model.parameters()), retain_graph=True)
    handle.unlearning_loss(logits, batch["labels"], FORGET).backward()
    assert handle.gradient_path.engine == "two-backward"
    for param, expected in zip(model.parameters(), grads, strict=True):
        assert torch.allclose(param.target_grad, expected, rtol=1e-5)


def test_logits_from_inside_cannot_be_penalised():
    model, batch = tiny_model(), tiny_batch()
    handle = sk.patch(model, **OPTIONS["neuron"])
    with handle.suspended():
        logits = logits_of(model, batch)
    with pytest.raises(ValueError, match="no patched MLP is in the graph"):
        handle.unlearning_loss(logits, batch["labels"], FORGET, sample_ids=torch.arange(4))
