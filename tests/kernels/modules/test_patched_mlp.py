"""A patched MLP without an unlearning loss behaves as the unpatched one: hooks, modes, shapes, transforms."""

import copy

import pytest
import torch
from torch.nn.utils import parametrizations, prune

import ssiuu_kernels as sk

from ...support.models import logits_of, tiny_batch, tiny_model

# One family a form of MLP, and the place of the MLP in a layer.
FAMILIES = {"llama": "model.layers.{}.mlp", "phi3": "model.layers.{}.mlp", "gpt2": "transformer.h.{}.mlp"}


def mlp_of(model, family, layer=0):
    return model.get_submodule(FAMILIES[family].format(layer))


def twins(family, **options):
    """A patched model and its unpatched twin."""
    model = tiny_model(family)
    twin = copy.deepcopy(model)
    sk.patch(model, **{"scope": "all", **options})
    return model, twin


def close(actual, expected):
    return (actual - expected).norm() <= 1e-5 * expected.norm()


def call_log(module, calls):
    """Hooks of every kind on every module of an MLP; the calls that they saw, by name, kind and shapes."""

    def note(name, kind):
        return lambda _module, *tensors: calls.append((name, kind, [str(shapes(t)) for t in tensors]))

    for name, part in module.named_modules():
        part.register_forward_pre_hook(note(name, "pre"))
        part.register_forward_hook(note(name, "forward"))
        part.register_full_backward_pre_hook(note(name, "backward pre"))
        part.register_full_backward_hook(note(name, "backward"))


def shapes(value):
    return [shapes(v) for v in value] if isinstance(value, tuple) else getattr(value, "shape", value)


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_on_all_modules_of_an_mlp_see_the_same_calls(family):
    calls = []
    for model in twins(family):
        seen = []
        call_log(mlp_of(model, family), seen)
        logits_of(model, tiny_batch()).sum().backward()
        calls.append(seen)
    assert len(calls[0]) >= 12
    assert calls[0] == calls[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hook_that_changes_the_activation_changes_the_output(family):
    model, twin = twins(family)
    x = torch.randn(2, 5, 32)
    for mlp in (mlp_of(model, family), mlp_of(twin, family)):
        name = next(name for name in ("act_fn", "activation_fn", "act") if hasattr(mlp, name))
        getattr(mlp, name).register_forward_hook(lambda _module, _args, h: h * 2)
    assert close(mlp_of(model, family)(x), mlp_of(twin, family)(x))


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_of_all_modules_see_the_same_calls(family):
    calls, x = [], torch.randn(2, 5, 32)
    for model in twins(family):
        seen = []
        hook = torch.nn.modules.module.register_module_forward_hook(
            lambda module, _args, z, seen=seen: seen.append((type(module).__name__, z.shape))
        )
        mlp_of(model, family)(x)
        hook.remove()
        calls.append(seen)
    assert calls[0] == calls[1]


def test_an_activation_replaced_after_patching_is_the_one_that_runs():
    model, twin = twins("llama")
    x = torch.randn(2, 5, 32)
    for candidate in (model, twin):
        mlp_of(candidate, "llama").act_fn = torch.nn.Tanh()
    assert torch.equal(mlp_of(model, "llama")(x), mlp_of(twin, "llama")(x))


CHANGES = {
    "weight_norm": lambda linear: parametrizations.weight_norm(linear),
    "spectral_norm": lambda linear: parametrizations.spectral_norm(linear),
    "old weight_norm": lambda linear: torch.nn.utils.weight_norm(linear),
    "prune": lambda linear: prune.l1_unstructured(linear, "weight", 0.5),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_projections_changed_after_patching(change):
    model, twin = twins("llama")
    for candidate in (model, twin):
        torch.manual_seed(3)
        for part in ("gate_proj", "down_proj"):
            change(getattr(mlp_of(candidate, "llama").eval(), part))
    batch, gradients = tiny_batch(), []
    for candidate in (model, twin):
        logits = logits_of(candidate, batch)
        logits.square().sum().backward()
        gradients.append((logits.detach(), {name: param.grad for name, param in candidate.named_parameters()}))
    assert close(gradients[0][0], gradients[1][0])
    assert set(gradients[0][1]) == set(gradients[1][1])
    for name, expected in gradients[1][1].items():
        assert close(gradients[0][1][name], expected), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(32,), (7, 32), (2, 5, 32), (2, 3, 5, 32), (0, 32), (0, 5, 32), (2, 0, 32)], ids=str)
def test_any_shape(family, shape):
    results, x = [], torch.randn(shape)
    for model in twins(family):
        leaf = x.clone().requires_grad_()
        y = mlp_of(model, family)(leaf)
        y.square().sum().backward()
        results.append((y.detach(), leaf.grad, *(param.grad for param in mlp_of(model, family).parameters())))
    for actual, expected in zip(*results, strict=True):
        assert actual.shape == expected.shape
        assert close(actual, expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(family, mode):
    model, twin = twins(family)
    x = torch.randn(2, 5, 32)
    with mode():
        assert close(mlp_of(model, family)(x), mlp_of(twin, family)(x))


def test_an_mlp_takes_its_argument_by_name():
    model, twin = twins("phi3")
    x = torch.randn(2, 5, 32)
    assert close(mlp_of(model, "phi3")(hidden_states=x), mlp_of(twin, "phi3")(hidden_states=x))


@pytest.mark.parametrize("family", FAMILIES)
def test_functional_call_with_other_parameters(family):
    model, twin = twins(family)
    batch = tiny_batch()
    inputs = {"input_ids": batch["input_ids"], "use_cache": False}
    doubled = {name: 2 * param.detach() for name, param in model.named_parameters()}
    found, expected = (torch.func.functional_call(m, doubled, (), inputs).logits for m in (model, twin))
    assert close(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_transforms_of_torch_func(family):
    """Gradients of every sample, by vmap over grad of a patched MLP's parameters: exactly those of the class's own."""
    results, x = [], torch.randn(3, 5, 32)
    for model in twins(family):
        mlp = mlp_of(model, family)
        parameters = {name: param.detach() for name, param in mlp.named_parameters()}

        def loss(parameters, sample, mlp=mlp):
            return torch.func.functional_call(mlp, parameters, (sample,)).square().sum()

        results.append(torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x))
    for name, expected in results[1].items():
        assert torch.equal(results[0][name], expected), name


@pytest.mark.parametrize(
    ("family", "compiled"), [("gpt2", "model"), ("gpt2", "layer"), ("llama", "mlp"), ("phi3", "mlp"), ("gpt2", "mlp")]
)
def test_compiled_before_it_is_patched(family, compiled):
    torch._dynamo.reset()
    model, batch = tiny_model(family).eval(), tiny_batch()
    expected = logits_of(model, batch)
    place = {"model": "", "layer": FAMILIES[family].format(1).rpartition(".")[0], "mlp": FAMILIES[family].format(1)}
    module = model.get_submodule(place[compiled])
    module.compile(backend="eager", fullgraph=compiled != "model")
    for _ in range(2):
        with sk.patch(model, scope="all"):
            assert close(logits_of(model, batch), expected)
    assert close(logits_of(model, batch), expected)
