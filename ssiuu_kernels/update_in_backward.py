"""Updates of `SsiuuAdamW` during the backward, so that no full set of gradients ever exists.

A parameter is updated when autograd has added up its gradient, which is after the last backward node that uses it in
the graph, however many there are (tied and shared weights), and each of those makes its data gradient and its target
gradient before it hands the gradient over. A checkpointed layer's forward is run again before its own nodes go
backward, and so before any weight that it reads is updated.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from .ops import PenaltyStats

# Parameters below this size (vectors, and tiny matrices) wait for `step()`, where they share launches: their gradients
# are next to nothing, 256 KB in float32 at most.
WAITING = 1 << 16


class PenalisedOptimizer(Protocol):
    """What the hooks need of their optimizer."""

    param_groups: list[dict]

    def update_params(self, pending: Sequence[tuple[dict, nn.Parameter]]) -> list[PenaltyStats]:
        """Update these parameters, each with its group."""

    def finish_step(self, parts: Sequence[PenaltyStats], updated: Sequence[nn.Parameter]) -> None:
        """Total the statistics of a step, and steer lambda by them."""


class UpdateInBackward:
    """The hooks on an optimizer's parameters, and what they have done since its last step."""

    def __init__(self, optimizer: PenalisedOptimizer):
        self._optimizer = weakref.proxy(optimizer)
        # By index: load_state_dict puts other dictionaries in the groups' places.
        self._group_index = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self._parts: list[PenaltyStats] = []
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
            param.updated_in_backward = True  # an unlearning loss checks that it will get both gradients
        handles = [param.register_post_accumulate_grad_hook(hook) for param in params]
        weakref.finalize(self, _release, handles, [weakref.ref(param) for param in params])

    @torch.no_grad()
    def _on_complete(self, param: nn.Parameter) -> None:
        """Both gradients of `param` are complete: update it and free them, or leave them if it is small."""
        if param in self._seen:
            raise ValueError(
                "a second backward before step(): with update_in_backward=True the first one's gradients are applied "
                "already, and cannot be accumulated; call step() after every backward, use a larger batch (with "
                "gradient checkpointing, say), or update_in_backward=False"
            )
        if getattr(param, "target_grad", None) is None:
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

    def _group(self, param: nn.Parameter) -> dict:
        return self._optimizer.param_groups[self._group_index[param]]

    def finish(self) -> None:
        """Update the small parameters, total the step's statistics and steer lambda.

        Raises:
            ValueError: a gradient that was changed since the backward; its parameter is left as it is.
        """
        waiting = [(param, version) for param, version in self._seen.items() if version is not None]
        if any(param.grad is not None and param.grad._version != version for param, version in waiting):
            raise ValueError(
                "gradients were changed between backward and step() (by clip_grad_norm_, say), when most parameters "
                "had been updated in backward already; with update_in_backward=True lower lr instead of clipping, or "
                "use update_in_backward=False"
            )
        pending = [(self._group(param), param) for param, _ in waiting if param.grad is not None]
        parts = self._parts + self._optimizer.update_params(pending)
        updated = [param for param, version in self._seen.items() if version is None]
        for _, param in pending:
            param.grad = None
            updated.append(param)
        self._parts, self._seen = [], {}
        self._optimizer.finish_step(parts, updated)


def _release(handles: list, params: list) -> None:
    for handle in handles:
        handle.remove()
    for reference in params:
        if reference() is not None:
            reference().updated_in_backward = False
