"""The hidden activation and its backward on the compiled kernels (csrc/cpu, csrc/cuda)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.activations import CODES
from ..common.allocate import empty_grads, empty_scores, grad_views
from ..common.checks import dense_rows
from ..common.native_host import DTYPE_CODES, call
from ..common.results import absent
from .neuron_penalty import NeuronPenalty


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _rows(tensor: Tensor | None) -> tuple[int, int]:
    """Address and row stride, as the kernels take a `[T, F]`."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0))


def hidden_forward(x: Tensor, up: Tensor | None, activation: str) -> Tensor:
    x, up = dense_rows(x), None if up is None else dense_rows(up)
    rows, cols = x.shape
    h = torch.empty((rows, cols), dtype=x.dtype, device=x.device)
    call("hidden_forward", x, DTYPE_CODES[x.dtype], CODES[activation], rows, cols, *_rows(x), *_rows(up), *_rows(h))
    return h


def hidden_backward(
    x: Tensor,
    up: Tensor | None,
    grad_h: Tensor,
    segments: Tensor,
    activation: str,
    scores: bool,
    recompute_h: bool,
    packed: bool,
    longest: int,
    penalty: NeuronPenalty | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, grad_h, up = dense_rows(x), dense_rows(grad_h), None if up is None else dense_rows(up)
    rows, cols = x.shape
    grads = empty_grads(x, up, packed)
    grad_x, grad_up = grad_views(grads, packed)
    h = torch.empty((rows, cols), dtype=x.dtype, device=x.device) if recompute_h else None
    h_scores, x_scores = (empty_scores(x, segments) if scores else None for _ in range(2))
    weight, ratio, bank, bank_rows = penalty or (None, None, None, None)
    call(
        "hidden_backward", x, DTYPE_CODES[x.dtype], CODES[activation], rows, cols,
        *_rows(x), *_rows(up), *_rows(grad_h), *_rows(grad_x), *_rows(grad_up), *_rows(h),
        segments.data_ptr(), len(segments), longest, _address(h_scores), _address(x_scores),
        _address(weight), _address(ratio), _address(bank), _address(bank_rows),
        workspace=(rows, cols, len(segments), scores),
    )  # fmt: skip
    found = (h_scores, x_scores) if scores else (absent(x), absent(x))
    return *grads, absent(x) if h is None else h, *found
