"""Decoder layers, their MLPs, the final norm and the head, found in models of all families."""

import pytest
import torch
import transformers
from torch import nn

import ssiuu_kernels as sk
from ssiuu.models.layers import LogitLens, decoder_layers, final_norm, layer_mlp, recorded_states
from tests.support.models import FAMILIES, PARTS, SIZES, tiny_batch, tiny_model


def states_and_output(model):
    """States after each layer as recorded, and the output with the model's own account of them."""
    batch = tiny_batch()
    batch.pop("labels")
    with recorded_states(decoder_layers(model)) as states:
        output = model(**batch, use_cache=False, output_hidden_states=True)
    return states, output


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_where_the_model_says_its_states_are(family):
    model = tiny_model(family)
    states, output = states_and_output(model)
    own = output.hidden_states
    assert len(states) == model.config.num_hidden_layers
    # The last of its own states is that after the final norm.
    assert all(torch.equal(state, other) for state, other in zip(states[:-1], own[1:-1], strict=True))
    assert torch.equal(final_norm(model)(states[-1]), own[-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_down_projection_of_a_layer_ends_its_mlp(family):
    down = next(name for name, kind in PARTS[family].items() if kind == "down")
    for layer in decoder_layers(tiny_model(family)):
        assert layer_mlp(layer).down is layer.get_submodule(down)


def test_form_says_what_comes_before_the_down_projection():
    forms = {family: layer_mlp(decoder_layers(tiny_model(family))[0]).form for family in ("llama", "phi3", "gpt2")}
    assert forms == {"llama": "gated", "phi3": "packed", "gpt2": "ungated"}


def test_a_patched_model_has_the_same_layers():
    model = tiny_model()
    layers = decoder_layers(model)
    with sk.patch(model, scope="all"):
        assert decoder_layers(model) == layers


def test_several_lists_of_layers_are_refused_by_name():
    sizes = {"vocab_size": 61, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, **heads))
    with pytest.raises(ValueError, match=r"has 2 lists .*model.encoder.layers, model.decoder.layers.*expected one"):
        decoder_layers(model)


def test_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match="Sequential has 0 lists of layers"):
        decoder_layers(nn.Sequential(nn.Linear(2, 2)))


def test_a_layer_whose_mlp_is_not_plain_is_refused_with_the_reason():
    layer = decoder_layers(tiny_model())[0]
    layer.mlp.down_proj.weight = nn.Parameter(torch.ones(32, 56, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="LlamaDecoderLayer needs one MLP of plain linear projections: down_proj has"):
        layer_mlp(layer)


def test_a_model_without_a_final_norm_is_refused():
    model = tiny_model("opt", do_layer_norm_before=False)
    with pytest.raises(ValueError, match="OPTForCausalLM has 0 norms after its decoder layers"):
        final_norm(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_lens_on_the_last_states_gives_the_logits(family):
    changes = {"final_logit_softcapping": None} if family == "gemma2" else {}
    model = tiny_model(family, **changes)
    states, output = states_and_output(model)
    lens = LogitLens(model)
    assert torch.equal(lens(states[-1]), output.logits)
    lens.check(states[-1], output.logits)


def test_the_lens_refuses_a_model_that_caps_its_logits():
    model = tiny_model("gemma2", final_logit_softcapping=2.0)
    final_norm(model).weight.data += 10.0
    states, output = states_and_output(model)
    with pytest.raises(ValueError, match="logits are not its output head on its final norm"):
        LogitLens(model).check(states[-1], output.logits)


def test_the_lens_refuses_a_model_without_a_head():
    with pytest.raises(ValueError, match="LlamaModel has no output head"):
        LogitLens(transformers.LlamaModel(transformers.LlamaConfig(**SIZES)))


def test_states_of_a_checkpointed_forward_have_its_graph():
    model, batch = tiny_model(), tiny_batch()
    labels = batch.pop("labels")
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        with recorded_states(decoder_layers(model)) as states:
            model(**batch, use_cache=False)
        states[1][labels > 0].square().sum().backward()
        gradients.append(decoder_layers(model)[0].mlp.up_proj.weight.grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().sum() > 0


def test_nothing_is_left_on_the_layers():
    layers = decoder_layers(tiny_model())
    with recorded_states(layers):
        assert all(layer._forward_hooks for layer in layers)
    assert not any(layer._forward_hooks for layer in layers)
