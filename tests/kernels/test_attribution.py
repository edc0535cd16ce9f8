"""handle.attribute against gradients that autograd retains on every tensor, one sample at a time."""

import pytest
import torch

import ssiuu_kernels as sk

from .models import FAMILIES, NAN_LEFT_PADDED, PARTS, logits_of, tiny_batch, tiny_model

TARGETS = {
    "prob": lambda s, length: s.exp(),
    "geometric_mean_prob": lambda s, length: (s / length).exp(),
    "log_prob": lambda s, length: s,
}


def captured_tensors(model, family):
    """(name, kinds) -> tensor with retained gradient, filled by the next forward; from hooks on an unpatched model."""
    tensors = {}

    def keep(key):
        def hook(_module, _args, z):
            z.retain_grad()
            tensors[key] = z
            return z.clone()  # what Falcon then adds to in place is not z

        return hook

    for name, module in model.named_modules():
        for path, kinds in PARTS[family].items():
            if name.endswith(f".{path}"):
                owner = name.rpartition(".")[0]
                module.register_forward_hook(keep((owner, kinds)))
    return tensors


def brute_force(model, family, batch, target):
    """(name, kind) -> `[B, S, width]` attributions, zero on padding, in float64."""
    tensors, found = captured_tensors(model, family), {}
    for sample in range(len(batch["labels"])):
        one = {name: tensor[sample : sample + 1] for name, tensor in batch.items()}
        log_probs = sk.sequence_log_probs(logits_of(model, one), one["labels"])
        length = (one["labels"][:, 1:] != -100).sum(1)
        TARGETS[target](log_probs, length).sum().backward()
        for (owner, kinds), z in tensors.items():
            product = (z * z.grad).detach().reshape(-1, z.shape[-1])[one["attention_mask"][0].bool()]
            halves = product.chunk(2, dim=-1) if isinstance(kinds, tuple) else [product]
            for kind, half in zip(kinds if isinstance(kinds, tuple) else [kinds], halves, strict=True):
                found.setdefault((owner, kind), []).append(half)
    return found


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_brute_force(family, padding, target):
    if padding == "left" and family in NAN_LEFT_PADDED:
        pytest.skip("the model's logits are NaN")
    model, batch = tiny_model(family, torch.float64), tiny_batch(padding)
    with sk.patch(model, scope="all") as handle:
        found = handle.attribute(batch, target)
    expected = brute_force(model, family, batch, target)
    assert {(name, kind) for name, kinds in found.items() for kind in kinds} == set(expected)
    for (name, kind), samples in expected.items():
        scores = found[name][kind]
        for sample, product in enumerate(samples):
            wanted = torch.stack([product.amax(0), product.amin(0), product.sum(0)])
            actual = torch.stack([part[sample] for part in scores])
            # transformers normalises in float32 whatever the model's type, and scaling before or after it rounds apart.
            assert (actual - wanted).norm() <= 1e-6 * wanted.norm(), (name, kind, sample)


def test_float32_on_native():
    model, batch = tiny_model(), tiny_batch()
    with sk.patch(model, scope="all", backend="native") as handle:
        found = handle.attribute(batch)
    expected = brute_force(model.double(), "llama", batch, "prob")
    for (name, kind), samples in expected.items():
        wanted = torch.stack([product.sum(0) for product in samples])
        actual = found[name][kind].sum
        assert actual.dtype == torch.float32
        assert (actual - wanted).norm() / wanted.norm() < 1e-4, (name, kind)


def test_modules_come_in_the_model_s_order():
    model = tiny_model()
    with sk.patch(model, scope="all") as handle:
        found = list(handle.attribute(tiny_batch()))
    assert found == [f"model.layers.{layer}.{part}" for layer in range(2) for part in ("self_attn", "mlp")]


def test_scope_mlp_has_the_mlps_alone():
    with sk.patch(tiny_model()) as handle:
        found = handle.attribute(tiny_batch())
    assert {name: set(kinds) for name, kinds in found.items()} == {
        f"model.layers.{layer}.mlp": {"h", "gate"} for layer in range(2)
    }


def forward_hooks(model):
    return [list(module._forward_hooks) for module in model.modules()]


def test_leaves_the_model_as_it_was():
    model = tiny_model()
    model.lm_head.weight.requires_grad_(False)
    handle = sk.patch(model, scope="all")
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    hooks = forward_hooks(model)
    handle.attribute(tiny_batch())
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    assert all(parameter.grad is None for parameter in model.parameters())
    assert forward_hooks(model) == hooks


def test_a_failure_inside_leaves_the_model_as_it_was():
    model, batch = tiny_model(), tiny_batch()
    handle = sk.patch(model, scope="all")
    batch["input_ids"] = batch["input_ids"] + 1000
    hooks = forward_hooks(model)
    with pytest.raises(IndexError):
        handle.attribute(batch)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert forward_hooks(model) == hooks


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_with_gradient_checkpointing(use_reentrant):
    model, batch = tiny_model(), tiny_batch()
    handle = sk.patch(model, scope="all")
    expected = handle.attribute(batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    found = handle.attribute(batch)
    for name, kinds in expected.items():
        for kind, scores in kinds.items():
            assert torch.allclose(found[name][kind].sum, scores.sum, rtol=1e-5, atol=1e-12)


def test_mask_with_holes():
    batch = tiny_batch()
    batch["attention_mask"][2, 3] = 0
    with pytest.raises(ValueError, match="sample 2 has holes"):
        sk.patch(tiny_model()).attribute(batch)


def test_unpatched_handle():
    handle = sk.patch(tiny_model())
    handle.unpatch()
    with pytest.raises(ValueError, match="unpatched"):
        handle.attribute(tiny_batch())


def test_unknown_target():
    with pytest.raises(ValueError, match="likelihood"):
        sk.patch(tiny_model()).attribute(tiny_batch(), target="likelihood")
