"""The penalty on neurons (Eq. 3) under a whole model, against autograd with dP/dh held constant."""

import copy

import pytest
import torch

import ssiuu_kernels as sk

from .models import logits_of, tiny_batch, tiny_model

WEIGHT = 3.0
FORGET = torch.tensor([True, False, True, True])
IDS = torch.tensor([4, -1, 0, 2])
SAMPLES = 5


def deterministic_model(family, layers):
    """float64; GPT-2 and Phi compute their norms in the model's own type, so that nothing rounds to float32."""
    model = tiny_model(family, torch.float64).eval()
    blocks = model.model.layers if family == "phi" else model.transformer.h
    del blocks[layers:]
    return model


def activations(model, family):
    mlps = [layer.mlp for layer in (model.model.layers if family == "phi" else model.transformer.h)]
    return [mlp.activation_fn if family == "phi" else mlp.act for mlp in mlps]


def hidden_and_log_probs(model, family, batch):
    """[h of each layer, [B, S, F]], and the log-likelihoods [B], all in one graph."""
    found, handles = [], []
    for module in activations(model, family):
        handles.append(module.register_forward_hook(lambda _module, _args, h: found.append(h)))
    log_probs = sk.sequence_log_probs(logits_of(model, batch), batch["labels"])
    for handle in handles:
        handle.remove()
    return found, log_probs


def attributions(hidden, log_probs):
    """[A of each layer, [B, F]], differentiable through h alone."""
    signals = torch.autograd.grad(log_probs.sum(), hidden, retain_graph=True)
    return [(h * signal).sum(1) for h, signal in zip(hidden, signals, strict=True)]


def definition(model, family, batch, previous, weight):
    """Gradients of `L + weight * sum (A_t - A_{t-1})^2` by autograd, and the penalty's value; target log_prob, GD."""
    hidden, log_probs = hidden_and_log_probs(model, family, batch)
    lengths = (batch["labels"][:, 1:] != -100).sum(1)
    loss = log_probs[FORGET].sum() / lengths[FORGET].sum() - log_probs[~FORGET].sum() / lengths[~FORGET].sum()
    penalty = 0.0
    for attribution, before in zip(attributions(hidden, log_probs), previous, strict=True):
        growth = torch.where((attribution < 0) & FORGET[:, None], attribution - before, 0)
        penalty = penalty + growth.square().sum()
    grads = torch.autograd.grad(loss + weight * penalty, list(model.parameters()), allow_unused=True)
    return grads, penalty


def backward(model, handle, batch, **options):
    model.zero_grad()
    logits = logits_of(model, batch)
    loss = handle.unlearning_loss(logits, batch["labels"], FORGET, target="log_prob", sample_ids=IDS, **options)
    loss.backward()
    return [param.grad for param in model.parameters()]


