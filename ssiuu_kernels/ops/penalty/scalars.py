"""The scalars of one step, checked and derived here alone; csrc/include/ssiuu/step.h names them in this order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.precision import LARGEST, usable

FIELDS = (
    "decay",  # 1 - lr * weight_decay
    "one_minus_beta1",
    "beta2",
    "one_minus_beta2",
    "step_size",  # lr / (1 - beta1^step)
    "inv_sqrt_bias_correct2",  # 1 / sqrt(1 - beta2^step)
    "eps",
    "twice_weight",  # 2 * lambda
    "threshold",  # A below it is penalised: 0, and -infinity at the first step, which has no A_{t-1}
    "step",
)


class StepScalars(NamedTuple):
    """What a step does to every scalar.

    Attributes:
        host: the values of `FIELDS`.
        device: the same, float64 `[10]` where the parameters are; counts where it is not None.
        keep_anchor: `prev_attribution` stays where it is known; A_t replaces it at the first step, and where it is NaN.
    """

    host: list[float]
    device: Tensor | None
    keep_anchor: bool


def step_scalars(
    step: int | Tensor,
    weight: float | Tensor,
    device: torch.device,
    lr: float | Tensor = 0.0,
    betas: tuple[float, float] = (0.0, 0.0),
    eps: float = 0.0,
    weight_decay: float = 0.0,
    *,
    keep_anchor: bool = False,
    anchored: bool = False,
) -> StepScalars:
    """Derived from numbers on the host; or, where step, weight or lr is a tensor, on its device without reading it.

    There a weight or lr that is out of range or not finite cannot be refused: both count as 0 then, so that no
    parameter is written from it.

    Args:
        step: AdamW's, counted from 1.
        keep_anchor: see `StepScalars`.
        anchored: `prev_attribution` counts at step 1 too (NaN where nothing was measured). If false, step 1 has no
            `A_{t-1}`, whatever the tensor holds.

    Raises:
        ValueError: a number out of its range.
    """
    check_scalars(step, weight, lr, betas, eps, weight_decay)
    if not any(isinstance(value, Tensor) for value in (step, weight, lr)):
        threshold = 0.0 if anchored or step > 1 else -math.inf
        host = [*_adamw(step, lr, betas, eps, weight_decay, math.sqrt), 2 * weight, threshold, step]
        return StepScalars(host, None, keep_anchor)
    step, weight, lr = (_on_device(value, device) for value in (step, weight, lr))
    both = usable(weight, lr * _reach(betas, weight_decay))
    weight, lr, step = torch.where(both, weight, 0), torch.where(both, lr, 0), torch.where(step >= 1, step, 1)
    threshold = torch.where(step > 1, 0.0, 0.0 if anchored else -math.inf)
    derived = [*_adamw(step, lr, betas, eps, weight_decay, torch.sqrt), 2 * weight, threshold, step]
    on_device = torch.stack([_on_device(value, device) for value in derived])
    return StepScalars([0.0] * len(FIELDS), on_device, keep_anchor)


def check_scalars(
    step: int | Tensor,
    weight: float | Tensor,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Numbers are in their ranges; a tensor is not read. NaN is in no range."""
    if not isinstance(step, Tensor) and not step >= 1:
        raise ValueError(f"step={step}; expected steps counted from 1")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas={betas}; expected two numbers in [0, 1)")
    for name, value in (("weight", weight), ("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not isinstance(value, Tensor) and not 0 <= value <= LARGEST:
            raise ValueError(f"{name}={value}; expected a finite number from 0 to {LARGEST:g}")
    if not isinstance(lr, Tensor) and lr * _reach(betas, weight_decay) > LARGEST:
        raise ValueError(
            f"lr={lr}, betas={betas}, weight_decay={weight_decay}; expected numbers that make finite steps"
        )


def _reach(betas: tuple[float, float], weight_decay: float) -> float:
    """How many times lr the step size and the decay can be."""
    return max(1 / (1 - betas[0]), weight_decay)


def _on_device(value: float | Tensor, device: torch.device) -> Tensor:
    # A number is filled in there: copying it from pageable memory would wait for the device.
    if isinstance(value, Tensor):
        return value.to(device, torch.float64)
    return torch.full((), value, dtype=torch.float64, device=device)


def _adamw(step, lr, betas, eps, weight_decay, sqrt) -> Sequence:
    beta1, beta2 = betas
    bias1, bias2 = 1 - beta1**step, 1 - beta2**step
    return 1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, lr / bias1, 1 / sqrt(bias2), eps
