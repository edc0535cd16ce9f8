"""Tiny random models of the families that are supported, and batches for them."""

import copy

import torch
import transformers

from .torch_llama import TorchLlama

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GPT2_SIZES = {
    "vocab_size": 61, "n_embd": 32, "n_inner": 56, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1,
    "eos_token_id": 2, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0,
}  # fmt: skip
GEMMA_HEADS = {"sliding_window": 32, "head_dim": 8}
FAMILIES = {
    "llama": (transformers.LlamaConfig, {**SIZES, "tie_word_embeddings": True}),
    "qwen2": (transformers.Qwen2Config, SIZES),
    "qwen3": (transformers.Qwen3Config, {**SIZES, "head_dim": 8}),
    "mistral": (transformers.MistralConfig, {**SIZES, "sliding_window": None}),
    "smollm3": (transformers.SmolLM3Config, SIZES),
    "olmo2": (transformers.Olmo2Config, SIZES),
    "gemma": (transformers.GemmaConfig, {**SIZES, "head_dim": 8}),
    "gemma2": (transformers.Gemma2Config, {**SIZES, **GEMMA_HEADS, "attn_logit_softcapping": None}),
    "gemma3": (transformers.Gemma3TextConfig, {**SIZES, **GEMMA_HEADS}),
    "phi3": (transformers.Phi3Config, {**SIZES, "resid_pdrop": 0.0}),
    "glm": (transformers.GlmConfig, {**SIZES, "head_dim": 8}),
    "gpt2": (transformers.GPT2Config, GPT2_SIZES),
    "gpt_neox": (transformers.GPTNeoXConfig, {**SIZES, "hidden_act": "gelu"}),
    "opt": (
        transformers.OPTConfig,
        {**SIZES, "ffn_dim": 56, "word_embed_proj_dim": 32, "dropout": 0.0, "attention_dropout": 0.0},
    ),
    "phi": (transformers.PhiConfig, {**SIZES, "num_key_value_heads": 4}),
    "falcon": (transformers.FalconConfig, {**SIZES, "ffn_hidden_size": 56}),
    "bloom": (
        transformers.BloomConfig,
        {"vocab_size": 61, "hidden_size": 32, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.0, "pad_token_id": 0},
    ),
    "mpt": (
        transformers.MptConfig,
        {"vocab_size": 61, "d_model": 32, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2, "max_seq_len": 64},
    ),
    "gptj": (transformers.GPTJConfig, {**GPT2_SIZES, "rotary_dim": 4}),
    "codegen": (transformers.CodeGenConfig, {**GPT2_SIZES, "rotary_dim": 4}),
    "nemotron": (transformers.NemotronConfig, SIZES),
    "arcee": (transformers.ArceeConfig, SIZES),
}
NAN_LEFT_PADDED = ("bloom", "mpt")  # in float64, patched or not: their mask overflows the softmax
EAGER_ATTENTION = ("bloom", "mpt", "gptj", "codegen")  # no other is there
# transformers says no for the sake of its softcapping, which is off above.
transformers.Gemma2ForCausalLM._supports_sdpa = transformers.Gemma2Model._supports_sdpa = True
SEPARATE = {f"self_attn.{kind}_proj": kind for kind in "qkvo"}
GATED = {"mlp.gate_proj": "gate", "mlp.up_proj": "h", "mlp.down_proj": "down"}  # up * dup = h * dh
PACKED = {"mlp.gate_up_proj": ("gate", "h"), "mlp.down_proj": "down"}
UP_DOWN = {"mlp.up_proj": "up", "mlp.act_fn": "h", "mlp.down_proj": "down"}
FC_IN = {"mlp.fc_in": "up", "mlp.act": "h", "mlp.fc_out": "down"}
FC = {"fc1": "up", "activation_fn": "h", "fc2": "down"}
DENSE = {"mlp.dense_h_to_4h": "up", "mlp.act": "h", "mlp.dense_4h_to_h": "down"}
# Module within a layer -> the kind under which its output is attributed; two where the output is of two halves.
PARTS = {
    **dict.fromkeys(FAMILIES, SEPARATE | GATED),
    "phi3": {"self_attn.qkv_proj": "qkv", "self_attn.o_proj": "o"} | PACKED,
    "glm": SEPARATE | PACKED,
    "gpt2": {
        "attn.c_attn": "qkv", "attn.c_proj": "o", "mlp.c_fc": "up", "mlp.act": "h", "mlp.c_proj": "down"
    },
    "gpt_neox": {"attention.query_key_value": "qkv", "attention.dense": "o"} | DENSE,
    "opt": {**SEPARATE, **FC, "self_attn.out_proj": "o"},
    "phi": {**SEPARATE, "self_attn.dense": "o"} | {f"mlp.{part}": kind for part, kind in FC.items()},
    "falcon": {"self_attention.query_key_value": "qkv", "self_attention.dense": "o"} | DENSE,
    "bloom": {
        "self_attention.query_key_value": "qkv", "self_attention.dense": "o",
        "mlp.dense_h_to_4h": "up", "mlp.gelu_impl": "h", "mlp.dense_4h_to_h": "down",
    },
    "mpt": {
        "attn.Wqkv": "qkv", "attn.out_proj": "o", "ffn.up_proj": "up", "ffn.act": "h", "ffn.down_proj": "down"
    },
    "gptj": {f"attn.{kind}_proj": kind for kind in "qkv"} | {"attn.out_proj": "o"} | FC_IN,
    "codegen": {"attn.qkv_proj": "qkv", "attn.out_proj": "o"} | FC_IN,
    "nemotron": SEPARATE | UP_DOWN,
    "arcee": SEPARATE | UP_DOWN,
}  # fmt: skip


# transformers' RMSNorm computes in float32 whatever the model's type is, so gradients that are equal but for rounding
# are so to float32's.
EXACT_FAMILIES = ("torch_llama", "gpt2", "gpt_neox", "opt", "phi", "falcon")


def rounding(family, dtype):
    """Relative distance of two gradients of a model of that type that rounding explains."""
    return 1e-10 if dtype == torch.float64 and family in EXACT_FAMILIES else 1e-5


def tiny_model(family="llama", dtype=torch.float32, **changes):
    """A randomly initialised causal language model of two layers, in training mode; `changes` are of its config."""
    if family == "torch_llama":
        return TorchLlama().to(dtype).train()
    config_class, options = FAMILIES[family]
    config = config_class(**{**options, **changes})
    # transformers' eager attention gives NaN for rows that are all padding in float64: its mask overflows the softmax.
    attention = "eager" if family in EAGER_ATTENTION else "sdpa"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    return model.train()


def other_weights(model):
    """A copy whose weights differ, as after some training."""
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.mul_(1 + 0.3 * torch.randn_like(parameter))
    return other


def tiny_batch(padding="right", samples=4, length=11):
    """input_ids, attention_mask and labels of `samples` sequences, each padded by another amount on that side."""
    input_ids = torch.randint(1, SIZES["vocab_size"], (samples, length))
    pads = torch.arange(samples) % 4
    position = torch.arange(length)
    attention_mask = position < length - pads[:, None] if padding == "right" else position >= pads[:, None]
    input_ids = input_ids.masked_fill(~attention_mask, 0)
    last = attention_mask.int().cumsum(1) > (length - pads - 4)[:, None]  # the last four tokens are the answer
    labels = input_ids.masked_fill(~(last & attention_mask), -100)
    return {"input_ids": input_ids, "attention_mask": attention_mask.long(), "labels": labels}


def logits_of(model, batch):
    """`[B, S, V]` of a plain forward."""
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
