"""The arguments of an MLP's backward, which every backend takes as one record."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .neuron_penalty import NeuronPenalty


class BackwardArguments(NamedTuple):
    """What the backward of `h = act(x) * up`, or of `h = act(x)`, is computed from; checked.

    Attributes:
        x: `[T, F]`, the activation's argument: the gate of a gated MLP, the up projection's output of an ungated one.
        up: `[T, F]`; None without a gate.
        grad_h: `[T, F]`, the gradient with respect to h.
        segments: int32 `[B, 2]`, start and end row of each sample.
        activation: a name of `ACTIVATIONS`.
        scores: whether the scores of h and x are wanted.
        recompute_h: whether h is wanted.
        packed: whether the two gradients are one tensor, `[T, 2, F]`.
        longest: rows of the longest sample, or 0: not known on the host. Kernels then keep nothing of it on chip.
        penalty: on neurons; its bank is updated.
    """

    x: Tensor
    up: Tensor | None
    grad_h: Tensor
    segments: Tensor
    activation: str
    scores: bool = False
    recompute_h: bool = False
    packed: bool = False
    longest: int = 0
    penalty: NeuronPenalty | None = None
