"""Unlearning methods: a backbone objective and a regulariser of its optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import ssiuu_kernels as sk


@dataclass(frozen=True)
class OptimizerOptions:
    """What an optimizer is made from; see `ssiuu_kernels.SsiuuAdamW`."""

    learning_rate: float
    weight_decay: float
    penalty_weight: float
    penalty_share: float | None
    update_in_backward: bool = False
    stochastic_rounding: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Method:
    """An unlearning method.

    Attributes:
        name: as the command line knows it.
        objective: the backbone's loss, a name of `PatchHandle.unlearning_loss`; a difference of means over tokens.
        optimizer: makes the optimizer that applies the regulariser.
        penalised: whether the optimizer is an `SsiuuAdamW`, which reads `param.target_grad`; the backward of the loss
            then fills that too.
        summary: one line for the command line.
    """

    name: str
    objective: str
    optimizer: Callable[[Iterable[nn.Parameter], OptimizerOptions], torch.optim.Optimizer]
    penalised: bool
    summary: str


class RoundedAdamW(sk.SsiuuAdamW):
    """AdamW that rounds bfloat16 weights stochastically: `SsiuuAdamW` without a target, and so without a penalty.

    Rounding to the nearest drops updates below half a unit in the last place: at a learning rate of 1e-5 almost all.
    The target that is not there takes 4 bytes per parameter, two of them during a step alone.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float, seed: int):
        super().__init__(
            params, lr=lr, weight_decay=weight_decay, penalty_weight=0.0, stochastic_rounding=True, seed=seed
        )

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step."""
        for group in self.param_groups:
            for param in group["params"]:
                param.target_grad = None if param.grad is None else torch.zeros_like(param.grad)
        return super().step(closure)


def plain_adamw(params: Iterable[nn.Parameter], options: OptimizerOptions) -> torch.optim.Optimizer:
    """AdamW without a penalty."""
    if options.stochastic_rounding:
        return RoundedAdamW(params, options.learning_rate, options.weight_decay, options.seed)
    return torch.optim.AdamW(params, lr=options.learning_rate, weight_decay=options.weight_decay)


def _ssiuu_adamw(params: Iterable[nn.Parameter], options: OptimizerOptions) -> torch.optim.Optimizer:
    return sk.SsiuuAdamW(
        params,
        lr=options.learning_rate,
        weight_decay=options.weight_decay,
        penalty_weight=options.penalty_weight,
        penalty_share=options.penalty_share,
        update_in_backward=options.update_in_backward,
        stochastic_rounding=options.stochastic_rounding,
        seed=options.seed,
    )


_ALL = (
    Method("gd", "gd", plain_adamw, False, "gradient difference: ascent on forget, descent on retain"),
    Method("ssiuu", "gd", _ssiuu_adamw, True, "gradient difference with the penalty on growing negative attribution"),
)
METHODS = {method.name: method for method in _ALL}


def get_method(name: str) -> Method:
    """The method of that name; a ValueError that lists the names otherwise."""
    if name not in METHODS:
        raise ValueError(f"method={name!r} is unknown; expected one of {', '.join(METHODS)}")
    return METHODS[name]


def check_learning_rate(rate: float) -> None:
    """Raise a ValueError for a learning rate that is not a positive, finite number."""
    if not 0 < rate < math.inf:
        raise ValueError(f"learning_rate={rate}; expected a positive number")


def check_weights_dtype(dtype: str) -> None:
    """Raise a ValueError for weights that cannot be trained."""
    if dtype == "float16":
        raise ValueError(
            "dtype='float16' cannot be trained: AdamW's eps and second moments vanish in it; "
            "use --dtype bfloat16, or float32 with --bf16"
        )


def check_update_in_backward(method: Method, accumulate: int, max_grad_norm: float = 0.0) -> None:
    """Raise a ValueError that names what an update in backward cannot be combined with.

    Args:
        method: that is to be used.
        accumulate: micro-batches a step.
        max_grad_norm: to which gradients are to be clipped; 0 for no clipping.
    """
    if not method.penalised:
        able = ", ".join(other.name for other in METHODS.values() if other.penalised)
        raise ValueError(
            f"update_in_backward=True with method={method.name!r}, whose optimizer cannot do it; expected one of "
            f"{able}, or leave --update-in-backward out"
        )
    if accumulate > 1:
        raise ValueError(
            f"update_in_backward=True with accumulate={accumulate} (gradient_accumulation_steps); expected 1, for "
            "gradients that are applied in backward cannot add up: use a larger --forget-batch with "
            "--gradient-checkpointing instead, or leave --update-in-backward out"
        )
    if max_grad_norm > 0:
        raise ValueError(
            f"update_in_backward=True with max_grad_norm={max_grad_norm}; expected 0, for gradients that are applied "
            "in backward cannot be clipped: use a lower learning rate instead, or leave update_in_backward out"
        )
