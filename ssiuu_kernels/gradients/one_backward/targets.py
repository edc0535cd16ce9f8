"""The way of the target gradients from the functions that form them to their parameters."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from ..target_grad import TargetGradInfo, add_target_grad, drop_target_grad, info_of

logger = logging.getLogger(__name__)
_warned = False


class Targets:
    """The parameters that get a target gradient in the backward of one loss.

    Args:
        params: with a gradient.
    """

    def __init__(self, params: Iterable[nn.Parameter]):
        self.params = {id(param): param for param in params}
        self._held: dict[int, Tensor | None] = {}

    def __contains__(self, param: object) -> bool:
        return id(param) in self.params

    @property
    def updated_in_backward(self) -> bool:
        """Whether an optimizer updates some of the parameters during the backward."""
        return any(getattr(param, "updated_in_backward", False) for param in self.params.values())

    def begin(self, samples: int, scale: Tensor) -> None:
        """Drop target gradients whose `grad` is gone, and say what this backward is.

        Args:
            samples: forget samples of the loss.
            scale: by which the loss was multiplied, 0-dim.

        Raises:
            ValueError: it was multiplied, and parameters are updated in backward; nothing is changed then.
        """
        if (
            self.updated_in_backward and scale != 1 and scale.isfinite()
        ):  # a loss that diverged is told by its gradients
            raise ValueError(
                f"the loss was multiplied by {scale.item():g} (by a GradScaler, say) and parameters are updated in its "
                "backward, before anything can divide their gradients; put the factor into the objective, train in "
                "bfloat16 without a GradScaler, or use update_in_backward=False"
            )
        task = torch._C._current_graph_task_id()
        for param in self.params.values():
            before = info_of(param)
            # Another loss of this very backward may have come before its `grad`.
            if (before is None or before.task != task) and _is_stale(param):
                drop_target_grad(param)
                before = None
            if before is not None and before.samples and samples:
                self._warn_of_sum(scale)
            param.target_grad_info = TargetGradInfo(samples + (before.samples if before else 0), None, scale, task)
        Variable._execution_engine.queue_callback(self._note_versions)  # when all of this backward is done

    @contextmanager
    def through_hooks(self) -> Iterator[None]:
        """Bring target gradients through the hooks of their parameters (masks, say), as autograd brings `grad`.

        A hook is given the sum of a whole backward. So the parts of a parameter that has one are held until autograd
        calls its hooks with the loss's gradient; every other parameter gets each part at once.
        """
        hooked = [param for param in self.params.values() if param._backward_hooks]
        self._held = dict.fromkeys(map(id, hooked))
        handles = [param.register_hook(self._release(param)) for param in hooked]
        try:
            yield
        finally:
            self._held = {}
            for handle in handles:
                handle.remove()

    def _warn_of_sum(self, scale: Tensor) -> None:
        """Once: micro-batches whose losses are added up as they are."""
        global _warned
        if not _warned and scale == 1:
            _warned = True
            logger.warning(
                "the losses of several micro-batches are added up without being divided by their number: dL grows with "
                "it and the target gradient does not, which weakens the penalty; divide each loss by the number of "
                "micro-batches (in transformers' Trainer: trainer.model_accepts_loss_kwargs = False)"
            )

    def add(self, param: Tensor, grad: Tensor) -> None:
        """Take one part."""
        if id(param) in self._held:
            before = self._held[id(param)]
            self._held[id(param)] = grad if before is None else before + grad
        else:
            add_target_grad(param, grad)

    def _release(self, param: Tensor):
        """A hook that runs after the user's: the parts are complete when autograd has summed the loss's gradient."""

        def release(_grad: Tensor) -> None:
            grad = self._held.pop(id(param), None)
            if grad is not None:
                hooks = [hook for hook in param._backward_hooks.values() if hook is not release]
                add_target_grad(param, _through(hooks, grad))

        return release

    def add_all(self, grads_of: Callable[[list[nn.Parameter]], Sequence[Tensor | None]]) -> None:
        """Take whole target gradients, which `grads_of` makes; the parameters' hooks see these, and no other."""
        params = list(self.params.values())
        hooks = [dict(param._backward_hooks or {}) for param in params]
        try:
            for param, own in zip(params, hooks, strict=True):
                if own:
                    param._backward_hooks.clear()
            grads = grads_of(params)
        finally:
            for param, own in zip(params, hooks, strict=True):
                if own:
                    param._backward_hooks.update(own)
        for param, own, grad in zip(params, hooks, grads, strict=True):
            if grad is not None:
                add_target_grad(param, _through(own.values(), grad))

    def add_zero_grads(self) -> None:
        """Give a `grad` of 0 to parameters that have a target gradient alone: the loss does not depend on them.

        The penalty does, and a parameter without a `grad` would be skipped by optimizers.
        """
        for param in self.params.values():
            if param.grad is None and getattr(param, "target_grad", None) is not None:
                param.grad = torch.zeros_like(param.target_grad)

    def _note_versions(self) -> None:
        for param in self.params.values():
            info = info_of(param)
            if info is not None and param.grad is not None:
                info.grad_version = param.grad._version


def _through(hooks: Iterable[Callable], grad: Tensor) -> Tensor:
    for hook in hooks:
        changed = hook(grad)
        grad = grad if changed is None else changed
    return grad


def _is_stale(param: Tensor) -> bool:
    """Whether the target gradient is of a step that was abandoned: `model.zero_grad()` clears `grad` alone."""
    info = info_of(param)
    if param.grad is None:
        return True
    zeroed_or_clipped = info is not None and info.grad_version != param.grad._version
    return zeroed_or_clipped and not bool(param.grad.any())
