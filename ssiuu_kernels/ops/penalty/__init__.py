"""The SSIUU penalty on parameters (Eq. 6-14, Algorithm 1), alone or fused with AdamW."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from .. import backends
from ..common import native_host, triton_host
from ..common.checks import check_float, check_in_place, check_like
from ..common.results import PenaltyStats
from . import native, reference
from .scalars import StepScalars, step_scalars
from .tensors import PenaltyTensors

backends.register("penalty_", "reference", reference.penalty_)
backends.register("penalty_", "native", native.penalty_, native_host.why_not)
backends.register("penalty_", "triton", triton_host.lazily(__name__, "penalty_"), triton_host.why_not)
backends.register("penalty_adamw_", "reference", reference.penalty_adamw_)
backends.register("penalty_adamw_", "native", native.penalty_adamw_, native_host.why_not)
backends.register("penalty_adamw_", "triton", triton_host.lazily(__name__, "penalty_adamw_"), triton_host.why_not)

# What the two ops write, by the names of their lists.
WRITES = {
    "penalty_": ("grad", "prev_attribution"),
    "penalty_adamw_": ("param", "prev_attribution", "exp_avg", "exp_avg_sq"),
}


def penalty_(
    grad: Tensor,
    param: Tensor,
    target_grad: Tensor,
    prev_attribution: Tensor,
    *,
    weight: float | Tensor,
    step: int | Tensor,
    keep_anchor: bool = False,
    backend: str = "auto",
) -> PenaltyStats:
    """Add the penalty's gradient to `grad` and remember the attribution, in place and in one pass.

    With `A_t = param * target_grad` and `I- = {A_t < 0}`: `grad += 2 weight (A_t - A_{t-1}) target_grad` on I- where
    `A_{t-1}` is known, and `prev_attribution = A_t` everywhere. Reads four tensors and writes two.

    With `keep_anchor`, `prev_attribution` is written at step 1 and where it is NaN, and nowhere else: every later step
    then compares with the attribution that was measured first.

    Args:
        grad: `dL`, any shape, contiguous; float32, bfloat16, float16 or float64; overwritten.
        param: the parameter phi, shaped like grad.
        target_grad: `gP = sum_b dP_b / dphi`, shaped and typed like grad.
        prev_attribution: `A_{t-1}`, shaped like grad, of any of these types, NaN where it was never measured;
            overwritten with `A_t`.
        weight: lambda, from 0 to 1e30; a number, or a 0-dim tensor, which is not read on the host: where it is out of
            this range there is no penalty. At 0 grad is unchanged.
        step: counted from 1; step 1 has no `A_{t-1}`, so it only stores `A_1`. A number, or a 0-dim tensor.
        keep_anchor: keep `prev_attribution` where it is known.
        backend: "auto", "reference", "native" or "triton".

    Returns:
        `PenaltyStats`, scalar tensors.

    Raises:
        ValueError, TypeError: arguments of another shape, type, device or layout, or that share memory; a negative or
            non-finite weight; step < 1; a backend that cannot run.
    """
    return penalty_many_(
        [grad], [param], [target_grad], [prev_attribution],
        weight=weight, step=step, keep_anchor=keep_anchor, backend=backend,
    )  # fmt: skip


@torch.no_grad()
def penalty_many_(
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    target_grads: Sequence[Tensor],
    prev_attributions: Sequence[Tensor],
    *,
    weight: float | Tensor,
    step: int | Tensor,
    keep_anchor: bool = False,
    backend: str = "auto",
) -> PenaltyStats:
    """`penalty_` of many parameters, in one launch where the backend can: for the many small ones.

    Args:
        grads, params, target_grads, prev_attributions: one entry per parameter, each as in `penalty_`; all parameters
            of one type and on one device, and so the others.
        weight, step, keep_anchor, backend: as in `penalty_`.

    Returns:
        `PenaltyStats` of all parameters together.

    Raises:
        ValueError, TypeError: as `penalty_`, of the parameter that is named; lists that are empty or of different
            lengths.
    """
    lists = {
        "grad": list(grads), "param": list(params), "target_grad": list(target_grads),
        "prev_attribution": list(prev_attributions),
    }  # fmt: skip
    check_launch("penalty_", lists, backend)
    scalars = step_scalars(step, weight, lists["param"][0].device, keep_anchor=keep_anchor)
    return run_penalty(lists, scalars, backend)


def run_penalty(lists: dict[str, list[Tensor]], scalars: StepScalars, backend: str) -> PenaltyStats:
    """One launch over checked tensors."""
    return PenaltyStats.from_sums(_penalty(*lists.values(), *scalars, backend))


def penalty_adamw_(
    param: Tensor,
    grad: Tensor,
    target_grad: Tensor,
    prev_attribution: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int | Tensor,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    weight: float | Tensor,
    keep_anchor: bool = False,
    seed: int | None = None,
    backend: str = "auto",
) -> PenaltyStats:
    """The penalty of `penalty_` and the update of `torch.optim.AdamW` in one pass over memory.

    Reads six tensors and writes four: with float32 everywhere 40 bytes per parameter, with bfloat16 20.

    Args:
        param: phi, any shape, contiguous; float32, bfloat16, float16 or float64; overwritten.
        grad, target_grad: `dL` and `gP`, shaped like param, of one type; left as they are.
        prev_attribution, exp_avg, exp_avg_sq: `A_{t-1}` and AdamW's moments, shaped like param, of one type;
            overwritten.
        step: counted from 1; step 1 stores `A_1` and applies no penalty. A number, or a 0-dim tensor, which is not read
            on the host; so also lr and weight.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`; lr up to 1e30.
        weight: lambda, from 0 to 1e30; at 0 the update is AdamW's. Where a tensor lr or weight is out of its range, or
            not finite, the step uses lr 0 and weight 0: param is unchanged.
        keep_anchor: as in `penalty_`.
        seed: None rounds to nearest. A number rounds the bfloat16 tensors that are written up or down at random, so
            that their mean is kept; the draws depend on seed, step and an element's place, and on nothing else.
        backend: "auto", "reference", "native" or "triton".

    Returns:
        `PenaltyStats`, scalar tensors.

    Raises:
        ValueError, TypeError: as `penalty_`.
    """
    return penalty_adamw_many_(
        [param], [grad], [target_grad], [prev_attribution], [exp_avg], [exp_avg_sq],
        step=step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, weight=weight,
        keep_anchor=keep_anchor, seeds=None if seed is None else [seed], backend=backend,
    )  # fmt: skip


@torch.no_grad()
def penalty_adamw_many_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    target_grads: Sequence[Tensor],
    prev_attributions: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    step: int | Tensor,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    weight: float | Tensor,
    keep_anchor: bool = False,
    seeds: Sequence[int] | None = None,
    backend: str = "auto",
) -> PenaltyStats:
    """`penalty_adamw_` of many parameters, in one launch where the backend can: for the many small ones.

    Args:
        params, grads, target_grads, prev_attributions, exp_avgs, exp_avg_sqs: one entry per parameter, each as in
            `penalty_adamw_`; all parameters of one type and on one device, and so the others.
        step, lr, betas, eps, weight_decay, weight, keep_anchor, backend: as in `penalty_adamw_`.
        seeds: one for each parameter, or None.

    Returns:
        `PenaltyStats` of all parameters together.

    Raises:
        ValueError, TypeError: as `penalty_adamw_`, of the parameter that is named; lists that are empty or of different
            lengths.
    """
    lists = {
        "param": list(params), "grad": list(grads), "target_grad": list(target_grads),
        "prev_attribution": list(prev_attributions), "exp_avg": list(exp_avgs), "exp_avg_sq": list(exp_avg_sqs),
    }  # fmt: skip
    check_launch("penalty_adamw_", lists, backend)
    if seeds is not None and len(seeds) != len(lists["param"]):
        raise ValueError(f"seeds has {len(seeds)} entries; expected one for each of {len(lists['param'])} parameters")
    device = lists["param"][0].device
    scalars = step_scalars(step, weight, device, lr, betas, eps, weight_decay, keep_anchor=keep_anchor)
    return run_penalty_adamw(lists, scalars, seeds, backend)


def run_penalty_adamw(
    lists: dict[str, list[Tensor]], scalars: StepScalars, seeds: Sequence[int] | None, backend: str
) -> PenaltyStats:
    """One launch over checked tensors."""
    # 31 bits, which every backend can take as a number.
    seeds = None if seeds is None else [seed & 0x7FFFFFFF for seed in seeds]
    return PenaltyStats.from_sums(_penalty_adamw(*lists.values(), *scalars, seeds, backend))


def check_launch(op: str, lists: dict[str, list[Tensor]], backend: str) -> None:
    """The tensors of one launch, by the name of their list, fit one another, and the backend can take them."""
    _check_tensors(lists, WRITES[op])
    backends.check_backend(backend)
    if not torch.compiler.is_compiling():  # the op chooses again when it runs
        backends.select(op, backend, *(lists[name][0] for name in ("param", "grad", "prev_attribution")))


def _check_tensors(lists: dict[str, list[Tensor]], written: Collection[str]) -> None:
    counts = {name: len(tensors) for name, tensors in lists.items()}
    if len(set(counts.values())) > 1 or not counts["param"]:
        raise ValueError(
            f"the lists have {counts} entries; expected one per parameter in each, and at least one parameter"
        )
    first = {name: tensors[0] for name, tensors in lists.items()}
    spans = []
    for index, tensors in enumerate(zip(*lists.values(), strict=True)):
        named = dict(zip(lists, tensors, strict=True))
        suffix = f"[{index}]" if counts["param"] > 1 else ""
        _check_one({f"{name}{suffix}": tensor for name, tensor in named.items()})
        for name, tensor in named.items():
            if tensor.dtype != first[name].dtype or tensor.device != first[name].device:
                raise ValueError(
                    f"{name}[{index}] is {tensor.dtype} on {tensor.device} and {name}[0] {first[name].dtype} on "
                    f"{first[name].device}; pass parameters of one type and device, and others in another call"
                )
        spans += [(f"{name}{suffix}", tensor, name in written) for name, tensor in named.items()]
    if not torch.compiler.is_compiling():  # addresses exist at run time only
        check_in_place(spans)


def _check_one(tensors: dict[str, Tensor]) -> None:
    """The tensors of one parameter, under the names by which errors call them."""
    names = {name.partition("[")[0]: name for name in tensors}
    param = tensors[names["param"]]
    check_float(names["param"], param)
    check_like(names["grad"], tensors[names["grad"]], names["param"], param, dtype=False)
    check_like(names["target_grad"], tensors[names["target_grad"]], names["grad"], tensors[names["grad"]])
    state = names["prev_attribution"]
    check_like(state, tensors[state], names["param"], param, dtype=False)
    for name in ("exp_avg", "exp_avg_sq"):
        if name in names:
            check_like(names[name], tensors[names[name]], state, tensors[state])
    if any((tensor.dtype == torch.float64) != (param.dtype == torch.float64) for tensor in tensors.values()):
        raise ValueError("float64 mixes with no other type: pass every tensor in float64, or none")


@torch.library.custom_op("ssiuu::penalty_", mutates_args=("grads", "prev_attributions"))
def _penalty(
    grads: Sequence[Tensor],
    params: Sequence[Tensor],
    target_grads: Sequence[Tensor],
    prev_attributions: Sequence[Tensor],
    host_scalars: Sequence[float],
    device_scalars: Tensor | None,
    keep_anchor: bool,
    backend: str,
) -> Tensor:
    run = backends.select("penalty_", backend, params[0], grads[0], prev_attributions[0])
    scalars = StepScalars(list(host_scalars), device_scalars, keep_anchor)
    return run(PenaltyTensors(params, grads, target_grads, prev_attributions), scalars)


@torch.library.custom_op(
    "ssiuu::penalty_adamw_", mutates_args=("params", "prev_attributions", "exp_avgs", "exp_avg_sqs")
)
def _penalty_adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    target_grads: Sequence[Tensor],
    prev_attributions: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    host_scalars: Sequence[float],
    device_scalars: Tensor | None,
    keep_anchor: bool,
    seeds: Sequence[int] | None,
    backend: str,
) -> Tensor:
    run = backends.select("penalty_adamw_", backend, params[0], grads[0], prev_attributions[0])
    scalars = StepScalars(list(host_scalars), device_scalars, keep_anchor)
    tensors = PenaltyTensors(params, grads, target_grads, prev_attributions, exp_avgs, exp_avg_sqs)
    return run(tensors, scalars, seeds)


@_penalty.register_fake
def _(grads, *_):
    return grads[0].new_empty(5, dtype=torch.float64)


@_penalty_adamw.register_fake
def _(params, *_):
    return params[0].new_empty(5, dtype=torch.float64)
