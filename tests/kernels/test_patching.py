"""A patched model computes what it computed before, and unpatching leaves no trace."""

import copy

import pytest
import torch
import transformers

import ssiuu_kernels as sk

from .models import FAMILIES, SIZES, logits_of, tiny_batch, tiny_model


def loss_logits_gradients(model, batch):
    model.zero_grad()
    output = model(**batch, use_cache=False)
    output.loss.backward()
    return output.loss.detach(), output.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


def relative(actual, expected):
    return (actual - expected).norm() / expected.norm()


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("family", FAMILIES)
def test_patched_and_unpatched_agree(family, checkpointing, padding, backend):
    model, batch = tiny_model(family), tiny_batch(padding)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss, logits, gradients = loss_logits_gradients(model, batch)
    with sk.patch(model, backend=backend, strict=True) as handle:
        assert len(handle.patched) == 2
        patched_loss, patched_logits, patched_gradients = loss_logits_gradients(model, batch)
    assert relative(patched_loss, loss) < 1e-5
    assert relative(patched_logits, logits) < 1e-5
    for name, gradient in gradients.items():
        assert relative(patched_gradients[name], gradient) < 1e-5, name


@pytest.mark.parametrize("family", FAMILIES)
def test_unpatched_is_the_very_same(family):
    model, batch = tiny_model(family), tiny_batch()
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    before = loss_logits_gradients(model, batch)
    sk.patch(model, scope="all").unpatch()
    after = loss_logits_gradients(model, batch)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert all(torch.equal(before[2][name], after[2][name]) for name in before[2])
    assert attributes == {name: set(vars(module)) for name, module in model.named_modules()}


def test_state_dict_keys_stay():
    model = tiny_model()
    keys = list(model.state_dict())
    sk.patch(model)
    assert list(model.state_dict()) == keys


def test_projection_hooks_still_fire():
    model, calls = tiny_model(), []
    mlp = model.model.layers[0].mlp
    for part in ("gate_proj", "up_proj", "down_proj"):
        getattr(mlp, part).register_forward_hook(lambda *_, part=part: calls.append(part))
    sk.patch(model)
    logits_of(model, tiny_batch())
    assert calls == ["gate_proj", "up_proj", "down_proj"]


def test_other_instances_are_not_touched():
    model, other = tiny_model(), tiny_model()
    sk.patch(model)
    assert "forward" not in vars(other.model.layers[0].mlp)


def test_a_deep_copy_runs_on_its_own_weights():
    model, batch = tiny_model(), tiny_batch()
    sk.patch(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert logits_of(twin, batch).abs().max() == 0


def test_autocast_keeps_working():
    model, batch = tiny_model(), tiny_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = logits_of(model, batch)
        with sk.patch(model):
            actual = logits_of(model, batch)
    assert relative(actual.float(), expected.float()) < 1e-2


def test_patching_twice_is_refused():
    model = tiny_model()
    sk.patch(model)
    with pytest.raises(ValueError, match="already patched"):
        sk.patch(model)


def test_a_model_without_known_mlps_is_refused():
    with pytest.raises(ValueError, match="Sequential has no MLP"):
        sk.patch(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.SiLU()))


def moe_model(**options):
    sizes = {
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
    }
    return transformers.AutoModelForCausalLM.from_config(transformers.Qwen2MoeConfig(**SIZES, **sizes, **options))


def test_a_mixture_of_experts_is_left_as_it_is(caplog):
    model, batch = moe_model(mlp_only_layers=[0]).eval(), tiny_batch()
    expected = logits_of(model, batch)
    handle = sk.patch(model)
    assert handle.patched == ["model.layers.0.mlp"]
    assert list(handle.skipped) == ["model.layers.1.mlp"]
    assert "mixture of experts" in handle.skipped["model.layers.1.mlp"]
    assert [record.message for record in caplog.records] == ["patched 1 MLPs and skipped 1: see handle.skipped"]
    assert relative(logits_of(model, batch), expected) < 1e-5


def test_a_model_of_experts_alone_is_refused():
    with pytest.raises(ValueError, match=r"2 MLPs cannot be patched, first model\.layers\.0\.mlp: mixture of experts"):
        sk.patch(moe_model())


def test_unknown_scope():
    with pytest.raises(ValueError, match="attention"):
        sk.patch(tiny_model(), scope="attention")


class Doubled(torch.nn.Linear):
    """A projection whose weight means something else, as that of a quantised layer or of an adapter."""

    def forward(self, x):
        return 2 * super().forward(x)


