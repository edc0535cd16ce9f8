"""An MLP's activation and its backward on the compiled kernels (csrc/cpu, csrc/cuda)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.activations import CODES
from ..common.checks import dense_rows
from ..common.native_host import DTYPE_CODES, call
from ..common.results import absent
from .arguments import BackwardArguments
from .outputs import empty_grads, empty_scores, grad_views


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _rows(tensor: Tensor | None) -> tuple[int, int]:
    """Address and row stride, as the kernels take a `[T, F]`."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0))


def mlp_forward(x: Tensor, up: Tensor | None, activation: str) -> Tensor:
    x, up = dense_rows(x), None if up is None else dense_rows(up)
    rows, cols = x.shape
    h = torch.empty((rows, cols), dtype=x.dtype, device=x.device)
    call("hidden_forward", x, DTYPE_CODES[x.dtype], CODES[activation], rows, cols, *_rows(x), *_rows(up), *_rows(h))
    return h


def mlp_backward(a: BackwardArguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, grad_h, up = dense_rows(a.x), dense_rows(a.grad_h), None if a.up is None else dense_rows(a.up)
    rows, cols = x.shape
    grads = empty_grads(x, up, a.packed)
    grad_x, grad_up = grad_views(grads, a.packed)
    h = torch.empty((rows, cols), dtype=x.dtype, device=x.device) if a.recompute_h else None
    h_scores, x_scores = (empty_scores(x, a.segments) if a.scores else None for _ in range(2))
    weight, ratio, bank, bank_rows = a.penalty or (None, None, None, None)
    call(
        "hidden_backward", x, DTYPE_CODES[x.dtype], CODES[a.activation], rows, cols,
        *_rows(x), *_rows(up), *_rows(grad_h), *_rows(grad_x), *_rows(grad_up), *_rows(h),
        a.segments.data_ptr(), len(a.segments), a.longest, _address(h_scores), _address(x_scores),
        _address(weight), _address(ratio), _address(bank), _address(bank_rows),
        workspace=(rows, cols, len(a.segments), a.scores),
    )  # fmt: skip
    found = (h_scores, x_scores) if a.scores else (absent(x), absent(x))
    return *grads, absent(x) if h is None else h, *found
