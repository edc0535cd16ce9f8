"""How attribution is read out of a backward pass."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from ..gradients.one_backward.row_weights import Lead
from ..modules.mlp import Form
from ..ops import NeuronScores, token_scores
from .row_proof import RowProof


class Recorder:
    """Collects the `NeuronScores` of one backward pass, by module name and tensor kind.

    Args:
        segments: int32 `[B, 2]`, the rows of each sample in the flattened `[B * S, D]`.
        batch: (B, S).
        backend: backend of `token_scores`.

    Attributes:
        expected: (module name, kind) -> leading shapes of the tensors that a gradient should come back to.
        proof: gets the signals of the backward too; None: it does not.
        proving: whether the backward is the weighted one, of which nothing is recorded.
    """

    def __init__(self, segments: Tensor, batch: tuple[int, int], backend: str):
        self.segments, self.backend = segments, backend
        self.found: dict[str, dict[str, NeuronScores]] = defaultdict(dict)
        self.expected: dict[tuple[str, str], set[Lead]] = defaultdict(set)
        self.proof: RowProof | None = None
        self.proving = False
        self._rows = (batch, (batch[0] * batch[1],))

    def enter(self, name: str, lead: Lead, connected: bool) -> None:
        """See `modules.mlp.Observer`."""
        self.expect(name, "h", lead, connected)

    def expect(self, name: str, kind: str, lead: Lead, connected: bool) -> None:
        """Note a tensor on the batch's rows; other rows that depend on the batch's tokens are refused."""
        if connected and lead not in self._rows:
            raise ValueError(
                f"{name} ran on rows {list(lead)}; expected those of the batch, {list(self._rows[0])}, or one row per "
                "token: it is not known to which sample each row belongs"
            )
        if lead in self._rows and (connected or not torch.is_grad_enabled()):
            self.expected[name, kind].add(lead)

    def bypassed(self, name: str, why: str) -> None:
        """See `modules.mlp.Observer`."""
        raise ValueError(f"{name} cannot be attributed: {why}")

    def check_complete(self) -> None:
        """Raise a ValueError where a module ran on the batch's rows, and no gradient came back."""
        missing = [name for name, kind in self.expected if kind not in self.found[name]]
        if missing or not self.expected:
            raise ValueError(
                f"{missing[0] if missing else 'every patched module'} got no gradient back from the answers: it is "
                "compiled, runs under torch.no_grad, or is detached from the token embeddings or from the logits"
            )

    def backward(self, name: str, form: Form, inputs: tuple[Tensor, ...], grad_h: Tensor, options: dict) -> tuple:
        """The gradients of a hidden activation's inputs; records its scores. See `modules.mlp.Observer`."""
        if self._prove(name, grad_h):
            return form.backward(*inputs, grad_h, **options).inputs
        grads = form.backward(*inputs, grad_h, segments=self.segments, scores=True, **options)
        for kind, scores in grads.scores.items():
            self._add(name, kind, scores)
        return grads.inputs

    def output(self, name: str, kind: str, z: Tensor, grad_z: Tensor) -> None:
        """Record the scores of a module's output."""
        if not self._prove(f"{name}, {kind},", grad_z):
            self._add(name, kind, token_scores(z, grad_z, segments=self.segments, backend=self.backend))

    def _prove(self, name: str, signal: Tensor) -> bool:
        if self.proof is not None:
            self.proof.add(name, signal, weighted=self.proving)
        return self.proving

    def _add(self, name: str, kind: str, scores: NeuronScores) -> None:
        # A module called twice in one forward has its tokens in both calls.
        old = self.found[name].get(kind)
        if old is not None:
            scores = NeuronScores(old.max.maximum(scores.max), old.min.minimum(scores.min), old.sum + scores.sum)
        self.found[name][kind] = scores


class RecordedOutput(torch.autograd.Function):
    """A copy, whose backward records the scores of the tensor that passes through."""

    @staticmethod
    def forward(ctx, z: Tensor, recorder: Recorder, name: str, kind: str) -> Tensor:
        ctx.save_for_backward(z)
        ctx.recorder, ctx.place = recorder, (name, kind)
        return z.clone()  # some models add to a module's output in place (Falcon), and z has to stay as it is

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_z: Tensor):
        (z,) = ctx.saved_tensors
        ctx.recorder.output(*ctx.place, z, grad_z)
        return grad_z, None, None, None


def recorded_output(z: Tensor, recorder: Recorder, name: str, kind: str) -> Tensor:
    """`z`, whose scores the recorder gets in the backward."""
    if not isinstance(z, Tensor):
        raise ValueError(f"{name}, {kind}, gives a {type(z).__name__}; expected a tensor, whose rows can be told apart")
    recorder.expect(name, kind, tuple(z.shape[:-1]), torch.is_grad_enabled() and z.requires_grad)
    return RecordedOutput.apply(z, recorder, name, kind)
