"""A Llama of torch's own modules: unlike transformers', whose RMSNorm is in float32, it computes in its own type."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

HEADS, KEY_HEADS, WIDTH, HIDDEN, VOCABULARY = 4, 2, 32, 56, 61


def rotated(x, positions):
    """Rotary position embedding of `[B, H, S, D]`, at `[B or 1, S]`."""
    half = x.shape[-1] // 2
    angles = positions[:, None, :, None].to(x) * 10000.0 ** (-torch.arange(half).to(x) / half)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        size = WIDTH // HEADS
        self.q_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k_proj = nn.Linear(WIDTH, KEY_HEADS * size, bias=False)
        self.v_proj = nn.Linear(WIDTH, KEY_HEADS * size, bias=False)
        self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x, mask, positions):
        heads = [p(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for p in (self.q_proj, self.k_proj)]
        values = self.v_proj(x).unflatten(-1, (KEY_HEADS, -1)).transpose(1, 2)
        query, keys = (rotated(head, positions) for head in heads)
        y = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.down_proj, self.act_fn = nn.Linear(HIDDEN, WIDTH, bias=False), nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = (nn.RMSNorm(WIDTH, eps=1e-6) for _ in range(2))
        self.self_attn, self.mlp = Attention(), Mlp()

    def forward(self, x, mask, positions):
        x = x + self.self_attn(self.input_layernorm(x), mask, positions)
        return x + self.mlp(self.post_attention_layernorm(x))


class TorchLlama(nn.Module):
    """Called as transformers' models are; `attention_mask` is `[B, S]`, or `[B, 1, S, S]` of packed rows."""

    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.model.layers = nn.ModuleList(Layer() for _ in range(2))
        self.model.norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight
        self.checkpointing = False
        nn.init.normal_(self.lm_head.weight, std=0.2)

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs):
        self.checkpointing = True

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=False):
        x, length = self.model.embed_tokens(input_ids), input_ids.shape[1]
        positions = torch.arange(length)[None] if position_ids is None else position_ids
        mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        if attention_mask is not None:
            # A row of padding sees itself, or its softmax would be of nothing.
            own = torch.eye(length, dtype=torch.bool)
            given = attention_mask.bool()
            mask = mask & (given if given.dim() == 4 else given[:, None, None] | own)
        for layer in self.model.layers:
            run = (lambda *a, layer=layer: checkpoint(layer, *a, use_reentrant=False)) if self.checkpointing else layer
            x = run(x, mask, positions)
        return SimpleNamespace(logits=self.lm_head(self.model.norm(x)))
