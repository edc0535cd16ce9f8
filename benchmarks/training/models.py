"""Hugging Face models of given shapes, with random weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
import transformers
from torch import nn

from ..harness.device import DEVICE


class Shape(NamedTuple):
    """The sizes of a Llama."""

    hidden: int
    layers: int
    width: int  # of the MLP
    heads: int
    key_value_heads: int
    vocabulary: int
    tied: bool  # one matrix for the embedding and the head


SMOLLM2_135M = Shape(576, 30, 1536, 9, 3, 49152, tied=True)
LLAMA_SHAPES = {
    "Llama-3.2-1B": Shape(2048, 16, 8192, 32, 8, 128256, tied=True),
    "Llama-3.2-3B": Shape(3072, 28, 8192, 24, 8, 128256, tied=True),
    "Llama-3.1-8B": Shape(4096, 32, 14336, 32, 8, 128256, tied=False),
}


def build(shape: Shape, dtype: torch.dtype, *, checkpointing: bool = False, device: torch.device = DEVICE) -> nn.Module:
    """A Llama in training mode; `checkpointing` keeps each layer's input alone and computes the rest again."""
    config = transformers.LlamaConfig(
        hidden_size=shape.hidden, num_hidden_layers=shape.layers, intermediate_size=shape.width,
        num_attention_heads=shape.heads, num_key_value_heads=shape.key_value_heads, vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
    )  # fmt: skip
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def parameters(shape: Shape) -> int:
    """Scalars of a model of this shape; a tied matrix counts once."""
    model = build(shape, torch.float32, device=torch.device("meta"))
    return sum(parameter.numel() for parameter in model.parameters())
