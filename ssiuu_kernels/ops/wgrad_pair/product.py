"""Row-weighted products of a layer's input and the gradient of its output, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Rows = slice | Tensor  # or indices int64 [N], increasing: no row twice
ALL = slice(None)


def weighted_pair(
    x: Tensor,
    grad_y: Tensor,
    loss_weights: Tensor,
    target_weights: Tensor,
    target_rows: Rows,
    other_rows: Sequence[Rows],
    ratio: float | None,
) -> tuple[Tensor, Tensor]:
    """`(loss_grad, target_grad)` of `wgrad_pair`; `other_rows`, in parts, are all rows but the target rows."""
    if ratio is None:
        return weighted_product(x, grad_y, loss_weights), weighted_product(x, grad_y, target_weights, target_rows)
    loss_grad = weighted_product(x, grad_y, loss_weights, target_rows)
    target_grad = loss_grad * ratio
    for rows in other_rows:
        loss_grad += weighted_product(x, grad_y, loss_weights, rows)
    return loss_grad, target_grad


def weighted_product(x: Tensor, grad_y: Tensor, weights: Tensor | None = None, rows: Rows = ALL) -> Tensor:
    """`grad_y^T diag(weights) x` over some rows, `[out, in]`; weights None: ones."""
    x, grad_y = take(x, rows), take(grad_y, rows)
    if weights is not None:
        column = take(weights, rows)[:, None]
        if x.shape[1] <= grad_y.shape[1]:
            x = scaled(x, column)
        else:
            grad_y = scaled(grad_y, column)
    return grad_y.t() @ x


def take(tensor: Tensor, rows: Rows) -> Tensor:
    """Some rows of a tensor: a view where they are a slice."""
    return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows)


def scaled(tensor: Tensor, column: Tensor) -> Tensor:
    """`tensor * column` in the tensor's type, multiplied in the column's.

    A weight that was rounded to bfloat16 would be wrong for a whole sample.
    """
    return torch.mul(tensor, column).to(tensor.dtype)


def complement(rows: Rows, count: int, device: torch.device) -> list[Rows]:
    """The other rows of `count`, as slices where `rows` is one (of a positive step). Nothing is read on the host."""
    if isinstance(rows, slice):
        start, end, step = rows.indices(count)
        end = max(start, end)
        between = (slice(start + offset, end, step) for offset in range(1, min(step, end - start)))
        return [part for part in (slice(0, start), *between, slice(end, count)) if part.start < part.stop]
    taken = torch.zeros(count, dtype=torch.uint8, device=device).index_fill_(0, rows, 1)
    return [taken.argsort(stable=True)[: count - len(rows)]]  # rows that are not taken come first
