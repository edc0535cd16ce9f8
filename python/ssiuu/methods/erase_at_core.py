"""Erase at the Core: losses at several decoder layers, so that facts leave the states too, not only the output."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ssiuu_kernels as sk
from ssiuu_kernels import IGNORE_INDEX

from ..data.prompts import Encoded
from ..evaluation.states import at_last_prompt_token
from ..models.layers import LogitLens, decoder_layers, recorded_states
from ..options import UnlearnOptions
from .base import Batch, Loss, Method, UnlearnData
from .registry import register_method
from .states import states_of


@register_method
class EraseAtCore(Method):
    """Contrast the states of forget facts at several layers, and keep the answers of retain facts readable there.

    `NLL(logits) + forget_weight * mean over layers of C_l + retain_weight * mean over inner layers of NLL(lens(h_l))`

    - Layers are evenly spaced and end with the last one, whose lens gives the logits; the others are the inner ones.
      `h_l [D]` is the residual stream after layer l.
    - `C_l` is InfoNCE with one positive and one negative, its mean over forget facts i and positives p of i:
      `-log(e^(s(h, p) / T) / (e^(s(h, p) / T) + e^(s(h, o) / T)))`, h the state of i at its last prompt token, s the
      cosine. Before unlearning, o was that state, and p the state of a retain fact with another answer.
    - `NLL` is per retain answer token; the lens is the final norm and the output head, frozen as the embeddings are:
      the decoder layers train.

    Lee, Kim and Kim 2026, arXiv 2602.05375, is about image classifiers: it attaches auxiliary modules to inner layers,
    and weights contrastive and cross-entropy losses by layer.
    """

    name, label, color = "erase-at-core", "EC", "#44aa99"
    summary = "contrastive losses on forget facts and logit-lens losses on retain facts, at several layers"
    source = (
        "Lee et al. 2026 (EC), for image classifiers; ours: its form for language models (states of the last prompt "
        "token, one negative, positives from the model before unlearning, logit lens instead of auxiliary modules, "
        "all layers weighted alike, embeddings and head frozen) and all defaults"
    )

    @dataclass(frozen=True)
    class Options:
        """
        Attributes:
            eac_layers: number of decoder layers with losses, evenly spaced up to the last. Ours: 4.
            eac_forget_weight: weight of the contrastive loss of forget facts. Ours: 1.
            eac_retain_weight: weight of the loss of retain answers at inner layers; at the output it is 1. Ours: 0.1.
            eac_temperature: T, by which cosines are divided. Ours: 0.1.
            eac_positives: retain facts with another answer that each forget fact is pulled to, drawn once; fewer where
                there are not as many. Ours: 8.
        """

        eac_layers: int = 4
        eac_forget_weight: float = 1.0
        eac_retain_weight: float = 0.1
        eac_temperature: float = 0.1
        eac_positives: int = 8

    def check(self, run: UnlearnOptions) -> None:
        options = self.options
        for name in ("eac_layers", "eac_positives"):
            if getattr(options, name) < 1:
                raise ValueError(f"{name}={getattr(options, name)}; expected at least 1")
        for name in ("eac_forget_weight", "eac_retain_weight"):
            if not 0 <= getattr(options, name) < math.inf:
                raise ValueError(f"{name}={getattr(options, name)}; expected a finite number, at least 0")
        if not 0 < options.eac_temperature < math.inf:
            raise ValueError(f"eac_temperature={options.eac_temperature}; expected a finite number above 0")

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        layers, number = decoder_layers(model), self.options.eac_layers
        if number > len(layers):
            raise ValueError(
                f"eac_layers={number}, but the model has {len(layers)} decoder layers; expected at most that"
            )
        return [param for layer in layers for param in layer.parameters()]

    def setup(self, model: nn.Module, handle: sk.PatchHandle, data: UnlearnData) -> None:
        """
        Raises:
            ValueError: no retain fact has another answer than a forget fact; logits that the lens does not give.
        """
        super().setup(model, handle, data)
        layers, number = decoder_layers(model), self.options.eac_layers
        self.layers = [layers[math.ceil(i * len(layers) / number) - 1] for i in range(1, number + 1)]
        self.lens = LogitLens(model)
        places = self._draw_positives(data)
        drawn = sorted({place for of_fact in places for place in of_fact})
        states = self._question_states([*data.forget_samples, *(data.retain_samples[place] for place in drawn)])
        self.original, retain = states.split([len(data.forget), len(drawn)])  # [facts, layers, D]
        rows = [[drawn.index(place) for place in of_fact] for of_fact in places]
        self.positives = retain[torch.tensor(rows)]  # [facts, positives, layers, D]

    def _draw_positives(self, data: UnlearnData) -> list[list[int]]:
        """The places of each forget fact's positives in the retain set, of every fact as many."""
        others = []
        for fact in data.forget:
            others.append([place for place, other in enumerate(data.retain) if other.answer != fact.answer])
            if not others[-1]:
                raise ValueError(
                    f"method 'erase-at-core' pulls forget facts to retain facts with another answer, and all "
                    f"{len(data.retain)} retain facts have the answer {fact.answer!r}; give retain facts with others"
                )
        number = min(self.options.eac_positives, *map(len, others))
        draw = random.Random(data.seed)
        return [draw.sample(places, number) for places in others]

    def _question_states(self, samples: Sequence[Encoded]) -> Tensor:
        """States `[samples, layers, D]` at the last prompt token, on the CPU."""
        found = []
        for batch, states, logits in states_of(self.model, self.layers, self.data.prompts, samples):
            at_layers = at_last_prompt_token(torch.stack(states, 2), batch["labels"])
            self.lens.check(at_layers[:, -1], at_last_prompt_token(logits, batch["labels"]))
            found.append(at_layers.cpu())
        return torch.cat(found)

    def loss(self, batch: Batch) -> Loss:
        with recorded_states(self.layers) as states:
            logits = self.forward(batch)
        value = 0.0
        if bool(batch.retain.any()):
            value = value + self._retain_loss(states, logits, batch)
        if bool(batch.forget.any()):
            weight = self.options.eac_forget_weight * batch.forget_weight
            value = value + weight * self._contrast(states, batch)
        return Loss(value, logits)

    def _retain_loss(self, states: Sequence[Tensor], logits: Tensor, batch: Batch) -> Tensor:
        """The NLL per retain answer token, at the output and at the inner layers."""
        rows, tokens = _retain_answers(batch)
        inner = [_nll(self.lens(at_layer[rows]), tokens) for at_layer in states[:-1]]
        output = _nll(logits[rows], tokens)
        return (output + self.options.eac_retain_weight * sum(inner) / max(1, len(inner))) / batch.retain_tokens

    def _contrast(self, states: Sequence[Tensor], batch: Batch) -> Tensor:
        """The mean over forget facts, positives and layers."""
        labels, ids = batch.labels[batch.forget], batch.ids[batch.forget].cpu()
        now = torch.stack([at_last_prompt_token(at_layer[batch.forget], labels) for at_layer in states], 1)
        now = now.to(torch.promote_types(now.dtype, torch.float32))
        to_original = F.cosine_similarity(now, self.original[ids].to(now), dim=-1)  # [facts, layers]
        to_positives = F.cosine_similarity(now[:, None], self.positives[ids].to(now), dim=-1)
        return F.softplus((to_original[:, None] - to_positives) / self.options.eac_temperature).mean()


def _retain_answers(batch: Batch) -> tuple[Tensor, Tensor]:
    """Where a token of a retain answer is predicted, bool `[B, S]`, and these tokens."""
    predicted = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    rows = (predicted != IGNORE_INDEX) & batch.retain[:, None]
    return rows, predicted[rows]


def _nll(logits: Tensor, tokens: Tensor) -> Tensor:
    """The sum over tokens; logits are `[tokens, V]`."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), tokens, reduction="sum")
