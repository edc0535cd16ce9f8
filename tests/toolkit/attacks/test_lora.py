"""Relearning with low-rank adapters."""

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ssiuu.attacks.lora import add_lora
from ssiuu.data.prompts import PromptFormat
from ssiuu.training.step_log import StepRecord
from ssiuu.training.supervised import train_on

pytest.importorskip("peft")
IDS = torch.arange(10)[None]


def trained(model):
    return {name for name, param in model.named_parameters() if param.requires_grad}


def test_training_leaves_the_models_own_weights_and_changes_its_outputs(loaded, facts):
    model, tokenizer = loaded
    before, first = copy.deepcopy(model.state_dict()), model(IDS).logits
    add_lora(model, 4, 8.0, None, seed=0)
    torch.testing.assert_close(model(IDS).logits, first, rtol=0, atol=0)
    prompts = PromptFormat(tokenizer, 0)
    train_on(model, prompts, prompts.encode_facts(facts), learning_rate=1e-2, steps=2, batch_size=4, seed=0,
             record=StepRecord(lambda _: None, lambda _: {}, 2))  # fmt: skip
    after = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not torch.allclose(model(IDS).logits, first)


def test_rank_alpha_and_modules(loaded):
    model, _ = loaded
    add_lora(model, 3, 6.0, ["q_proj"], seed=0)
    assert {name.split(".")[-4] for name in trained(model)} == {"q_proj"}
    adapted = model.model.layers[0].self_attn.q_proj
    assert adapted.lora_A["default"].weight.shape == (3, 32)
    assert adapted.scaling == {"default": 2.0}


def test_all_linear_layers_but_the_head(loaded):
    model, _ = loaded
    add_lora(model, 2, 4.0, None, seed=0)
    modules = {name.split(".")[-4] for name in trained(model)}
    assert modules == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_the_seed_decides_the_first_weights(loaded):
    def first_weights(seed):
        model = copy.deepcopy(loaded[0])
        add_lora(model, 2, 4.0, ["q_proj"], seed)
        return model.model.layers[0].self_attn.q_proj.lora_A["default"].weight

    assert torch.equal(first_weights(1), first_weights(1))
    assert not torch.equal(first_weights(1), first_weights(2))


@pytest.mark.filterwarnings("error::UserWarning")
def test_gpt2s_transposed_layers():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=16)).eval()
    before, attention = model(IDS).logits, model.transformer.h[0].attn
    add_lora(model, 2, 4.0, None, seed=0)
    adapted = attention.c_attn
    A, B = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
    with torch.no_grad():
        B.normal_()
        x = torch.randn(3, 16)
        expected = x @ attention.c_attn.base_layer.weight + attention.c_attn.base_layer.bias + 2.0 * x @ A.T @ B.T
        torch.testing.assert_close(adapted(x), expected)
    assert not torch.allclose(model(IDS).logits, before)


def test_a_name_that_no_module_has(loaded):
    with pytest.raises(ValueError, match=r"lora_modules=\['q_proj', 'nope'\]: the model has no module 'nope'"):
        add_lora(loaded[0], 2, 4.0, ["q_proj", "nope"], seed=0)
