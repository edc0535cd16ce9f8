"""The residual stream of the model before unlearning, for methods that compare states with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from ..data.prompts import Encoded, PromptFormat
from ..evaluation import states
from ..progress import job


def states_of(
    model: nn.Module, layers: Sequence[nn.Module], prompts: PromptFormat, samples: Sequence[Encoded]
) -> Iterator[tuple[Mapping[str, Tensor], list[Tensor], Tensor]]:
    """`evaluation.states.states_of`, with a bar."""
    with job("states before unlearning", len(samples)) as bar:
        yield from states.states_of(model, layers, prompts, samples, bar.advance)
