"""Updates of `SsiuuAdamW` during the backward, so that no full set of gradients ever exists.

A parameter is updated when autograd has added up its gradient, which is after the last backward node that uses it in
the graph, however many there are (tied and shared weights), and each of those makes its data gradient and its target
gradient before it hands the gradient over. A checkpointed layer's forward is run again before its own nodes go
backward, and so before any weight that it reads is updated.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from ..gradients.target_grad import has_empty_sum

# Parameters below this size (vectors, and tiny matrices) wait for `step()`, where they share launches: their gradients
# are almost nothing, 256 KB in float32 at most.
WAITING = 1 << 16


class PenalisedOptimizer(Protocol):
    """What the hooks need of their optimizer."""

    param_groups: list[dict]

    def check_before_update(self) -> None:
        """Refuse what can be wrong before any gradient is known."""

    def update_params(self, pending: Sequence[tuple[dict, nn.Parameter]]) -> list[Any]:
        """Update these parameters, each with its group; what `finish_step` needs to know of it."""

    def finish_step(self, parts: Sequence[Any]) -> None:
        """Total the statistics of a step, and steer lambda by them."""

    def update_all(self) -> None:
        """Update every parameter that has a gradient: a whole step."""


class _Mark:
    """On a parameter that is updated in backward. A copy of the parameter is not: its mark comes out as False."""

    def __reduce__(self):
        return bool, ()


class UpdateInBackward:
    """The hooks on an optimizer's parameters, and what they have done since its last step."""

    def __init__(self, optimizer: PenalisedOptimizer):
        self._optimizer = weakref.proxy(optimizer)
        # By index: load_state_dict puts other dictionaries in the groups' places.
        self._group_index = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self._parts: list = []
        self._seen: dict[nn.Parameter, int | None] = {}  # the version of a gradient that waits for `step()`
        me = weakref.ref(self)  # the hook lives as long as the parameter, and shall not keep the optimizer alive

        def hook(param: nn.Parameter) -> None:
            if me() is not None:
                me()._on_complete(param)

        for index, param in enumerate(self._group_index):
            if getattr(param, "updated_in_backward", False):
                raise ValueError(
                    f"parameter {index} is updated in backward by another optimizer already; give it to one"
                )
        params = list(self._group_index)
        for param in params:
            if param.requires_grad:
                param.updated_in_backward = _Mark()  # an unlearning loss checks that it will get both gradients
        handles = [handle for param in params for handle in _hooked(param, hook)]
        weakref.finalize(self, _release, handles, [weakref.ref(param) for param in params])

    @property
    def between(self) -> bool:
        """Whether a backward has updated parameters, and its `step()` is still to come."""
        return bool(self._seen)

    @torch.no_grad()
    def _on_complete(self, param: nn.Parameter) -> None:
        """Both gradients of `param` are complete: update it and free them, or leave them if it is small."""
        if param in self._seen:
            raise ValueError(
                "a second backward before step(): with update_in_backward=True the first one's gradients are applied "
                "already, and cannot be accumulated; call step() after every backward, use a larger batch (with "
                "gradient checkpointing, say), or update_in_backward=False"
            )
        if not self._seen:
            self._check_groups()
        if getattr(param, "target_grad", None) is None and not has_empty_sum(param):
            raise ValueError(
                f"a parameter of shape {list(param.shape)} that is updated in backward got no target_grad; expected "
                "the backward of handle.unlearning_loss(...), with scope='all'"
            )
        if param.numel() < WAITING:
            self._seen[param] = param.grad._version
            return
        self._seen[param] = None
        self._parts += self._optimizer.update_params([(self._group(param), param)])
        param.grad = None

    def _check_groups(self) -> None:
        """Before the first update of a step: the groups are in order, and hold the parameters that have the hooks."""
        self._optimizer.check_before_update()
        if [id(param) for param in self._params()] != [id(param) for param in self._group_index]:
            raise ValueError(
                "the optimizer's groups hold other parameters than it was made with (accelerate's prepare replaces "
                "them, for one), and update_in_backward=True updates those that it was made with; make the optimizer "
                "after the model has its last parameters"
            )

    def _params(self) -> Iterable[nn.Parameter]:
        return (param for group in self._optimizer.param_groups for param in group["params"])

    def _group(self, param: nn.Parameter) -> dict:
        return self._optimizer.param_groups[self._group_index[param]]

    def finish(self) -> None:
        """Update the small parameters, total the step's statistics and steer lambda.

        Raises:
            ValueError: no backward since the last step; a gradient that was changed since the backward, whose parameter
                is left as it is; other parameters in the groups.
        """
        self._check_groups()
        if not self._seen:
            self._finish_without_backward()
            return
        waiting = [(param, version) for param, version in self._seen.items() if version is not None]
        if any(param.grad is not None and param.grad._version != version for param, version in waiting):
            raise ValueError(
                "gradients were changed between backward and step() (by clip_grad_norm_ or a GradScaler, say), when "
                "most parameters had been updated already; with update_in_backward=True lower lr instead of "
                "clipping, or use update_in_backward=False"
            )
        pending = [(self._group(param), param) for param, _ in waiting if param.grad is not None]
        parts = self._parts + self._optimizer.update_params(pending)
        for _, param in pending:
            param.grad = None
        self._parts, self._seen = [], {}
        self._optimizer.finish_step(parts)

    def _finish_without_backward(self) -> None:
        """Gradients that were set by hand, as torch.distributed.checkpoint does to make the states of an optimizer."""
        params = [param for param in self._params() if param.grad is not None]
        if not params:
            raise ValueError(
                "step() with update_in_backward=True, and no parameter got a gradient since the last step; expected "
                "one backward of handle.unlearning_loss(...) on these parameters before every step"
            )
        self._optimizer.update_all()
        for param in params:
            param.grad = None


def _hooked(param: nn.Parameter, hook) -> list:
    """The hook's handle; none for a parameter of a type that never has a gradient. A frozen one may thaw later."""
    if not (param.is_floating_point() or param.is_complex()):
        return []
    trainable = param.requires_grad
    param.requires_grad_(True)  # or torch takes no hook
    handle = param.register_post_accumulate_grad_hook(hook)
    param.requires_grad_(trainable)
    return [handle]


def _release(handles: list, params: list) -> None:
    for handle in handles:
        handle.remove()
    for reference in params:
        if reference() is not None:
            reference().updated_in_backward = False
