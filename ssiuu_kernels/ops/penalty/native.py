"""`penalty_` and `penalty_adamw_` on the compiled kernels (csrc/cpu, csrc/cuda): one launch for many parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.native_host import DTYPE_CODES, call
from .scalars import StepScalars


def penalty_(
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    target_grads: Sequence[Tensor],
    prev_attributions: Sequence[Tensor],
    scalars: StepScalars,
) -> Tensor:
    return _run("penalty", params, grads, target_grads, prev_attributions, None, None, scalars, None)


def penalty_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    target_grads: Sequence[Tensor],
    prev_attributions: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    scalars: StepScalars,
    seeds: Sequence[int] | None,
) -> Tensor:
    tensors = (params, grads, target_grads, prev_attributions, exp_avgs, exp_avg_sqs)
    return _run("penalty_adamw", *tensors, scalars, seeds)


def _run(op, params, grads, target_grads, prev_attributions, exp_avgs, exp_avg_sqs, scalars, seeds) -> Tensor:
    sizes = [param.numel() for param in params]
    sums = torch.empty(5, dtype=torch.float64, device=params[0].device)
    lists = (params, grads, target_grads, prev_attributions, exp_avgs, exp_avg_sqs)
    call(
        op, params[0], *(DTYPE_CODES[tensors[0].dtype] for tensors in (params, grads, prev_attributions)),
        sizes, *(_addresses(tensors, len(sizes)) for tensors in lists), [seed & 0xFFFFFFFF for seed in seeds or ()],
        scalars.host, 0 if scalars.device is None else scalars.device.data_ptr(), scalars.keep_anchor,
        sums.data_ptr(),
        workspace=(sizes,),
    )  # fmt: skip
    return sums


def _addresses(tensors: Sequence[Tensor] | None, count: int) -> list[int]:
    return [0] * count if tensors is None else [tensor.data_ptr() for tensor in tensors]
