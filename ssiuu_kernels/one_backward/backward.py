"""The one backward: the loss's derivatives by the log-likelihoods arrive, and the unit gradients go down."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .graph import Part, Versions


class OneBackward:
    """What stands between the objective's graph and the model's, which it walks by itself, once.

    Args:
        parts: the forwards that make up the loss; their nodes are claimed (`inspect_graph`).
        factor: `d target_b / d s_b`, 0 for samples that are not penalised; `[N]` over all parts.
        versions: of the parameters.
    """

    def __init__(self, parts: Sequence[Part], factor: Tensor, versions: Versions):
        self._parts: Sequence[Part] | None = parts
        self._factor, self._versions = factor, versions

    def attach(self) -> Tensor:
        """The log-likelihoods `[N]` as a leaf, for the objective; the backward of its value runs `run`.

        The model's graph is not below it, so that another loss on the same logits cannot add to the unit gradients.
        """
        leaf = torch.cat([part.log_probs.detach() for part in self._parts]).requires_grad_()
        return _Start.apply(leaf, self)

    def run(self, weights: Tensor) -> None:
        """Fill `grad` and `target_grad`, `weights` `[N]` being the derivatives of the loss by the log-likelihoods.

        Raises:
            RuntimeError: a second call, a later loss on the same forward, or a parameter edited since the forward;
                nothing is changed then.
        """
        if self._parts is None:
            raise RuntimeError(
                "backward was called a second time on one unlearning loss, whose gradients are in grad and target_grad "
                "already; call unlearning_loss again for another"
            )
        if any(part.weights.superseded for part in self._parts):
            raise RuntimeError(
                "another unlearning loss was made from the same forward since, and its backward is the one that can "
                "run; run the model again for a second loss. Nothing was changed"
            )
        self._versions.check()
        parts, self._parts = self._parts, None
        weights, factor = weights.to(self._factor.dtype), self._factor
        unit = ((weights != 0) | (factor != 0)).to(factor.dtype)
        sizes = [len(part.log_probs) for part in parts]
        split = [tensor.split(sizes) for tensor in (weights, factor, unit)]
        host = torch.stack([weights, factor]).tolist()  # the one read on the host: which products are needed
        start = 0
        for part, loss, target, size in zip(parts, *split[:2], sizes, strict=True):
            part.weights.arm(loss, target, *(values[start : start + size] for values in host))
            start += size
        try:
            signals = [part.signal(signal) for part, signal in zip(parts, split[2], strict=True)]
            torch.autograd.backward([part.logits for part in parts], signals)
        finally:
            for part in parts:
                part.weights.disarm()


class _Start(torch.autograd.Function):
    """The identity; its backward is `OneBackward.run`."""

    @staticmethod
    def forward(ctx, leaf: Tensor, run: OneBackward) -> Tensor:
        ctx.run = run
        return leaf.view_as(leaf)

    @staticmethod
    @once_differentiable
    def backward(ctx, weights: Tensor):
        ctx.run.run(weights)
        return None, None
