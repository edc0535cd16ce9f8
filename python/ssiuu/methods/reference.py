"""The model before unlearning as a reference: its log-probabilities of the answers that a method compares."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..data.prompts import Encoded
from ..evaluation.likelihood import log_probs_and_lengths
from ..evaluation.mode import eval_mode
from ..progress import job
from .base import Batch, UnlearnData

BATCH_SIZE = 48  # sequences per forward


class Reference:
    """Log-probabilities by the model before unlearning, of the forget samples and of their companions.

    They are computed once, in eval mode, without gradients and without autocast, and kept on the CPU: float32, or
    float64 of a float64 model.

    Args:
        model: before unlearning.
        data: of the run.
        companions: of the forget samples, in their order; None where the method has none.

    Raises:
        ValueError: a log-probability that is not finite.
    """

    def __init__(self, model: nn.Module, data: UnlearnData, companions: Sequence[Encoded] | None):
        samples = [*data.forget_samples, *(companions or ())]
        with job("reference log-probabilities", len(samples)) as bar, eval_mode(model):
            log_probs, _ = log_probs_and_lengths(model, data.prompts, samples, BATCH_SIZE, bar.advance)
        wrong = (~log_probs.isfinite()).nonzero().flatten().tolist()
        if wrong:
            answer = data.prompts.tokenizer.decode(samples[wrong[0]].answer)
            question = data.forget[wrong[0] % len(data.forget)].question
            raise ValueError(
                f"the model before unlearning gives the answer {answer!r} to {question!r} a log-probability of "
                f"{log_probs[wrong[0]]:g}; expected a finite one: check the model's weights, or use another dtype"
            )
        self._table = log_probs.view(-1, len(data.forget_samples))  # [1 or 2, forget samples]

    def log_probs(self, batch: Batch) -> Tensor:
        """Of the batch's samples, `[B]` on its device; 0 for retain samples, which no method compares."""
        retain, ids, companion = (tensor.cpu() for tensor in (batch.retain, batch.ids, batch.companion))
        found = self._table[companion.long(), torch.where(retain, 0, ids)]
        return torch.where(retain, 0, found).to(batch.ids.device)
