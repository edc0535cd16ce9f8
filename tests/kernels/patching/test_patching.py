"""A patched model computes what it computed before, and unpatching leaves no trace."""

import copy

import pytest
import torch
import transformers

import ssiuu_kernels as sk

from ...support.models import FAMILIES, SIZES, logits_of, tiny_batch, tiny_model


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


def test_a_model_of_experts_alone_takes_an_unlearning_loss():
    model, batch = moe_model().eval(), tiny_batch()
    handle = sk.patch(model, scope="all")
    assert handle.patched == []
    assert_target_gradients(model, batch, handle)
    handle.unpatch()
    with pytest.raises(ValueError, match="unpatched"):
        assert_target_gradients(model, batch, handle)


@pytest.mark.parametrize(
    ("options", "message"),
    [({}, "scope 'all' needs none"), ({"scope": "all", "level": "neuron", "forget_samples": 3}, "level 'neuron'")],
)
def test_a_model_of_experts_alone_is_refused_where_mlps_are_needed(options, message):
    with pytest.raises(ValueError, match=message):
        sk.patch(moe_model(), **options)


T5_SIZES = {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 56, "num_layers": 2, "num_heads": 4}
BART_SIZES = {
    "vocab_size": 61, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 56,
    "decoder_ffn_dim": 56, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
ENCODER_DECODERS = {
    "t5": (transformers.T5ForConditionalGeneration, transformers.T5Config, T5_SIZES),
    "bart": (transformers.BartForConditionalGeneration, transformers.BartConfig, BART_SIZES),
    "blenderbot": (transformers.BlenderbotForConditionalGeneration, transformers.BlenderbotConfig, BART_SIZES),
}


@pytest.mark.parametrize("inside", [False, True], ids=["itself", "inside another module"])
@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_encoder_decoders_are_refused(family, inside):
    model_class, config_class, sizes = ENCODER_DECODERS[family]
    model = model_class(config_class(**sizes))
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match="is an encoder-decoder"):
        sk.patch(torch.nn.ModuleDict({"inner": model}) if inside else model)
    assert attributes == {name: set(vars(module)) for name, module in model.named_modules()}


def test_a_decoder_used_alone_is_patched():
    model = transformers.BartForCausalLM(transformers.BartConfig(**BART_SIZES))
    assert sk.patch(model).patched == ["model.decoder.layers.0"]


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


