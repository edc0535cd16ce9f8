"""What a regularizer is: how it changes a method's loss, gradients or steps."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import ssiuu_kernels as sk

from ..methods.base import Batch, Method, UnlearnData
from ..optimizers import OptimizerOptions, adamw
from ..options import UnlearnOptions


class Regularizer(ABC):
    """A regularizer of any method that it can go with; this class is the one that does nothing.

    One is registered by `@register_regularizer` (registry.py). An instance belongs to one run. Where it acts is
    what it overrides: `loss` (the graph of a micro-batch), `forward_backward` (its gradients), `optimizer` (the step).

    Attributes:
        name: as the command line knows it.
        label, color: in tables and figures.
        summary: one line.
        source: where it comes from, and what in it is our choice.
        Options: a frozen dataclass, whose field names are the option names.
        model, handle, method, data: from `setup`; the model is a causal language model of transformers.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    color: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    updates_in_backward: ClassVar[bool] = False  # whether its optimizer can
    measures_gradients: ClassVar[bool] = False  # whether `metrics` has "loss_grad_norm"

    @dataclass(frozen=True)
    class Options:
        """No options."""

    def __init__(self, options: Any):
        self.options = options

    def check(self, method: Method, run: UnlearnOptions) -> None:
        """Raise a ValueError for options out of range, and for a method or run that this cannot go with.

        No model is loaded yet.
        """

    def patch_options(self, forget_samples: int) -> dict[str, Any]:
        """Arguments of `ssiuu_kernels.patch` beside those of every run."""
        return {}

    def setup(self, model: nn.Module, handle: sk.PatchHandle, method: Method, data: UnlearnData) -> None:
        """Prepare what is needed once; as for `Method.setup`, after the method's own."""
        self.model, self.handle, self.method, self.data = model, handle, method, data

    def loss(self, batch: Batch) -> Tensor:
        """The loss of a micro-batch, 0-dim, with its graph; stopped samples are not part of the method's."""
        return self.method.loss(batch.kept).value

    def forward_backward(self, run: Callable[[], Tensor]) -> Tensor:
        """Add a micro-batch's gradients to `grad`.

        Args:
            run: does so for the model as it is, and returns the loss; may be called more than once.
        """
        return run()

    def optimizer(self, params: Iterable[nn.Parameter], options: OptimizerOptions) -> torch.optim.Optimizer:
        """The run's optimizer."""
        return adamw(params, options)

    def metrics(self) -> dict[str, float]:
        """What is known of the last step, for its line."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What changes from step to step and is not in the optimizer, for checkpoints."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state."""


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that the run trains."""
    return [param for param in model.parameters() if param.requires_grad]


def refuse_bfloat16(name: str, run: UnlearnOptions, lost: str) -> None:
    """Raise a ValueError for bfloat16 weights, in which changes far below a step's round away."""
    if run.dtype == "bfloat16":
        raise ValueError(
            f"dtype='bfloat16' with regularizer={name!r}, whose {lost} are lost in the rounding of such weights; use "
            "--dtype float32 with --bf16"
        )
