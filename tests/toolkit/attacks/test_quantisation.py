"""The attack by rounding to 4 bits, against bitsandbytes on its own."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from ssiuu.attacks.quantisation import nf4
from ssiuu.models.load import load_model

bitsandbytes = pytest.importorskip("bitsandbytes")
IDS = torch.arange(10)[None]


def test_the_weights_are_those_that_the_library_rounds_to(model_dir, loaded):
    rounded, _ = load_model(model_dir, quantization_config=nf4())
    layers = {name: layer for name, layer in rounded.named_modules() if "Linear4bit" in type(layer).__name__}
    assert {name.rpartition(".")[2] for name in layers} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    own = loaded[0]
    for name, layer in layers.items():
        weight = own.get_submodule(name).weight.data
        codes, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4")
        expected = bitsandbytes.functional.dequantize_4bit(codes, state)
        assert not torch.equal(expected, weight)
        actual = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        own.get_submodule(name).weight.data = expected
    # Computed in float32: rounding the weights is all that changed.
    torch.testing.assert_close(rounded(IDS).logits, own(IDS).logits, rtol=1e-4, atol=1e-5)


def test_other_parameters_stay_as_they_are(model_dir, loaded):
    rounded, _ = load_model(model_dir, quantization_config=nf4())
    direct = AutoModelForCausalLM.from_pretrained(model_dir)
    for part in ("lm_head", "model.embed_tokens", "model.norm"):
        assert torch.equal(rounded.get_submodule(part).weight, direct.get_submodule(part).weight)
