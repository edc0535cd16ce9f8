"""Tiny random models of the families that are supported, and batches for them."""

import torch
import transformers

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
FAMILIES = {
    "llama": (transformers.LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 8}),
    "mistral": (transformers.MistralConfig, {"sliding_window": None}),
}


def tiny_model(family="llama", dtype=torch.float32):
    """A randomly initialised causal language model of two layers, in training mode."""
    config_class, extra = FAMILIES[family]
    config = config_class(**SIZES, **extra)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).train()


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
