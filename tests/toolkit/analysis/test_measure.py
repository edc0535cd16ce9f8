"""Influence variation against a brute-force computation with autograd in float64, sample by sample."""

import pytest
import torch

import ssiuu_kernels as sk
from ssiuu.analysis.influence import KINDS, variation_by_kind
from ssiuu.analysis.measure import measure_influence
from ssiuu_kernels import sequence_log_probs
from tests.support.models import logits_of, other_weights, tiny_batch, tiny_model

PARTS = {
    "self_attn": {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"},
    "mlp": {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
}


def brute_force(model, batch):
    """kind -> `[B, S, width]` attributions of each layer, NaN on padding, from a hook on every module's output."""
    outputs, handles = {}, []
    for layer, block in enumerate(model.model.layers):
        for owner, kinds in PARTS.items():
            for kind, part in kinds.items():

                def keep(_module, _args, z, key=(kind, layer)):
                    z.retain_grad()
                    outputs[key] = z

                handles.append(getattr(getattr(block, owner), part).register_forward_hook(keep))
    found = {}
    for sample in range(len(batch["labels"])):
        one = {name: tensor[sample : sample + 1] for name, tensor in batch.items()}
        sequence_log_probs(logits_of(model, one), one["labels"]).exp().sum().backward()
        padding = one["attention_mask"][0] == 0
        for key, z in outputs.items():
            found.setdefault(key, []).append((z * z.grad)[0].detach().masked_fill(padding[:, None], torch.nan))
    for handle in handles:
        handle.remove()
    return {kind: [torch.stack(found[kind, layer]) for layer in range(2)] for kind, layer in found if layer == 0}


def equations_4_and_5(before, after):
    """D+ and D- of `[B, S, width]` attributions, in plain loops over samples and tokens."""
    d_plus = d_minus = torch.zeros(before.shape[-1], dtype=before.dtype)
    for a, b in zip(before, after, strict=True):
        tokens = ~a[:, 0].isnan()
        a, b = a[tokens], b[tokens]
        d_plus = d_plus + (a.amax(0) - b.clamp(min=0).amax(0)) / len(before)
        d_minus = d_minus + (a.amin(0) - b.amin(0)) / len(before)
    return d_plus.clamp(min=0), d_minus.clamp(min=0)


def split(batch, size):
    return [{name: tensor[i : i + size] for name, tensor in batch.items()} for i in range(0, 4, size)]


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_equals_brute_force(size, padding):
    before = tiny_model("llama", torch.float64).eval()
    after, batch = other_weights(before), tiny_batch(padding)
    expected = [brute_force(model, batch) for model in (before, after)]
    measured = [measure_influence(model, split(batch, size)) for model in (before, after)]
    variations = variation_by_kind(*measured)
    assert list(variations) == [kind for kind in KINDS if kind != "qkv"]
    for kind, variation in variations.items():
        for layer in range(2):
            wanted = equations_4_and_5(expected[0][kind][layer], expected[1][kind][layer])
            scale = max(x.max() for x in wanted)
            for actual, x in zip(variation, wanted, strict=True):
                assert torch.allclose(actual[layer].double(), x, rtol=1e-6, atol=1e-6 * scale), (kind, layer)


def test_ungated_mlps_and_fused_attention():
    model, batch = tiny_model("gpt2").eval(), tiny_batch()
    with sk.patch(model, scope="all") as handle:
        scores = handle.attribute(batch)
    found = measure_influence(model, [batch])
    assert list(found) == ["qkv", "o", "up", "down"]
    ups = [scores[f"transformer.h.{layer}.mlp"]["up"].max.double().mean(-2) for layer in range(2)]
    assert torch.allclose(found["up"].max, torch.stack(ups), rtol=1e-6, atol=0)


def test_the_same_model_has_no_negative_influence_added():
    model, batch = tiny_model(), tiny_batch()
    found = measure_influence(model, [batch])
    assert all(variation.d_minus.count_nonzero() == 0 for variation in variation_by_kind(found, found).values())


def test_no_batches():
    with pytest.raises(ValueError, match="batches is empty"):
        measure_influence(tiny_model(), [])


def test_weights_that_are_not_finite():
    model = tiny_model()
    model.model.layers[0].mlp.up_proj.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        measure_influence(model, [tiny_batch()])
