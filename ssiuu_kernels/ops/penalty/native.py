"""`penalty_` and `penalty_adamw_` on the compiled CPU kernels (csrc/cpu)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import native_module
from ..native_support import DTYPE_CODES


def penalty_(
    grad: Tensor, param: Tensor, target_grad: Tensor, prev_attribution: Tensor, weight: float, step: int
) -> Tensor:
    sums = torch.empty(5, dtype=torch.float64)
    native_module().penalty_cpu(
        DTYPE_CODES[param.dtype], DTYPE_CODES[grad.dtype], DTYPE_CODES[prev_attribution.dtype], param.numel(),
        param.data_ptr(), grad.data_ptr(), target_grad.data_ptr(), prev_attribution.data_ptr(),
        weight, step, sums.data_ptr(),
    )  # fmt: skip
    return sums


def penalty_adamw_(
    param: Tensor,
    grad: Tensor,
    target_grad: Tensor,
    prev_attribution: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    weight: float,
) -> Tensor:
    sums = torch.empty(5, dtype=torch.float64)
    native_module().penalty_adamw_cpu(
        DTYPE_CODES[param.dtype], DTYPE_CODES[grad.dtype], DTYPE_CODES[prev_attribution.dtype], param.numel(),
        param.data_ptr(), grad.data_ptr(), target_grad.data_ptr(), prev_attribution.data_ptr(),
        exp_avg.data_ptr(), exp_avg_sq.data_ptr(),
        step, lr, beta1, beta2, eps, weight_decay, weight, sums.data_ptr(),
    )  # fmt: skip
    return sums