class Subclassed(torch.nn.Parameter):
    """Stands for a quantised weight under an unchanged layer."""


def odd_projection(mlp):
    mlp.gate_proj = Doubled(SIZES["hidden_size"], SIZES["intermediate_size"])


def odd_weight(mlp):
    mlp.up_proj.weight = Subclassed(mlp.up_proj.weight.data)


def parametrised_projection(mlp):
    torch.nn.utils.parametrizations.weight_norm(mlp.down_proj)


def odd_activation(mlp):
    mlp.act_fn = torch.nn.Hardswish()


def hooked_activation(mlp):
    mlp.act_fn.register_forward_hook(lambda *_: None)


def replaced_forward(mlp):
    mlp.forward = lambda x: x


class OffsetMLP(transformers.models.llama.modeling_llama.LlamaMLP):
    """The parts of a gated MLP, put together otherwise."""

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * (self.up_proj(x) + 1))


def odd_forward(mlp):
    mlp.__class__ = OffsetMLP


SKIPPED = {
    "gate_proj is a tests.kernels.test_patching.Doubled; expected a plain": odd_projection,
    "of class tests.kernels.test_patching.Subclassed; expected a plain": odd_weight,
    "down_proj is a torch.nn.utils.parametrize.ParametrizedLinear": parametrised_projection,
    "activation Hardswish is none of": odd_activation,
    "activation carries hooks": hooked_activation,
    "already replaced": replaced_forward,
    "OffsetMLP.forward does not compute": odd_forward,
}


@pytest.mark.parametrize(("reason", "spoil"), SKIPPED.items(), ids=SKIPPED)
def test_skipped_with_its_reason(reason, spoil):
    model = tiny_model()
    spoil(model.model.layers[1].mlp)
    handle = sk.patch(model)
    assert handle.patched == ["model.layers.0.mlp"]
    assert reason in handle.skipped["model.layers.1.mlp"]


def function_activation(layer):
    del layer.activation_fn
    layer.activation_fn = torch.relu


UNGATED_SKIPPED = {
    "activation carries hooks": lambda layer: layer.activation_fn.register_forward_hook(lambda *_: None),
    "activation's forward was already replaced": lambda layer: setattr(layer.activation_fn, "forward", torch.relu),
    "activation is a function": function_activation,
    "fc1 gives 56 features and fc2 takes 28": lambda layer: setattr(layer, "fc2", torch.nn.Linear(28, 32)),
}


@pytest.mark.parametrize(("reason", "spoil"), UNGATED_SKIPPED.items(), ids=UNGATED_SKIPPED)
def test_ungated_skipped_with_its_reason(reason, spoil):
    model = tiny_model("opt")
    layer = model.model.decoder.layers[1]
    spoil(layer)
    handle = sk.patch(model)
    assert handle.patched == ["model.decoder.layers.0"]
    assert reason in handle.skipped["model.decoder.layers.1"]


def test_an_activation_that_serves_two_mlps_is_patched_once():
    model = tiny_model("phi")
    first, second = (layer.mlp for layer in model.model.layers)
    second.activation_fn = first.activation_fn
    handle = sk.patch(model)
    assert handle.patched == ["model.layers.0.mlp"]
    assert "also serves another MLP" in handle.skipped["model.layers.1.mlp"]


def test_strict_raises_and_patches_nothing():
    model = tiny_model()
    odd_activation(model.model.layers[1].mlp)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp: activation Hardswish"):
        sk.patch(model, strict=True)
    assert "forward" not in vars(model.model.layers[0].mlp)


@pytest.mark.parametrize("hidden_act", ["silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "relu", "relu2"])
def test_activations_are_recognised_by_value(hidden_act):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, hidden_act=hidden_act))
    batch = tiny_batch()
    expected = logits_of(model, batch)
    with sk.patch(model, strict=True):
        assert relative(logits_of(model, batch), expected) < 1e-5


def test_patched_training_follows_unpatched():
    """Ten steps side by side end in the same loss and weights."""
    model, batch = tiny_model(), tiny_batch()
    twin = copy.deepcopy(model)
    sk.patch(model)
    losses = []
    for candidate in (model, twin):
        optimizer = torch.optim.SGD(candidate.parameters(), lr=0.1)
        for _ in range(10):
            loss, *_ = loss_logits_gradients(candidate, batch)
            optimizer.step()
        losses.append(loss)
    assert relative(losses[0], losses[1]) < 1e-4
    for (name, weight), expected in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert relative(weight.detach(), expected.detach()) < 1e-4, name
