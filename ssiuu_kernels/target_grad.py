"""`param.target_grad`, the sum of `dP_b/dphi` over the forget samples, beside `param.grad`."""

from __future__ import annotations

import torch
from torch import Tensor


def gradient_dtype(param: Tensor) -> torch.dtype:
    """The type in which a parameter's gradients add up: its own, or the one asked for by `patch(grad_dtype=...)`."""
    return getattr(param, "grad_dtype", None) or param.dtype


def add_target_grad(param: Tensor, grad: Tensor) -> None:
    """Add to `param.target_grad`, which takes `grad` over where there is none yet."""
    total = getattr(param, "target_grad", None)
    param.target_grad = grad.to(gradient_dtype(param)) if total is None else total.add_(grad)
