"""SSIUU on neurons: the penalty on growing negative attribution as Eq. 3 has it, on the MLPs' hidden activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import ssiuu_kernels as sk

from ..methods.base import Batch, LikelihoodMethod, Method, UnlearnData
from ..methods.registry import methods
from ..optimizers import OptimizerOptions
from ..options import UnlearnOptions
from .base import Regularizer
from .registry import register_regularizer
from .ssiuu import check_penalty, forget_per_step


@register_regularizer
class SsiuuNeuron(Regularizer):
    """`J = L + lambda sum_b sum_{i: A<0} (A_{t,b,i} - A_{t-1,b,i})^2` on the neurons i of every MLP.

    `A_{b,i} = sum over tokens of h dP_b/dh`, compared with the same fact's last value, of whichever step that was. The
    backward of the loss adds the penalty's gradient to `grad`, and plain AdamW follows; so the gradient norm that is
    logged is that of J.

    A fact that left the loss (`StoppedFacts`) has no gradient to be measured by. Back again, it is compared with the
    value that it left with.

    The last values are float32 `[forget facts, neurons]` for each MLP, beside the model.
    """

    name, label, color = "ssiuu-neuron", "SSIUU (neurons)", "#332288"
    summary = "penalty on growing negative attribution of MLP neurons"
    source = "Eq. 3 of the paper as written, which its Algorithm 1 replaces by parameters; ours: MLP neurons, each fact"

    @dataclass(frozen=True)
    class Options:
        """
        Attributes:
            penalty_weight: lambda. Ours: 1e-3, which the paper has for its penalty on parameters.
            target: attributed quantity: "prob" (the paper), "geometric_mean_prob" or "log_prob".
        """

        penalty_weight: float = 1e-3
        target: str = "prob"

    def check(self, method: Method, run: UnlearnOptions) -> None:
        check_penalty(self.options.penalty_weight, self.options.target)
        if not isinstance(method, LikelihoodMethod):
            able = ", ".join(name for name, kind in methods().items() if issubclass(kind, LikelihoodMethod))
            raise ValueError(
                f"regularizer={self.name!r} goes with losses that are functions of the answers' log-likelihoods, and "
                f"method {method.name!r} has another; expected one of {able}, or --regularizer ssiuu"
            )
        self.run = run

    def patch_options(self, forget_samples: int) -> dict[str, Any]:
        return {
            "level": "neuron",
            "penalty_weight": self.options.penalty_weight,
            "forget_samples": forget_samples,
        }

    def setup(self, model: nn.Module, handle: sk.PatchHandle, method: Method, data: UnlearnData) -> None:
        """As for `Regularizer.setup`.

        Raises:
            ValueError: steps that may see a fact twice, the second time compared with the same step's value.
        """
        super().setup(model, handle, method, data)
        facts, number = len(data.forget), forget_per_step(self.run, len(data.forget))
        if facts % number:
            raise ValueError(
                f"a step has {number} forget samples (forget_batch times accumulate), which does not divide the "
                f"{facts} forget facts: some step would see a fact twice, and regularizer={self.name!r} compares each "
                "with its value of an earlier step; choose another --forget-batch or --accumulate"
            )
        self._penalty = self._last_penalty = 0.0

    def loss(self, batch: Batch) -> Tensor:
        batch = batch.kept
        objective = self.method.objective(batch)
        return self.handle.unlearning_loss(
            self.method.forward(batch), batch.labels, batch.forget, objective, self.options.target, sample_ids=batch.ids
        )

    def forward_backward(self, run: Callable[[], Tensor]) -> Tensor:
        loss = run()
        self._penalty = self._penalty + self.handle.neurons.value
        return loss

    def optimizer(self, params: Iterable[nn.Parameter], options: OptimizerOptions) -> torch.optim.Optimizer:
        made = super().optimizer(params, options)
        made.register_step_post_hook(self._end_step)
        return made

    def _end_step(self, *_) -> None:
        self._last_penalty, self._penalty = self._penalty, 0.0

    def metrics(self) -> dict[str, float]:
        return {"penalty": float(self._last_penalty), "lambda": self.options.penalty_weight}

    def state_dict(self) -> dict[str, Any]:
        return self.handle.neurons.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.handle.neurons.load_state_dict(state)
