"""SSIUU: the penalty on growing negative attribution of parameters (Eq. 6-14, Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import ssiuu_kernels as sk
from ssiuu_kernels.log_probs import check_target
from ssiuu_kernels.ops.common.precision import LARGEST
from ssiuu_kernels.optim.param_groups import ANCHORS, ORIGINAL, PREVIOUS

from ..methods.base import Batch, LikelihoodMethod, Method, UnlearnData
from ..optimizers import OptimizerOptions, check_update_in_backward
from ..options import UnlearnOptions
from .base import Regularizer
from .original import OriginalAttributions
from .registry import register_regularizer

ORIGINAL_BYTES = 4 << 30  # of the original attributions of each forget fact, at most


def check_penalty(weight: float, target: str) -> None:
    """Raise a ValueError for a lambda out of range or an unknown target."""
    check_target(target)
    if not 0 <= weight < math.inf:
        raise ValueError(f"penalty_weight={weight}; expected at least 0")
    if weight > LARGEST:
        raise ValueError(f"penalty_weight={weight}; expected at most {LARGEST:g}")


def forget_per_step(run: UnlearnOptions, facts: int) -> int:
    """Forget samples in an optimizer step of this run, for a forget set of this size."""
    return (run.forget_batch or facts) * run.accumulate


@register_regularizer
class Ssiuu(Regularizer):
    """`J = L + lambda R_t` on every trainable scalar of a model; L is any method's loss.

    A fact that left the loss (`StoppedFacts`) stays in the penalty: `R_t` compares `A_t = phi sum_b dP_b/dphi` with
    `A_{t-1}`, and sums over different facts would differ by the facts that came and went, whatever the parameters do.
    So what a step compares is what it would compare without per-fact stopping, and a forgotten fact is still watched.
    """

    name, label, color = "ssiuu", "SSIUU", "#0072b2"
    summary = "penalty on growing negative attribution of parameters"
    source = "the paper (Algorithm 1); penalty_share, other targets and other methods than gd are ours"
    updates_in_backward = measures_gradients = True

    @dataclass(frozen=True)
    class Options:
        """
        Attributes:
            penalty_weight: lambda, or where a steered lambda starts. Paper: 1e-3 (FaithUn), 1e-4 (TOFU).
            penalty_share: steer lambda so that this share of the parameters of negative attribution has a penalty
                gradient above its loss gradient; None keeps lambda fixed, as in the paper.
            target: attributed quantity: "prob" (the paper), "geometric_mean_prob" or "log_prob".
            anchor: what A_t is compared with: "previous", A of the step before (Algorithm 1), or "original", A of the
                model before unlearning over the same facts (the "original level" of the paper's text).
        """

        penalty_weight: float = 1e-3
        penalty_share: float | None = None
        target: str = "prob"
        anchor: str = PREVIOUS

    def check(self, method: Method, run: UnlearnOptions) -> None:
        check_penalty(self.options.penalty_weight, self.options.target)
        share = self.options.penalty_share
        if share is not None and not 0 < share < 1:
            raise ValueError(f"penalty_share={share}; expected a fraction between 0 and 1")
        if self.options.anchor not in ANCHORS:
            raise ValueError(f"anchor={self.options.anchor!r} is unknown; expected one of {', '.join(ANCHORS)}")
        if run.update_in_backward:
            check_update_in_backward(run.accumulate)
        self.run = run

    def setup(self, model: nn.Module, handle: sk.PatchHandle, method: Method, data: UnlearnData) -> None:
        """As for `Regularizer.setup`.

        Raises:
            ValueError: the original attributions of each fact are needed, and are larger than ORIGINAL_BYTES.
        """
        super().setup(model, handle, method, data)
        self._seen: list[int] = []  # forget facts of the step so far
        self._original: OriginalAttributions | None = None
        number = forget_per_step(self.run, len(data.forget))
        if self.options.anchor == ORIGINAL and number % len(data.forget):  # steps sum A over different facts
            size = OriginalAttributions.size(model, data)
            if size > ORIGINAL_BYTES:
                raise ValueError(
                    f"anchor='original' would keep {size / 2**30:.1f} GiB on the CPU, the attributions of each of the "
                    f"{len(data.forget)} forget facts, since a step sees {number} forget samples (--forget-batch 0 "
                    f"--accumulate 1 would see every fact); expected at most {ORIGINAL_BYTES / 2**30:g} GiB "
                    "(ORIGINAL_BYTES): use --anchor previous, or fewer facts"
                )
            self._original = OriginalAttributions(model, data, self.options.target)

    def loss(self, batch: Batch) -> Tensor:
        self._set_anchor(batch)
        target = self.options.target
        if isinstance(self.method, LikelihoodMethod):
            logits, objective = self.method.forward(batch), self.method.objective_of_kept(batch)
            return self.handle.unlearning_loss(logits, batch.labels, batch.forget, objective, target)
        value, logits = self.method.loss(batch.kept)
        if logits is None:
            parts = [batch.only(batch.forget) if bool(batch.forget.any()) else batch]
            forwards = [self.method.forward(parts[0])]
        else:
            parts, forwards = [batch.kept], [logits]
            if bool(batch.stopped.any()):
                parts.append(batch.only(batch.stopped))
                forwards.append(self.method.forward(parts[1]))
        forget = torch.cat([part.forget for part in parts])
        return value + self.handle.target_term(forwards, [part.labels for part in parts], forget, target)

    def _set_anchor(self, batch: Batch) -> None:
        """Give the optimizer A of the original model over the step's facts so far.

        Before the backward, in which parameters may be updated. The first step measures A of the original model itself,
        and penalises nothing.
        """
        if self._original is None:
            return
        self._seen += batch.ids[batch.forget].tolist()
        if self._seen and self.adamw.state:
            self.adamw.set_anchor(self._original.sum_over(self._seen))

    def optimizer(self, params: Iterable[nn.Parameter], options: OptimizerOptions) -> torch.optim.Optimizer:
        self.adamw = sk.SsiuuAdamW(
            params,
            lr=options.learning_rate,
            weight_decay=options.weight_decay,
            penalty_weight=self.options.penalty_weight,
            penalty_share=self.options.penalty_share,
            update_in_backward=options.update_in_backward,
            stochastic_rounding=options.stochastic_rounding,
            seed=options.seed,
            anchor=self.options.anchor,
        )
        self.adamw.register_step_post_hook(lambda *_: self._seen.clear())
        return self.adamw

    def metrics(self) -> dict[str, float]:
        stats = self.adamw.last_stats
        return {
            "loss_grad_norm": stats.loss_grad_norm.item(),
            "penalty_grad_norm": stats.penalty_grad_norm.item(),
            "penalty": stats.value.item(),
            "share": stats.share.item(),
            "lambda": self.adamw.last_weight,
        }
