"""Mask: FDCU's static mask, which damps the steps of parameters that do not favour the forget answers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

import ssiuu_kernels as sk

from ..methods.base import Method, UnlearnData
from ..optimizers import OptimizerOptions, adamw
from ..options import UnlearnOptions
from .base import Regularizer, refuse_bfloat16, trained
from .original import attribution, target_gradients
from .registry import register_regularizer

BATCH_SIZE = 4  # forget samples per forward and backward of the mask


@register_regularizer
class Mask(Regularizer):
    """`W <- W_old + m (W_new - W_old)` with `m = 1 / (1 + mask_beta [A <= 0])`, once for each scalar of the parameters.

    `A = phi sum_b dlogP_b/dphi` over all forget facts, of the model before unlearning. FDCU multiplies gradients by
    `m`. A constant factor on a scalar's gradient cancels in AdamW, whose step is the ratio of the gradient's mean to
    its size (eps aside), so that would change nothing: here the factor is on the step, weight decay included.

    Memory: a byte per trained scalar, and a copy of the trained parameters during the step.
    """

    name, label, color = "mask", "mask", "#117733"
    summary = "damp the steps of parameters whose original attribution is not positive (FDCU)"
    source = "FDCU (2026), mask_beta 20; ours: the factor is on the step, since AdamW cancels one on the gradient"

    @dataclass(frozen=True)
    class Options:
        """
        Attributes:
            mask_beta: steps of scalars whose attribution is not positive are divided by 1 + this. FDCU: 20.
        """

        mask_beta: float = 20.0

    def check(self, method: Method, run: UnlearnOptions) -> None:
        if not 0 <= self.options.mask_beta < math.inf:
            raise ValueError(f"mask_beta={self.options.mask_beta}; expected a finite number, at least 0")
        refuse_bfloat16(self.name, run, "damped steps")

    def setup(self, model: nn.Module, handle: sk.PatchHandle, method: Method, data: UnlearnData) -> None:
        """As for `Regularizer.setup`.

        Raises:
            ValueError: an attribution that is not finite.
        """
        super().setup(model, handle, method, data)
        params = trained(model)
        totals = [torch.zeros_like(param, requires_grad=False) for param in params]
        for grads in target_gradients(model, data, "log_prob", BATCH_SIZE):
            for total, grad in zip(totals, grads, strict=True):
                total += grad
        self.damped = {param: attribution(param, total) <= 0 for param, total in zip(params, totals, strict=True)}

    def optimizer(self, params: Iterable[nn.Parameter], options: OptimizerOptions) -> torch.optim.Optimizer:
        made = adamw(params, options)
        made.register_step_pre_hook(self._remember)
        made.register_step_post_hook(self._damp)
        return made

    def _remember(self, *_) -> None:
        self.before = {param: param.detach().clone() for param in self.damped}

    @torch.no_grad()
    def _damp(self, *_) -> None:
        factor = 1 / (1 + self.options.mask_beta)
        for param, before in self.before.items():
            param.copy_(torch.where(self.damped[param], before.lerp(param, factor), param))
        self.before = {}
