"""Unlearning methods: a backbone objective and a regulariser of its optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

import ssiuu_kernels as sk


@dataclass(frozen=True)
class OptimizerOptions:
    """What an optimizer is made from; see `ssiuu_kernels.SsiuuAdamW`."""

    learning_rate: float
    weight_decay: float
    penalty_weight: float
    penalty_share: float | None
    update_in_backward: bool = False


@dataclass(frozen=True)
class Method:
    """An unlearning method.

    Attributes:
        name: as the command line knows it.
        objective: the backbone's loss, a name of `PatchHandle.unlearning_loss`.
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


def _adamw(params: Iterable[nn.Parameter], options: OptimizerOptions) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=options.learning_rate, weight_decay=options.weight_decay)


def _ssiuu_adamw(params: Iterable[nn.Parameter], options: OptimizerOptions) -> torch.optim.Optimizer:
    return sk.SsiuuAdamW(
        params,
        lr=options.learning_rate,
        weight_decay=options.weight_decay,
        penalty_weight=options.penalty_weight,
        penalty_share=options.penalty_share,
        update_in_backward=options.update_in_backward,
    )


_ALL = (
    Method("gd", "gd", _adamw, False, "gradient difference: ascent on forget, descent on retain"),
    Method("ssiuu", "gd", _ssiuu_adamw, True, "gradient difference with the penalty on growing negative attribution"),
)
METHODS = {method.name: method for method in _ALL}


def get_method(name: str) -> Method:
    """The method of that name; a ValueError that lists the names otherwise."""
    if name not in METHODS:
        raise ValueError(f"method={name!r} is unknown; expected one of {', '.join(METHODS)}")
    return METHODS[name]


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
