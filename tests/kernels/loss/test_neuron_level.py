"""The penalty on neurons (Eq. 3) under a whole model, against autograd with dP/dh held constant."""

import copy

import pytest
import torch

import ssiuu_kernels as sk

from ...support.models import logits_of, tiny_batch, tiny_model

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
    assert not any("forward" in vars(module) for module in model.modules())


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


def neuron_loss(handle, model, batch, **options):
    options = {"target": "log_prob", "sample_ids": IDS, **options}
    return handle.unlearning_loss(logits_of(model, batch), batch["labels"], FORGET, **options)


def gradients(model):
    return [None if param.grad is None else param.grad.clone() for param in model.parameters()]


def plain_gradients(model, batch):
    model.zero_grad()
    model(**batch, use_cache=False).loss.backward()
    return gradients(model)


def banks_of(handle):
    return copy.deepcopy(handle.neurons.state_dict())


def assert_same_banks(handle, expected):
    for name, bank in expected.items():
        assert torch.equal(handle.neurons.banks[name].nan_to_num(), bank.nan_to_num()), name


def test_a_backward_that_raises_leaves_the_banks_and_the_next_loss_alone():
    model, handle, batch, _ = two_steps("gpt2", 2, WEIGHT)
    expected, before = plain_gradients(model, batch), banks_of(handle)

    def fail(*_):
        raise RuntimeError("on purpose")

    hook = model.transformer.h[0].mlp.c_fc.register_full_backward_hook(fail)
    loss = neuron_loss(handle, model, batch)
    with pytest.raises(RuntimeError, match="on purpose"):
        loss.backward()
    hook.remove()
    assert_same_banks(handle, before)
    assert relative(plain_gradients(model, batch), expected) < 1e-12
    handle.unpatch()
    assert relative(plain_gradients(model, batch), expected) < 1e-12


def test_another_loss_of_the_same_forward_in_one_backward():
    """The signal that the attributions are read from is the unlearning loss's alone."""
    model, handle, batch, _ = two_steps("gpt2", 2, WEIGHT)
    before = banks_of(handle)
    expected = backward(model, handle, batch)
    after = banks_of(handle)
    model.zero_grad()
    logits_of(model, batch).square().mean().backward()
    expected = [a if b is None else a + b for a, b in zip(expected, gradients(model), strict=True)]
    handle.neurons.load_state_dict(before)
    model.zero_grad()
    logits = logits_of(model, batch)
    loss = handle.unlearning_loss(logits, batch["labels"], FORGET, target="log_prob", sample_ids=IDS)
    (loss + logits.square().mean()).backward()
    assert relative(gradients(model), expected) < 1e-10
    assert_same_banks(handle, after)


def test_another_loss_of_the_same_forward_runs_backward_first():
    model, handle, batch, _ = two_steps("gpt2", 2, WEIGHT)
    before = banks_of(handle)
    expected = backward(model, handle, batch)
    handle.neurons.load_state_dict(before)
    model.zero_grad()
    logits = logits_of(model, batch)
    loss = handle.unlearning_loss(logits, batch["labels"], FORGET, target="log_prob", sample_ids=IDS)
    logits.square().mean().backward(retain_graph=True)
    assert_same_banks(handle, before)
    model.zero_grad()
    loss.backward()
    assert relative(gradients(model), expected) < 1e-10


def test_two_forwards_before_one_backward():
    """Each of two losses penalises its own forward, whichever backward comes first."""
    model, handle, batch, _ = two_steps("gpt2", 2, WEIGHT)
    before, other = banks_of(handle), {**tiny_batch("left", length=9)}
    expected = backward(model, handle, batch)
    handle.neurons.load_state_dict(before)
    model.zero_grad()
    first, second = neuron_loss(handle, model, batch), neuron_loss(handle, model, other)
    first.backward()
    assert relative(gradients(model), expected) < 1e-10
    model.zero_grad()
    second.backward()
    assert all(grad is None or grad.isfinite().all() for grad in gradients(model))


def test_micro_batches_add_up():
    """Samples of a batch given one micro-batch at a time: each has its own bank, and the gradients accumulate."""
    model, handle, batch, _ = two_steps("gpt2", 2, WEIGHT)
    before = banks_of(handle)
    objective = lambda log_probs, _lengths, _forget: log_probs.sum()  # noqa: E731
    expected, after = backward(model, handle, batch, objective=objective), banks_of(handle)
    handle.neurons.load_state_dict(before)
    model.zero_grad()
    for part in (slice(0, 2), slice(2, 4)):
        micro = {key: value[part] for key, value in batch.items()}
        loss = handle.unlearning_loss(
            logits_of(model, micro), micro["labels"], FORGET[part],
            objective=objective, target="log_prob", sample_ids=IDS[part],
        )  # fmt: skip
        loss.backward()
    assert relative(gradients(model), expected) < 1e-10
    for name, bank in after.items():
        assert torch.allclose(handle.neurons.banks[name], bank, rtol=1e-8, equal_nan=True)


def test_a_second_backward_is_refused():
    model, handle, batch, _ = two_steps("gpt2", 1, WEIGHT)
    loss = neuron_loss(handle, model, batch)
    loss.backward(retain_graph=True)
    after, banks = gradients(model), banks_of(handle)
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()
    assert relative(gradients(model), after) == 0
    assert_same_banks(handle, banks)


