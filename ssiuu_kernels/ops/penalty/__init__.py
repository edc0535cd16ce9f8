"""SSIUU's parameter-level penalty (Eq. 6-14, Algorithm 1), alone and fused with the AdamW update."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import backends
from ..checks import check_float, check_in_place, check_like
from ..native_support import why_not
from ..results import PenaltyStats
from . import native, reference

backends.register("penalty_", "reference", reference.penalty_)
backends.register("penalty_", "native", native.penalty_, why_not)
backends.register("penalty_adamw_", "reference", reference.penalty_adamw_)
backends.register("penalty_adamw_", "native", native.penalty_adamw_, why_not)


@torch.no_grad()
def penalty_(
    grad: Tensor,
    param: Tensor,
    target_grad: Tensor,
    prev_attribution: Tensor,
    *,
    weight: float,
    step: int,
    backend: str = "auto",
) -> PenaltyStats:
    """Add the penalty's gradient to `grad` and remember the attribution, in place and in one pass.

    With `A_t = param * target_grad` and `I- = {A_t < 0}`: `grad += 2 weight (A_t - A_{t-1}) target_grad` on I-, and
    `prev_attribution = A_t` everywhere.

    Args:
        grad: `dL`, any shape, contiguous; float32, bfloat16, float16 or float64; overwritten.
        param: the parameter phi, shaped like grad.
        target_grad: `gP = sum_b dP_b / dphi`, shaped and typed like grad.
        prev_attribution: `A_{t-1}`, shaped like grad, of any of these types; overwritten with `A_t`.
        weight: lambda, >= 0.
        step: counted from 1; step 1 has no `A_{t-1}`, so it only stores `A_1`.
        backend: "auto", "reference", "native" or "triton".

    Returns:
        `PenaltyStats`, scalar tensors.

    Raises:
        ValueError, TypeError: arguments of another shape, type, device or layout, or that share memory; a negative or
            non-finite weight; step < 1; a backend that cannot run.
    """
    _check_penalty(param, grad, target_grad, weight, step, prev_attribution=prev_attribution)
    sums = _penalty(grad, param, target_grad, prev_attribution, float(weight), step, backends.check_backend(backend))
    return PenaltyStats.from_sums(sums)


@torch.no_grad()
def penalty_adamw_(
    param: Tensor,
    grad: Tensor,
    target_grad: Tensor,
    prev_attribution: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    weight: float,
    backend: str = "auto",
) -> PenaltyStats:
    """The penalty of `penalty_` and the update of `torch.optim.AdamW` in one pass over memory.

    Reads six tensors and writes four: with float32 everywhere 40 bytes a parameter, with bfloat16 20.

    Args:
        param: phi, any shape, contiguous; float32, bfloat16, float16 or float64; overwritten.
        grad, target_grad: `dL` and `gP`, shaped like param, of one type; left as they are.
        prev_attribution, exp_avg, exp_avg_sq: `A_{t-1}` and AdamW's moments, shaped like param, of one type;
            overwritten.
        step: counted from 1; step 1 stores `A_1` and applies no penalty.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
        weight: lambda, >= 0; at 0 the update is AdamW's.
        backend: "auto", "reference", "native" or "triton".

    Returns:
        `PenaltyStats`, scalar tensors.

    Raises:
        ValueError, TypeError: as `penalty_`.
    """
    states = {"prev_attribution": prev_attribution, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    _check_penalty(param, grad, target_grad, weight, step, **states)
    for name in ("exp_avg", "exp_avg_sq"):
        check_like(name, states[name], "prev_attribution", prev_attribution)
    sums = _penalty_adamw(
        param, grad, target_grad, prev_attribution, exp_avg, exp_avg_sq, step,
        float(lr), float(betas[0]), float(betas[1]), float(eps), float(weight_decay), float(weight),
        backends.check_backend(backend),
    )  # fmt: skip
    return PenaltyStats.from_sums(sums)


def _check_penalty(param: Tensor, grad: Tensor, target_grad: Tensor, weight: float, step: int, **states: Tensor):
    check_float("param", param)
    check_like("grad", grad, "param", param, dtype=False)
    check_like("target_grad", target_grad, "grad", grad)
    for name, state in states.items():
        check_like(name, state, "param", param, dtype=False)
    if any((t.dtype == torch.float64) != (param.dtype == torch.float64) for t in (grad, *states.values())):
        raise ValueError("float64 mixes with no other type: pass every tensor in float64, or none")
    if not torch.compiler.is_compiling():  # addresses exist at run time only
        check_in_place(param=param, grad=grad, target_grad=target_grad, **states)
    if not math.isfinite(weight) or weight < 0:
        raise ValueError(f"weight={weight} is no penalty weight; expected a finite number >= 0")
    if step < 1:
        raise ValueError(f"step={step}; expected steps counted from 1")


@torch.library.custom_op("ssiuu::penalty_", mutates_args=("grad", "prev_attribution"))
def _penalty(
    grad: Tensor, param: Tensor, target_grad: Tensor, prev_attribution: Tensor, weight: float, step: int, backend: str
) -> Tensor:
    run = backends.select("penalty_", backend, grad, param, target_grad, prev_attribution)
    return run(grad, param, target_grad, prev_attribution, weight, step)


@torch.library.custom_op("ssiuu::penalty_adamw_", mutates_args=("param", "prev_attribution", "exp_avg", "exp_avg_sq"))
def _penalty_adamw(
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
    backend: str,
) -> Tensor:
    run = backends.select("penalty_adamw_", backend, param, grad, target_grad, prev_attribution, exp_avg, exp_avg_sq)
    return run(
        param, grad, target_grad, prev_attribution, exp_avg, exp_avg_sq,
        step, lr, beta1, beta2, eps, weight_decay, weight,
    )  # fmt: skip


@_penalty.register_fake
def _(grad, *_):
    return grad.new_empty(5, dtype=torch.float64)


@_penalty_adamw.register_fake
def _(param, *_):
    return param.new_empty(5, dtype=torch.float64)