def moved(model):
    """A copy one step of training away, so that attributions have changed."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for param in twin.parameters():
            param.add_(torch.randn_like(param), alpha=0.02)
    return twin


def relative(actual, expected):
    pairs = [(a, e) for a, e in zip(actual, expected, strict=True) if e is not None]
    difference = torch.cat([(a - e).flatten() for a, e in pairs]).norm()
    return (difference / torch.cat([e.flatten() for _, e in pairs]).norm()).item()


def two_steps(family, layers, weight, **options):
    """A model that has seen the batch once with other weights: (model, handle, batch, A_{t-1} of each layer)."""
    before = deterministic_model(family, layers)
    model, batch = moved(before), tiny_batch()
    previous = [a.detach() for a in attributions(*hidden_and_log_probs(before, family, batch))]
    handle = sk.patch(model, level="neuron", penalty_weight=weight, forget_samples=SAMPLES, **options)
    for name, attribution in zip(handle.patched, previous, strict=True):
        bank = torch.full((SAMPLES, attribution.shape[1]), float("nan"), dtype=torch.float64)
        bank[IDS[FORGET]] = attribution[FORGET]
        handle.neurons.load_state_dict({**handle.neurons.banks, name: bank})
    return model, handle, batch, previous


@pytest.mark.parametrize("family", ["gpt2", "phi"])
def test_gradient_is_that_of_the_definition(family):
    model, handle, batch, previous = two_steps(family, 1, WEIGHT)
    grads = backward(model, handle, batch)
    value = handle.neurons.value
    handle.unpatch()
    expected, penalty = definition(model, family, batch, previous, WEIGHT)
    plain, _ = definition(model, family, batch, previous, 0.0)
    assert relative(grads, expected) < 1e-10
    assert relative(plain, expected) > 1e-2  # the penalty takes part
    assert value.item() == pytest.approx(penalty.item(), rel=1e-10)


def test_gradient_under_other_penalised_layers_is_the_definition_s_to_first_order():
    """Below a penalised layer, what arrives includes its penalty: the error is of second order in the weight."""
    errors = []
    for weight in (1e-3, 1e-4):
        torch.manual_seed(7)  # the two weights are compared on one model
        model, handle, batch, previous = two_steps("gpt2", 2, weight)
        grads = backward(model, handle, batch)
        handle.unpatch()
        errors.append(relative(grads, definition(model, "gpt2", batch, previous, weight)[0]))
    assert errors[1] < 1e-4
    assert errors[1] < 0.02 * errors[0]


def test_the_bank_keeps_each_sample_s_attribution():
    model = deterministic_model("gpt2", 2)
    batch = tiny_batch()
    expected = attributions(*hidden_and_log_probs(model, "gpt2", batch))
    handle = sk.patch(model, level="neuron", forget_samples=SAMPLES)
    plain = backward(model, handle, batch)
    assert handle.neurons.value == 0
    for name, attribution in zip(handle.patched, expected, strict=True):
        bank = handle.neurons.banks[name]
        assert torch.allclose(bank[IDS[FORGET]], attribution[FORGET], rtol=1e-9)
        assert bank[[1, 3]].isnan().all()
    handle.unpatch()
    previous = [torch.zeros_like(a) for a in expected]
    assert relative(plain, definition(model, "gpt2", batch, previous, 0.0)[0]) < 1e-10


def test_scaling_the_loss_scales_its_gradient_alone():
    model, handle, batch, _ = two_steps("gpt2", 1, WEIGHT)
    banks = copy.deepcopy(handle.neurons.state_dict())
    whole = backward(model, handle, batch)
    handle.neurons.load_state_dict(banks)
    handle.neurons.weight = 0.0
    plain = backward(model, handle, batch)
    handle.neurons.load_state_dict(banks)
    handle.neurons.weight = WEIGHT
    model.zero_grad()
    loss = handle.unlearning_loss(logits_of(model, batch), batch["labels"], FORGET, target="log_prob", sample_ids=IDS)
    (loss / 4).backward()
    scaled = [param.grad for param in model.parameters()]
    assert relative(scaled, [w - 0.75 * p for w, p in zip(whole, plain, strict=True)]) < 1e-9


def test_another_loss_is_not_penalised():
    model, handle, batch, _ = two_steps("gpt2", 1, WEIGHT)
    backward(model, handle, batch)
    model.zero_grad()
    model(**batch, use_cache=False).loss.backward()
    patched = [param.grad.clone() for param in model.parameters()]
    handle.unpatch()
    model.zero_grad()
    model(**batch, use_cache=False).loss.backward()
    assert relative(patched, [param.grad for param in model.parameters()]) < 1e-12


def test_attribution_is_left_alone():
    model, handle, batch, _ = two_steps("gpt2", 1, WEIGHT)
    banks = copy.deepcopy(handle.neurons.state_dict())
    found = handle.attribute(batch, "log_prob")
    handle.unpatch()
    with sk.patch(model) as plain:
        expected = plain.attribute(batch, "log_prob")
    for name, kinds in expected.items():
        for kind, scores in kinds.items():
            assert torch.allclose(found[name][kind].sum, scores.sum)
    for name, bank in banks.items():
        assert torch.equal(handle.neurons.banks[name].nan_to_num(), bank.nan_to_num())


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("family", ["llama", "phi3", "opt"])
def test_trains_in_float32(family, backend):
    """Every form of MLP, twice on one batch: the second backward is penalised, and every gradient is finite."""
    model, batch = tiny_model(family), tiny_batch()
    handle = sk.patch(model, level="neuron", penalty_weight=10.0, forget_samples=SAMPLES, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    values = []
    for _ in range(2):
        assert all(grad.isfinite().all() for grad in backward(model, handle, batch))
        optimizer.step()
        values.append(handle.neurons.value.item())
    assert values[0] == 0 < values[1]


def test_gradient_checkpointing_changes_nothing():
    model, handle, batch, _ = two_steps("gpt2", 1, WEIGHT)
    banks = copy.deepcopy(handle.neurons.state_dict())
    expected = backward(model, handle, batch)
    handle.neurons.load_state_dict(banks)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert relative(backward(model, handle, batch), expected) < 1e-12


BAD_PATCH = {
    "pass forget_samples": {"level": "neuron"},
    "level='neurons' is unknown": {"level": "neurons"},
    "forget_samples=0": {"level": "neuron", "forget_samples": 0},
    "penalty_weight=-1": {"level": "neuron", "forget_samples": 3, "penalty_weight": -1},
}


@pytest.mark.parametrize(("message", "options"), BAD_PATCH.items(), ids=BAD_PATCH)
def test_bad_options(message, options):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        sk.patch(model, **options)
    assert not any(hasattr(module, "_ssiuu") for module in model.modules())


BAD_IDS = {
    "sample_ids is missing": None,
    "expected int64": IDS.float(),
    r"sample_ids of the forget samples are \[5, 0, 2\]": torch.tensor([5, 0, 0, 2]),
    r"sample_ids of the forget samples are \[2, 2, 1\]": torch.tensor([2, 0, 2, 1]),
}


@pytest.mark.parametrize(("message", "ids"), BAD_IDS.items(), ids=BAD_IDS)
def test_bad_sample_ids(message, ids):
    model, batch = tiny_model(), tiny_batch()
    handle = sk.patch(model, level="neuron", forget_samples=SAMPLES)
    with pytest.raises(ValueError, match=message):
        handle.unlearning_loss(logits_of(model, batch), batch["labels"], FORGET, sample_ids=ids)


def test_banks_of_another_forget_set_are_refused():
    handle = sk.patch(tiny_model(), level="neuron", forget_samples=SAMPLES)
    with pytest.raises(ValueError, match="has 3 samples; expected forget_samples=5"):
        handle.neurons.load_state_dict({"model.layers.0.mlp": torch.zeros(3, 56)})
