"""The outputs of `mlp_backward`.

The gradients of x and up are two tensors, except where a fused projection takes them as one: the C library gives
memory back to the system in pieces of over 32 MB, and the next backward pays a page fault for every 4 KB of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.results import absent


def empty_grads(x: Tensor, up: Tensor | None, packed: bool) -> tuple[Tensor, Tensor]:
    """Room for the gradients of x and up, `[T, F]` each; if packed, both in the first, `[T, 2, F]`."""
    rows, cols = x.shape
    if packed:
        return x.new_empty((rows, 2, cols)), absent(x)
    return x.new_empty((rows, cols)), absent(x) if up is None else x.new_empty((rows, cols))


def grad_views(grads: tuple[Tensor, Tensor], packed: bool) -> tuple[Tensor, Tensor | None]:
    """The gradients of x and of up, `[T, F]` each; None without up."""
    grad_x, grad_up = grads
    if packed:
        return grad_x.unbind(1)
    return grad_x, None if grad_up.dim() == 1 else grad_up


def empty_scores(x: Tensor, segments: Tensor) -> Tensor:
    """Room for scores, `[3, B, F]`: float32, float64 for float64."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((3, len(segments), x.shape[1]), dtype=dtype)
