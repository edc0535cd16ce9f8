"""How attribution is read out of a backward pass: identity-like autograd functions that score what flows through."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from .ops import NeuronScores, glu_backward, glu_forward, token_scores


class Recorder:
    """Collects the `NeuronScores` of one backward pass, by module name and tensor kind.

    Args:
        segments: int32 `[B, 2]`, the rows of each sample in the flattened `[B * S, D]`.
        backend: backend of the ops.
    """

    def __init__(self, segments: Tensor, backend: str):
        self.segments = segments
        self.backend = backend
        self.found: dict[str, dict[str, NeuronScores]] = defaultdict(dict)

    def add(self, name: str, kind: str, scores: NeuronScores) -> None:
        # A module called twice in one forward has its tokens in both calls.
        old = self.found[name].get(kind)
        if old is not None:
            scores = NeuronScores(old.max.maximum(scores.max), old.min.minimum(scores.min), old.sum + scores.sum)
        self.found[name][kind] = scores


class RecordedGlu(torch.autograd.Function):
    """`glu_forward` whose backward also records the scores of `h` and `gate`."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, activation: str, recorder: Recorder, name: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation, ctx.recorder, ctx.name = activation, recorder, name
        return glu_forward(gate, up, activation=activation, backend=recorder.backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_h: Tensor):
        recorder = ctx.recorder
        grads = glu_backward(
            *ctx.saved_tensors, grad_h,
            activation=ctx.activation, segments=recorder.segments, scores=True, backend=recorder.backend,
        )  # fmt: skip
        recorder.add(ctx.name, "h", grads.h_scores)
        recorder.add(ctx.name, "gate", grads.gate_scores)
        return grads.grad_gate, grads.grad_up, None, None, None


class RecordedOutput(torch.autograd.Function):
    """The identity, whose backward records the scores of the tensor that passes through."""

    @staticmethod
    def forward(ctx, z: Tensor, recorder: Recorder, name: str, kind: str) -> Tensor:
        ctx.save_for_backward(z)
        ctx.recorder, ctx.name, ctx.kind = recorder, name, kind
        return z.view_as(z)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_z: Tensor):
        (z,) = ctx.saved_tensors
        scores = token_scores(z, grad_z, segments=ctx.recorder.segments, backend=ctx.recorder.backend)
        ctx.recorder.add(ctx.name, ctx.kind, scores)
        return grad_z, None, None, None
