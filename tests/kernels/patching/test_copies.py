"""A copy or a pickle of a patched model is the plain model."""

import copy
import inspect
import io
import pickle
import subprocess
import sys

import pytest
import torch
import transformers

import ssiuu_kernels as sk

from ...support.models import logits_of, tiny_batch, tiny_model

OPTIONS = {"parameter": {"scope": "all"}, "neuron": {"level": "neuron", "forget_samples": 4}}
FAMILIES = ["llama", "phi3", "gpt2", "opt"]  # a form of MLP each, and a layer with an MLP of its own


def saved_and_loaded(model):
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
}


def attributes(model):
    """Of each module, without what transformers notes when a model is run."""
    return {name: set(vars(module)) for name, module in model.named_modules()}


def hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
    return [len(getattr(module, kind)) for module in model.modules() for kind in kinds]


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("level", OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_is_the_plain_model(family, level, make):
    model, batch = tiny_model(family), tiny_batch()
    plain = make(model)
    expected = logits_of(plain, batch)
    handle = sk.patch(model, **OPTIONS[level])
    twin = make(model)
    assert attributes(twin) == attributes(plain)
    assert hooks(twin) == hooks(plain)
    assert torch.equal(logits_of(twin, batch), expected)
    again = sk.patch(twin, **OPTIONS[level])
    assert again.patched == handle.patched
    again.unpatch()
    assert attributes(twin) == attributes(plain)


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_a_copy_runs_on_its_own_weights_and_leaves_the_handle_alone(make):
    model, batch = tiny_model(), tiny_batch()
    handle = sk.patch(model)
    twin = make(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert logits_of(twin, batch).abs().max() == 0
    assert handle.attribute(batch)["model.layers.0.mlp"]["h"].max.abs().max() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shallow_copy_calls_its_own_forward(family):
    model, x = tiny_model(family), torch.randn(2, 5, 32)
    sk.patch(model, scope="all")
    for name, module in model.named_modules():
        twin = copy.copy(module)
        assert "forward" not in vars(twin), name
    mlp = model.model.layers[0].mlp if family == "llama" else None
    if mlp is not None:
        twin = copy.copy(mlp)
        twin._modules = {part: copy.deepcopy(child) for part, child in mlp._modules.items()}
        twin.down_proj.weight.data.zero_()
        assert twin(x).abs().max() == 0


def test_a_replica_of_data_parallel_calls_its_own_forward():
    model, batch = tiny_model(), tiny_batch()
    sk.patch(model, scope="all")
    for module in model.modules():
        replica = module._replicate_for_data_parallel()
        assert "forward" not in vars(replica)
        assert not replica._forward_pre_hooks
    assert logits_of(model, batch).isfinite().all()


def test_a_pickle_is_loaded_without_this_package(tmp_path):
    model = tiny_model()
    sk.patch(model, scope="all")
    torch.save(model, tmp_path / "model.pt")
    code = (
        f"import sys, torch; torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False); "
        "sys.exit('ssiuu_kernels' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class CopiesByHand(torch.nn.Sequential):
    """A class with a copy of its own, which takes all attributes over."""

    def __deepcopy__(self, memo):
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        for name, value in vars(self).items():
            vars(twin)[name] = copy.deepcopy(value, memo)
        return twin


def test_a_class_that_copies_by_hand():
    class MLP(transformers.models.llama.modeling_llama.LlamaMLP, CopiesByHand):
        forward = transformers.models.llama.modeling_llama.LlamaMLP.forward

    model, batch = tiny_model(), tiny_batch()
    for layer in model.model.layers:
        layer.mlp.__class__ = MLP
    sk.patch(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for layer in twin.model.layers:
            layer.mlp.down_proj.weight.zero_()
    expected = copy.deepcopy(twin)
    for layer in expected.model.layers:
        layer.mlp.__class__ = transformers.models.llama.modeling_llama.LlamaMLP
        vars(layer.mlp).pop("forward", None)
    assert torch.equal(logits_of(twin, batch), logits_of(expected, batch))
    assert sk.patch(twin).patched == ["model.layers.0.mlp", "model.layers.1.mlp"]


def test_the_signature_is_that_of_the_class():
    model = tiny_model()
    mlp = model.model.layers[0].mlp
    expected = inspect.signature(mlp.forward)
    sk.patch(model, scope="all")
    assert inspect.signature(mlp.forward) == expected


def test_a_wrapper_put_on_top_survives_unpatching():
    """Another library may replace a forward while ours is in place, and call the one that it found."""
    model, x, calls = tiny_model(), torch.randn(2, 5, 32), []
    mlp = model.model.layers[0].mlp
    expected = mlp(x)
    handle = sk.patch(model)
    found = mlp.forward

    def wrapper(x):
        calls.append(x)
        return found(x)

    mlp.forward = wrapper
    handle.unpatch()
    assert mlp.forward is wrapper
    assert torch.equal(mlp(x), expected)
    assert len(calls) == 1
    mlp.forward = found  # as the other library does when it goes
    assert sk.patch(model).patched == ["model.layers.0.mlp", "model.layers.1.mlp"]


def test_unpatching_leaves_nothing_on_the_parameters():
    model, batch = tiny_model(), tiny_batch()
    before = [set(vars(param)) for param in model.parameters()]
    handle = sk.patch(model, scope="all")
    forget = torch.tensor([True, False, True, False])
    handle.unlearning_loss(logits_of(model, batch), batch["labels"], forget).backward()
    assert any(hasattr(param, "target_grad") for param in model.parameters())
    handle.unpatch()
    assert [set(vars(param)) for param in model.parameters()] == before
