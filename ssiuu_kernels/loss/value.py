"""The value of an unlearning loss, which knows by what it is multiplied before its backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Scaled(Protocol):
    """Whose `scale` is set when the backward begins: what the loss was multiplied by, 0-dim."""

    scale: Tensor | None


class UnlearningLoss(Tensor):
    """A scalar loss that fills `grad` and `target_grad` in `backward()`, and gives no gradient to anything else."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        backward = function in (Tensor.backward, torch.autograd.backward)
        if function is torch.autograd.grad or (backward and kwargs.get("inputs") is not None):
            raise ValueError(
                "an unlearning loss makes its gradients in backward() alone: torch.autograd.grad and "
                "backward(inputs=...) would get none; call loss.backward() and read param.grad and param.target_grad, "
                "or patch with engine='two-backward'"
            )
        if function is Tensor.__format__:  # a tensor of another class is not formatted as a number
            return function(_plain(args[0]), *args[1:])
        if backward:  # with subclasses in force: a checkpointed forward that runs again in it needs them
            return function(_plain(args[0]), *args[1:], **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **kwargs)
        # What is made of it (divided, added to another loss) is such a loss too.
        return result.as_subclass(cls) if type(result) is Tensor and result.requires_grad else result


def _plain(losses: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
    if not isinstance(losses, Tensor):
        return [_plain(loss) for loss in losses]
    with torch._C.DisableTorchFunctionSubclass():
        return losses.as_subclass(Tensor)


class NoteScale(torch.autograd.Function):
    """The identity on the loss's value; its backward notes by what the value was multiplied."""

    @staticmethod
    def forward(ctx, value: Tensor, noted: Scaled) -> Tensor:
        ctx.noted = noted
        return value.view_as(value)

    @staticmethod
    def backward(ctx, scale: Tensor):
        ctx.noted.scale = scale.detach()
        return scale, None
