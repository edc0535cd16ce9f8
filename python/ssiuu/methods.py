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


@dataclass(frozen=True)
class Method:
    """An unlearning method.

    Attributes:
        objective: the backbone's loss, a name of `PatchHandle.unlearning_loss`.
        optimizer: makes the optimizer that applies the regulariser.
        penalised: whether the optimizer reads `param.target_grad`, which then costs a second backward.
        summary: one line for the command line.
    """

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
    )


METHODS = {
    "gd": Method("gd", _adamw, False, "gradient difference: ascent on forget, descent on retain"),
    "ssiuu": Method("gd", _ssiuu_adamw, True, "gradient difference with the penalty on growing negative attribution"),
}


def get_method(name: str) -> Method:
    """The method of that name; a ValueError that lists the names otherwise."""
    if name not in METHODS:
        raise ValueError(f"method={name!r} is unknown; expected one of {', '.join(METHODS)}")
    return METHODS[name]
