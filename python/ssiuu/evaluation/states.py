"""The residual stream over a set of samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from ssiuu_kernels import IGNORE_INDEX

from ..data.prompts import Encoded, PromptFormat
from ..models.layers import recorded_states
from .mode import eval_mode

BATCH_SIZE = 16  # samples per forward


@torch.no_grad()
def states_of(
    model: nn.Module,
    layers: Sequence[nn.Module],
    prompts: PromptFormat,
    samples: Sequence[Encoded],
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[Mapping[str, Tensor], list[Tensor], Tensor]]:
    """(batch, states `[B, S, D]` after each of the layers, logits `[B, S, V]`), batch by batch.

    In eval mode, without gradients and without autocast; a batch is as from `PromptFormat.collate`.

    Args:
        progress: called after every batch with its number of samples.
    """
    with eval_mode(model), recorded_states(layers) as states:
        for first in range(0, len(samples), BATCH_SIZE):
            part = samples[first : first + BATCH_SIZE]
            batch = {name: tensor.to(model.device) for name, tensor in prompts.collate(part).items()}
            output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
            yield batch, states, output.logits
            if progress is not None:
                progress(len(part))


def at_last_prompt_token(values: Tensor, labels: Tensor) -> Tensor:
    """`[B, ...]` of values `[B, S, ...]`: where the first token of the answer is predicted."""
    last = (labels != IGNORE_INDEX).int().argmax(1) - 1
    return values[torch.arange(len(values), device=values.device), last]
