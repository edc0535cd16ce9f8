"""Models in eval mode while they are scored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, the model's own mode afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
