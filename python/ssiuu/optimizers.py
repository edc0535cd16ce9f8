"""AdamW as the runs use it, and what their options cannot be."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

import ssiuu_kernels as sk

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OptimizerOptions:
    """What every optimizer of a run is made from.

    Attributes:
        learning_rate, weight_decay: of AdamW.
        stochastic_rounding: round bfloat16 weights at random so that small updates are kept on average.
        seed: of the rounding.
        update_in_backward: see `ssiuu_kernels.SsiuuAdamW`.
    """

    learning_rate: float
    weight_decay: float = 0.0
    stochastic_rounding: bool = False
    seed: int = 0
    update_in_backward: bool = False


class RoundedAdamW(sk.SsiuuAdamW):
    """AdamW that rounds bfloat16 weights stochastically: `SsiuuAdamW` without a target, and so without a penalty.

    Rounding to the nearest drops updates below half a unit in the last place: at a learning rate of 1e-5 almost all.
    The target that is not there takes 4 bytes per parameter, two of them during a step alone.
    """

    def __init__(self, params: Iterable[nn.Parameter], options: OptimizerOptions):
        super().__init__(
            params, lr=options.learning_rate, weight_decay=options.weight_decay, penalty_weight=0.0,
            stochastic_rounding=True, seed=options.seed,
        )  # fmt: skip
        # Not by a `step` of its own: torch runs a step's hooks in every class whose `step` is called, so twice.
        self.register_step_pre_hook(_set_empty_target)


def _set_empty_target(optimizer: torch.optim.Optimizer, *_) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.target_grad = None if param.grad is None else torch.zeros_like(param.grad)


def adamw(params: Iterable[nn.Parameter], options: OptimizerOptions) -> torch.optim.Optimizer:
    """AdamW without a penalty."""
    if options.stochastic_rounding:
        return RoundedAdamW(params, options)
    return torch.optim.AdamW(params, lr=options.learning_rate, weight_decay=options.weight_decay)


def say_rounding() -> None:
    """Log what bfloat16 weights mean for the optimizer."""
    logger.warning(
        "bfloat16 weights are rounded stochastically: rounding to the nearest would drop almost every update at these "
        "learning rates (--dtype float32 with --bf16 keeps float32 weights)"
    )


def check_update_in_backward(accumulate: int, max_grad_norm: float = 0.0) -> None:
    """Raise a ValueError that names what an update in backward cannot be combined with.

    Args:
        accumulate: micro-batches per step.
        max_grad_norm: to which gradients are to be clipped; 0 for no clipping.
    """
    if accumulate > 1:
        raise ValueError(
            f"update_in_backward=True with accumulate={accumulate} (gradient_accumulation_steps); expected 1: "
            "gradients that are applied in the backward cannot add up. Use a larger --forget-batch with "
            "--gradient-checkpointing instead, or leave --update-in-backward out"
        )
    if max_grad_norm > 0:
        raise ValueError(
            f"update_in_backward=True with max_grad_norm={max_grad_norm}; expected 0: gradients that are applied in "
            "the backward cannot be clipped. Use a lower learning rate instead, or leave update_in_backward out"
        )
