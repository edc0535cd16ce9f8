"""The two row-weighted weight gradients of a linear layer: `dL` and `sum_b dP_b` from one unit gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..common.checks import check_float
from .product import ALL, Rows, complement, weighted_pair


def wgrad_pair(
    x: Tensor,
    grad_y: Tensor,
    loss_weights: Tensor,
    target_weights: Tensor,
    *,
    target_rows: Rows = ALL,
    ratio: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`(grad_y^T diag(loss_weights) x, grad_y^T diag(target_weights) x)`, each `[out, in]`.

    Every sample's gradient is weighted twice, once by `dL/ds_b` and once by `dP_b/ds_b`; a backward that carried
    `ds_b` alone gives both. The products are the library's (cuBLAS, MKL), and plain PyTorch, so that torch.compile sees
    through them. They cost `2 T in out` operations for the first, and as much over the target rows for the second; with
    `ratio` both together cost what the first does. The narrower of x and grad_y is weighted: one copy of it a product.

    Args:
        x: `[T, in]`, the layer's input; float32, bfloat16, float16 or float64.
        grad_y: `[T, out]`, gradient of its output, typed like x. Swapping the two gives `[in, out]`, for a layer that
            keeps its weight transposed (GPT-2's Conv1D).
        loss_weights, target_weights: `[T]`, float32 (float64 for float64).
        target_rows: the rows whose target weight is not 0: a slice of a positive step, or an int64 tensor of increasing
            places, so that no row comes twice. Values are checked on the CPU, and trusted on a GPU.
        ratio: `target_weights / loss_weights` where it is the same for all target rows, whose second product is then
            the first one's part times it.

    Returns:
        (loss_grad, target_grad), typed like x.

    Raises:
        ValueError, TypeError: arguments of other shapes, types or devices; rows that are out of range, out of order or
            named twice; a ratio that is not finite.
    """
    check_float("x", x)
    if x.dim() != 2 or grad_y.dim() != 2 or len(x) != len(grad_y):
        raise ValueError(f"x has shape {list(x.shape)} and grad_y {list(grad_y.shape)}; expected [T, in] and [T, out]")
    if grad_y.dtype != x.dtype or grad_y.device != x.device:
        raise ValueError(
            f"grad_y is {grad_y.dtype} on {grad_y.device} and x {x.dtype} on {x.device}; expected the same"
        )
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, weights in (("loss_weights", loss_weights), ("target_weights", target_weights)):
        if weights.shape != x.shape[:1] or weights.dtype != dtype or weights.device != x.device:
            raise ValueError(
                f"{name} is {weights.dtype} {list(weights.shape)} on {weights.device}; "
                f"expected {dtype} [{len(x)}] on {x.device}"
            )
    _check_rows(target_rows, x)
    if ratio is not None and not math.isfinite(ratio):
        raise ValueError(f"ratio={ratio}; expected a finite number, or None where the weights have none in common")
    others = [] if ratio is None else complement(target_rows, len(x), x.device)
    return weighted_pair(x, grad_y, loss_weights, target_weights, target_rows, others, ratio)


def _check_rows(rows: Rows, x: Tensor) -> None:
    if isinstance(rows, slice):
        if rows.step is not None and rows.step < 1:
            raise ValueError(f"target_rows is {rows}; expected a slice of a positive step: turn it around")
        return
    if not isinstance(rows, Tensor):
        raise TypeError(f"target_rows is a {type(rows).__name__}; expected a slice or an int64 tensor [N]")
    if rows.dtype != torch.int64 or rows.dim() != 1 or rows.device != x.device:
        raise ValueError(
            f"target_rows is {rows.dtype} {list(rows.shape)} on {rows.device}; "
            f"expected int64 [N] on {x.device}, or a slice"
        )
    if rows.is_cuda or torch.compiler.is_compiling():  # no host read
        return
    outside = bool(((rows < 0) | (rows >= len(x))).any())
    if outside or bool((rows[1:] <= rows[:-1]).any()):
        raise ValueError(
            f"target_rows goes from {rows.min()} to {rows.max()}; "
            f"expected increasing places from 0 to {len(x) - 1}, no row twice: sort them, and drop doubles"
        )
