"""The outputs of `hidden_backward`. Gradients are parts of one tensor: a registered op's outputs may not overlap."""

from __future__ import annotations

import torch
from torch import Tensor


def empty_grads(x: Tensor, up: Tensor | None, packed: bool) -> Tensor:
    """Room for the gradients of x and up, each `[T, F]`: `[T, 2, F]` if packed, else `[2, T, F]` (`[1, T, F]`)."""
    rows, cols = x.shape
    parts = 1 if up is None else 2
    return x.new_empty((rows, parts, cols) if packed else (parts, rows, cols))


def grad_views(grads: Tensor, packed: bool) -> tuple[Tensor, Tensor | None]:
    """The gradients of x and of up, `[T, F]` each; None without up."""
    parts = grads.unbind(1 if packed else 0)
    return parts[0], parts[1] if len(parts) == 2 else None


def empty_scores(x: Tensor, segments: Tensor) -> Tensor:
    """Room for scores, `[3, B, F]`: float32, float64 for float64."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((3, len(segments), x.shape[1]), dtype=dtype)
