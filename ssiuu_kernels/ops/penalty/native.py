"""`penalty_` and `penalty_adamw_` on the compiled kernels (csrc/cpu, csrc/cuda): one launch for many parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.native_host import DTYPE_CODES, call
from .scalars import StepScalars
from .tensors import PenaltyTensors


def penalty_(tensors: PenaltyTensors, scalars: StepScalars) -> Tensor:
    return _run("penalty", tensors, scalars, None)


def penalty_adamw_(tensors: PenaltyTensors, scalars: StepScalars, seeds: Sequence[int] | None) -> Tensor:
    return _run("penalty_adamw", tensors, scalars, seeds)


def _run(op: str, tensors: PenaltyTensors, scalars: StepScalars, seeds: Sequence[int] | None) -> Tensor:
    params = tensors.params
    sizes = [param.numel() for param in params]
    sums = torch.empty(5, dtype=torch.float64, device=params[0].device)
    typed = (params, tensors.grads, tensors.prev_attributions)
    call(
        op, params[0], *(DTYPE_CODES[entries[0].dtype] for entries in typed),
        sizes, *(_addresses(entries, len(sizes)) for entries in tensors), [seed & 0xFFFFFFFF for seed in seeds or ()],
        scalars.host, 0 if scalars.device is None else scalars.device.data_ptr(), scalars.keep_anchor,
        sums.data_ptr(),
        workspace=(sizes,),
    )  # fmt: skip
    return sums


def _addresses(entries: Sequence[Tensor] | None, count: int) -> list[int]:
    return [0] * count if entries is None else [tensor.data_ptr() for tensor in entries]
