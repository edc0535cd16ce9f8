"""What a training step is given, and the loss that all candidates compute from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import ssiuu_kernels as sk

from ..harness.device import DEVICE

# The attribution target of every candidate: random weights make P(answer) itself underflow in float32.
TARGET = "geometric_mean_prob"


class Batch(NamedTuple):
    """Samples without padding."""

    input_ids: Tensor  # int64 [B, S]
    labels: Tensor  # int64 [B, S], -100 on the prompt
    forget: Tensor  # bool [B]

    def of(self, chosen: Tensor) -> Batch:
        """The chosen samples, bool `[B]`."""
        return Batch(*(tensor[chosen] for tensor in self))

    @property
    def lengths(self) -> Tensor:
        """Answer tokens of each sample, int64 `[B]`."""
        return (self.labels[:, 1:] != -100).sum(1)

    def log_probs(self, model: nn.Module) -> Tensor:
        """`log P(y_b | x_b)`, float32 `[B]`."""
        return sk.sequence_log_probs(model(self.input_ids, use_cache=False).logits, self.labels)

    def gradient_difference(self, log_probs: Tensor) -> Tensor:
        """Mean-token log-likelihood of the forget samples plus mean-token NLL of the retain samples."""
        forget, retain = (
            log_probs[chosen].sum() / self.lengths[chosen].sum() for chosen in (self.forget, ~self.forget)
        )
        return forget - retain

    def targets(self, log_probs: Tensor) -> Tensor:
        """`P(y_b | x_b) ** (1 / length)`, `[B]`."""
        return (log_probs / self.lengths).exp()


class Options(NamedTuple):
    """What an optimizer is told."""

    penalty_weight: float  # lambda
    adamw: dict  # lr, betas, eps, weight_decay


Step = Callable[[Batch], None]
Trainer = Callable[[nn.Module, Options], Step]  # makes the optimizer of a model


def random_batch(vocabulary: int, samples: int, length: int) -> Batch:
    """`samples` forget samples of `length` tokens and as many retain samples; the second half of each is the answer."""
    input_ids = torch.randint(3, vocabulary, (2 * samples, length), device=DEVICE)
    labels = input_ids.clone()
    labels[:, : length // 2] = -100
    return Batch(input_ids, labels, torch.arange(2 * samples, device=DEVICE) < samples)
