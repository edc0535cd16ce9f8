"""The residual stream of the model before unlearning, for methods that compare states with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..data.prompts import Encoded, PromptFormat
from ..evaluation.mode import eval_mode
from ..models.layers import recorded_states
from ..progress import job

BATCH_SIZE = 16  # samples per forward


@torch.no_grad()
def states_of(
    model: nn.Module, layers: Sequence[nn.Module], prompts: PromptFormat, samples: Sequence[Encoded]
) -> Iterator[tuple[Mapping[str, Tensor], list[Tensor], Tensor]]:
    """(batch, states `[B, S, D]` after each of the layers, logits `[B, S, V]`), batch by batch.

    In eval mode, without gradients and without autocast; a batch is as from `PromptFormat.collate`.
    """
    with job("states before unlearning", len(samples)) as bar, eval_mode(model), recorded_states(layers) as states:
        for first in range(0, len(samples), BATCH_SIZE):
            part = samples[first : first + BATCH_SIZE]
            batch = {name: tensor.to(model.device) for name, tensor in prompts.collate(part).items()}
            output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
            yield batch, states, output.logits
            bar.advance(len(part))
