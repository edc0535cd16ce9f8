"""One backward, compared with two on every batch: `engine="checked"`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .backward import OneBackward
from .graph import Part

KINDS = ("grad", "target_grad")

# Relative distance that rounding explains, by a parameter's type. Rows taken for another sample's give 0.5 and more.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
# A gradient that is 0 up to rounding (a key's bias) is compared with this part of the whole.
FLOOR = 1e-3
TINY = 1e-300  # of gradients that are all 0


class CheckedBackward(OneBackward):
    """`OneBackward` whose gradients are compared with those of two more backwards.

    Raises (from the backward):
        RuntimeError: they differ by more than rounding explains. `grad` and `target_grad` are then as they were.
        ValueError: parameters are updated in backward, which leaves no gradients to compare.
    """

    def _fill(self, parts: Sequence[Part], weights: Tensor, retain_graph: bool) -> None:
        if self._targets.updated_in_backward:
            raise ValueError(
                "engine='checked' compares gradients, and parameters that are updated in backward keep none; use "
                "update_in_backward=False for the check"
            )
        params = self._versions.params
        expected = [self._by_autograd(parts, part) for part in (weights, self._factor)]
        before = [(param.grad, getattr(param, "target_grad", None)) for param in params.values()]
        for param in params.values():
            param.grad = param.target_grad = None
        try:
            super()._fill(parts, weights, retain_graph)
            for kind, wanted in zip(KINDS, expected, strict=True):
                _compare(kind, params, wanted)
        except BaseException:
            for param, kept in zip(params.values(), before, strict=True):
                param.grad, param.target_grad = kept
            raise
        for param, kept in zip(params.values(), before, strict=True):
            for kind, old in zip(KINDS, kept, strict=True):
                if old is not None:
                    new = getattr(param, kind)
                    setattr(param, kind, old if new is None else old.add_(new))

    def _by_autograd(self, parts: Sequence[Part], weights: Tensor) -> list[Tensor | None]:
        """The gradients of `sum_b weights_b s_b` with respect to the parameters in the graph."""
        signals = [
            part.whole_signal(own)
            for part, own in zip(parts, weights.split([len(part.log_probs) for part in parts]), strict=True)
        ]
        logits, params = [part.logits for part in parts], list(self._versions.params.values())
        return list(torch.autograd.grad(logits, params, signals, retain_graph=True, allow_unused=True))


def _compare(kind: str, params: dict[str, Tensor], expected: list[Tensor | None]) -> None:
    """Raise a RuntimeError where a gradient is not the expected one."""
    wanted = {name: grad.double() for name, grad in zip(params, expected, strict=True) if grad is not None}
    floor = FLOOR * math.hypot(*(grad.norm().item() for grad in wanted.values()))
    for name, grad in wanted.items():
        found = getattr(params[name], kind)
        if found is None:  # not asked for
            continue
        distance = (found.double() - grad).norm().item() / max(grad.norm().item(), floor, TINY)
        if not distance <= TOLERANCE[params[name].dtype]:
            raise RuntimeError(
                f"one backward gave another {kind} of {name} than autograd, by {distance:.2g} of its norm: the model "
                "mixes samples in a way that was not seen. grad and target_grad are as they were; use "
                "engine='two-backward', and please report the model"
            )