class LoraLinear(torch.nn.Module):
    """The structure of peft's: the layer that it adapts, and two small ones."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(base_layer.in_features, 2, bias=False)})
        self.lora_B = torch.nn.ModuleDict({"default": torch.nn.Linear(2, base_layer.out_features, bias=False)})

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


LoraLinear.__module__, LoraLinear.__qualname__ = "peft.tuners.lora.layer", "Linear"


def adapted_projection(mlp):
    mlp.gate_proj = LoraLinear(mlp.gate_proj)


def odd_activation(mlp):
    mlp.act_fn = torch.nn.Hardswish()


def clipped_activation(mlp):
    mlp.act_fn = torch.nn.ReLU6()


def trained_activation(mlp):
    mlp.act_fn = torch.nn.PReLU(init=0.0)


def replaced_activation(mlp):
    mlp.act_fn.forward = torch.nn.functional.silu


class DroppingMLP(transformers.models.llama.modeling_llama.LlamaMLP):
    def forward(self, x):
        h = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(torch.nn.functional.dropout(h, 0.5, self.training))


def dropout_inside(mlp):
    mlp.__class__ = DroppingMLP
    mlp.eval()


class ClippingMLP(transformers.models.llama.modeling_llama.LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=7.0)) * self.up_proj(x))


def clipped_gate(mlp):
    mlp.__class__ = ClippingMLP


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
    "gate_proj is a tests.kernels.patching.test_patching.Doubled; expected a plain": odd_projection,
    "of class tests.kernels.patching.test_patching.Subclassed; expected a plain": odd_weight,
    "down_proj is a torch.nn.utils.parametrize.ParametrizedLinear": parametrised_projection,
    "gate_proj is a peft.tuners.lora.layer.Linear; expected a plain linear layer": adapted_projection,
    "activation Hardswish is none of": odd_activation,
    "activation ReLU6 is none of": clipped_activation,
    "activation PReLU has parameters of its own": trained_activation,
    "or its activation's, was already replaced": replaced_activation,
    "DroppingMLP.forward does not compute": dropout_inside,
    "ClippingMLP.forward does not compute": clipped_gate,
    "activation carries hooks": hooked_activation,
    "its forward, or its activation's, was already": replaced_forward,
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


def test_mlps_that_share_an_activation_module_are_skipped():
    """Patched, either would be attributed the tokens of both."""
    model = tiny_model("phi", num_hidden_layers=3)
    first, second, _ = (layer.mlp for layer in model.model.layers)
    second.activation_fn = first.activation_fn
    handle = sk.patch(model)
    assert handle.patched == ["model.layers.2.mlp"]
    assert list(handle.skipped) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert all("also serves another MLP" in reason for reason in handle.skipped.values())


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


def assert_target_gradients(model, batch, handle):
    """Of every trainable parameter, against autograd's."""
    forget = torch.tensor([True, False, True, False])
    params = [param for param in model.parameters() if param.requires_grad]
    handle.unlearning_loss(logits_of(model, batch), batch["labels"], forget).backward()
    log_probs = sk.sequence_log_probs(logits_of(model, batch), batch["labels"])
    for param, wanted in zip(params, torch.autograd.grad(log_probs[forget].exp().sum(), params), strict=True):
        assert relative(param.target_grad, wanted) < 1e-4


def with_adapters(model):
    """peft's usual target_modules="all-linear": adapters on every linear layer of the decoder, all else frozen."""
    model.requires_grad_(False)
    for module in list(model.model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is torch.nn.Linear:
                setattr(module, name, LoraLinear(child))


def with_replaced_forwards(model):
    """What accelerate's dispatch_model, of a device_map, does to every module."""
    hooks = pytest.importorskip("accelerate.hooks")
    for module in list(model.modules()):
        hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device="cpu"))


@pytest.mark.parametrize("change", [with_adapters, with_replaced_forwards])
def test_nothing_to_patch_is_no_reason_to_refuse_a_loss(change):
    model, batch = tiny_model(), tiny_batch()
    change(model)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    handle = sk.patch(model, scope="all")
    assert handle.patched == []
    assert len(handle.skipped) == 2
    assert_target_gradients(model, batch, handle)
    handle.unpatch()
    assert before == {name: set(vars(module)) for name, module in model.named_modules()}


def test_dispatched_after_it_was_patched():
    """accelerate then calls the patched forward, and goes on with the class's once that is unpatched."""
    hooks = pytest.importorskip("accelerate.hooks")
    model, batch = tiny_model(), tiny_batch()
    expected = logits_of(model, batch)
    handle = sk.patch(model, scope="all")
    with_replaced_forwards(model)
    assert relative(logits_of(model, batch), expected) < 1e-5
    handle.unpatch()
    assert torch.equal(logits_of(model, batch), expected)
    hooks.remove_hook_from_submodules(model)
    assert torch.equal(logits_of(model, batch), expected)
    assert sk.patch(model, scope="all").patched == [f"model.layers.{layer}.mlp" for layer in range(2)]


def test_path_is_the_old_name_of_gradient_path():
    model, batch = tiny_model(), tiny_batch()
    handle = sk.patch(model, scope="all")
    assert handle.path is handle.gradient_path is None
    handle.unlearning_loss(logits_of(model, batch), batch["labels"], torch.tensor([True, False, True, False]))
    assert handle.path is handle.gradient_path
    assert handle.path.engine == "one-backward"
