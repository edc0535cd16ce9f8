"""`param.target_grad`, the sum of `dP_b/dphi` over the forget samples, beside `param.grad`."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def gradient_dtype(param: Tensor) -> torch.dtype:
    """The type in which a parameter's gradients add up: its own, or the one asked for by `patch(grad_dtype=...)`."""
    return getattr(param, "grad_dtype", None) or param.dtype


def add_target_grad(param: Tensor, grad: Tensor) -> None:
    """Add to `param.target_grad`, which takes `grad` over where there is none yet."""
    total = getattr(param, "target_grad", None)
    param.target_grad = grad.to(gradient_dtype(param)) if total is None else total.add_(grad)


def drop_target_grad(param: Tensor) -> None:
    """Forget the target gradient and all that is known of it."""
    param.target_grad = None
    param.target_grad_info = None


class TargetGradInfo:
    """What the backwards since the last step left on a parameter, beside its two gradients.

    Attributes:
        samples: forget samples that `target_grad` sums over; 0 where the batches had none, and `target_grad` is None.
        grad_version: the version of `param.grad` after the last of these backwards; None without a `grad`.
        scale: by which the last loss was multiplied before its backward, 0-dim, on its device.
        task: autograd's number of that backward; None where it is not known.
    """

    def __init__(self, samples: int, grad_version: int | None, scale: Tensor, task: int | None = None):
        self.samples, self.grad_version, self.scale, self.task = samples, grad_version, scale, task

    def __reduce__(self):
        """A pickle or a copy of a parameter is one that no loss has met."""
        return type(None), ()

    @property
    def scaled(self) -> bool:
        """Whether the last loss was multiplied, as a `GradScaler` does. Waits for the device."""
        return bool(self.scale != 1)


def info_of(param: Tensor) -> TargetGradInfo | None:
    """What the unlearning losses' backwards left on `param`; None where there was none since the last step."""
    return getattr(param, "target_grad_info", None)


def has_empty_sum(param: Tensor) -> bool:
    """Whether unlearning losses ran backward since the last step, and none of their batches had a forget sample."""
    info = info_of(param)
    return info is not None and info.samples == 0


def changed_since_backward(params: Iterable[Tensor]) -> bool:
    """Whether a `grad` was written to after the backward of the last unlearning loss (by clipping, say).

    Unscaling by a `GradScaler` does not count: where the loss was multiplied, the answer is False.
    """
    for param in params:
        info = info_of(param)
        if info is not None and param.grad is not None and param.grad._version != info.grad_version:
            return not info.scaled
    return False
