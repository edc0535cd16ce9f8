"""How attribution is read out of a backward pass."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from .hidden import Form
from .ops import NeuronScores, token_scores


class Recorder:
    """Collects the `NeuronScores` of one backward pass, by module name and tensor kind.

    Args:
        segments: int32 `[B, 2]`, the rows of each sample in the flattened `[B * S, D]`.
        backend: backend of `token_scores`.
    """

    def __init__(self, segments: Tensor, backend: str):
        self.segments = segments
        self.backend = backend
        self.found: dict[str, dict[str, NeuronScores]] = defaultdict(dict)

    def add(self, name: str, kind: str, scores: NeuronScores) -> None:
        """Keep the scores of a module's tensor."""
        # A module called twice in one forward has its tokens in both calls.
        old = self.found[name].get(kind)
        if old is not None:
            scores = NeuronScores(old.max.maximum(scores.max), old.min.minimum(scores.min), old.sum + scores.sum)
        self.found[name][kind] = scores

    def backward(self, name: str, form: Form, inputs: tuple[Tensor, ...], grad_h: Tensor, options: dict) -> tuple:
        """The gradients of a hidden activation's inputs; records its scores. See `hidden.Observer`."""
        grads = form.backward(*inputs, grad_h, segments=self.segments, scores=True, **options)
        for kind, scores in grads.scores.items():
            self.add(name, kind, scores)
        return grads.inputs


class RecordedOutput(torch.autograd.Function):
    """A copy, whose backward records the scores of the tensor that passes through."""

    @staticmethod
    def forward(ctx, z: Tensor, recorder: Recorder, name: str, kind: str) -> Tensor:
        ctx.save_for_backward(z)
        ctx.recorder, ctx.name, ctx.kind = recorder, name, kind
        return z.clone()  # some models add to a module's output in place (Falcon), and z has to stay as it is

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_z: Tensor):
        (z,) = ctx.saved_tensors
        scores = token_scores(z, grad_z, segments=ctx.recorder.segments, backend=ctx.recorder.backend)
        ctx.recorder.add(ctx.name, ctx.kind, scores)
        return grad_z, None, None, None
