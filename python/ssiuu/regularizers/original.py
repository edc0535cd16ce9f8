"""The model before unlearning: the gradients of the answers that it gives to the forget facts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

import ssiuu_kernels as sk
from ssiuu_kernels.log_probs import answer_lengths, target_factor

from ..evaluation.mode import eval_mode
from ..methods.base import UnlearnData
from ..progress import job
from .base import trained


def target_gradients(model: PreTrainedModel, data: UnlearnData, target: str, size: int) -> Iterator[list[Tensor]]:
    """`sum_b d target_b / dphi` over every `size` forget samples in turn, one tensor per trained parameter.

    By plain backwards in eval mode. `grad` and the random number generators are left alone.

    Args:
        target: as in `ssiuu_kernels`' unlearning_loss.
        size: samples per forward and backward.
    """
    params, samples = trained(model), data.forget_samples
    with job("attribute the forget facts", len(samples)) as bar, eval_mode(model):
        for first in range(0, len(samples), size):
            part = samples[first : first + size]
            batch = {name: tensor.to(model.device) for name, tensor in data.prompts.collate(part).items()}
            labels = batch.pop("labels")
            log_probs = sk.sequence_log_probs(model(**batch, use_cache=False).logits, labels)
            factor = target_factor(log_probs, answer_lengths(labels), target)
            grads = torch.autograd.grad(log_probs, params, factor, allow_unused=True, materialize_grads=True)
            bar.advance(len(part))
            yield list(grads)