def test_the_first_of_two_losses_on_one_forward_is_refused():
    model, handle, batch, _ = two_steps("gpt2", 1, WEIGHT)
    logits = logits_of(model, batch)
    first, second = (
        handle.unlearning_loss(logits, batch["labels"], FORGET, target="log_prob", sample_ids=IDS) for _ in range(2)
    )
    with pytest.raises(RuntimeError, match="newer unlearning loss"):
        first.backward()
    second.backward()


def shared_by_two_layers(model):
    first, second = model.model.layers
    second.mlp = first.mlp


def called_twice(model):
    layer = model.model.layers[0]
    layer.register_forward_hook(lambda _module, _args, x: x + layer.mlp(x))


@pytest.mark.parametrize("share", [shared_by_two_layers, called_twice])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_mlp_that_runs_twice_in_a_forward_is_refused(share, checkpointing):
    model, batch = tiny_model(), tiny_batch()
    share(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    handle = sk.patch(model, level="neuron", forget_samples=SAMPLES)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp ran twice in this forward"):
        neuron_loss(handle, model, batch)
    assert not handle.neurons.banks
    model(**batch, use_cache=False).loss.backward()


def test_reentrant_checkpointing_is_refused():
    model, batch = tiny_model(), tiny_batch()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    handle = sk.patch(model, level="neuron", forget_samples=SAMPLES)
    with pytest.raises(ValueError, match="use_reentrant"):
        neuron_loss(handle, model, batch)


def mixed(layer):
    layer.register_forward_hook(lambda _module, _args, x: x - x.mean(0))


def reordered(layer):
    layer.register_forward_pre_hook(lambda _module, args: (args[0].flip(0), *args[1:]))
    layer.register_forward_hook(lambda _module, _args, x: x.flip(0))


@pytest.mark.parametrize("change", [mixed, reordered])
def test_a_model_whose_rows_are_not_of_one_sample_each_is_refused(change):
    model, batch = tiny_model(), tiny_batch()
    batch["attention_mask"][:] = 1
    change(model.model.layers[0])
    handle = sk.patch(model, level="neuron", forget_samples=SAMPLES)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp mixes samples"):
        neuron_loss(handle, model, batch)
    assert not handle.neurons.banks


def test_hooks_on_an_activation_are_refused_at_the_loss_alone():
    model, batch = tiny_model(), tiny_batch()
    handle = sk.patch(model, level="neuron", forget_samples=SAMPLES)
    hook = model.model.layers[1].mlp.act_fn.register_forward_hook(lambda *_: None)
    logits = logits_of(model, batch)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp cannot be penalised: its act_fn carries hooks"):
        handle.unlearning_loss(logits, batch["labels"], FORGET, sample_ids=IDS)
    hook.remove()
    neuron_loss(handle, model, batch).backward()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_layers_are_penalised(backend):
    torch._dynamo.reset()
    model, handle, batch, _ = two_steps("gpt2", 2, WEIGHT)
    before = banks_of(handle)
    expected = backward(model, handle, batch)
    handle.neurons.load_state_dict(before)
    for layer in model.transformer.h:
        layer.compile(backend=backend)
    assert relative(backward(model, handle, batch), expected) < 1e-10


def test_an_exception_in_a_forward_leaves_the_handle_ready():
    model, handle, batch, _ = two_steps("gpt2", 1, WEIGHT)
    before = banks_of(handle)
    expected = backward(model, handle, batch)
    handle.neurons.load_state_dict(before)
    with pytest.raises(IndexError):
        logits_of(model, {**batch, "input_ids": batch["input_ids"] + 1000})
    assert relative(backward(model, handle, batch), expected) < 1e-12


def test_logits_of_a_copy_are_refused():
    model, batch = tiny_model(), tiny_batch()
    handle = sk.patch(model, level="neuron", forget_samples=SAMPLES)
    with pytest.raises(ValueError, match="no patched MLP is in the graph of these logits"):
        neuron_loss(handle, copy.deepcopy(model), batch)


def test_two_forwards_joined_to_one_batch_are_refused():
    model, batch = tiny_model(), tiny_batch()
    handle = sk.patch(model, level="neuron", forget_samples=SAMPLES)
    halves = [logits_of(model, {key: value[part] for key, value in batch.items()}) for part in (slice(2), slice(2, 4))]
    with pytest.raises(ValueError, match=r"mlp ran (on rows \[2, 11\]|twice)"):
        handle.unlearning_loss(torch.cat(halves), batch["labels"], FORGET, sample_ids=IDS)


def test_a_vision_tower_that_is_trained_is_refused_by_name():
    """Its rows belong to images, and of which sample they are is not known."""
    model, batch = tiny_model(), tiny_batch()
    tower = tiny_model().model.layers[0].mlp
    model.model.tower = tower
    model.model.embed_tokens.register_forward_hook(lambda _module, _args, x: x + tower(torch.ones(3, 5, 32)).mean())
    handle = sk.patch(model, level="neuron", forget_samples=SAMPLES)
    with pytest.raises(ValueError, match=r"model\.tower ran on rows \[3, 5\]; .*freeze"):
        neuron_loss(handle, model, batch)
    tower.requires_grad_(False)
    neuron_loss(handle, model, batch).backward()
