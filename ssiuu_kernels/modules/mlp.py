"""The MLP's hidden activation `h` as one autograd node, whose backward an observer carries out."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable, which imports dynamo at once

from ..gradients.one_backward.row_weights import Lead
from ..ops import (
    NeuronScores,
    act_backward,
    act_forward,
    glu_backward,
    glu_forward,
    packed_glu_backward,
    packed_glu_forward,
)


class HiddenGrads(NamedTuple):
    """What an observer gets of the backward.

    Attributes:
        inputs: gradients of the form's inputs.
        scores: kind -> `NeuronScores`, empty where not asked for.
    """

    inputs: tuple[Tensor, ...]
    scores: dict[str, NeuronScores]


class Form(NamedTuple):
    """How `h` comes about: `forward(*inputs, activation, backend)`, differentiable, and its backward."""

    forward: Callable[..., Tensor]
    backward: Callable[..., HiddenGrads]


def _gated_backward(gate: Tensor, up: Tensor, grad_h: Tensor, **options) -> HiddenGrads:
    grads = glu_backward(gate, up, grad_h, **options)
    return HiddenGrads((grads.grad_gate, grads.grad_up), _named(h=grads.h_scores, gate=grads.gate_scores))


def _packed_backward(gate_up: Tensor, grad_h: Tensor, **options) -> HiddenGrads:
    grads = packed_glu_backward(gate_up, grad_h, **options)
    return HiddenGrads((grads.grad_gate_up,), _named(h=grads.h_scores, gate=grads.gate_scores))


def _ungated_backward(x: Tensor, grad_h: Tensor, **options) -> HiddenGrads:
    grads = act_backward(x, grad_h, **options)
    return HiddenGrads((grads.grad_x,), _named(h=grads.h_scores, up=grads.x_scores))


def _named(**scores: NeuronScores | None) -> dict[str, NeuronScores]:
    return {kind: found for kind, found in scores.items() if found is not None}


FORMS = {
    "gated": Form(glu_forward, _gated_backward),
    "packed": Form(packed_glu_forward, _packed_backward),
    "ungated": Form(act_forward, _ungated_backward),
}


class Observer(Protocol):
    """Who looks at, or changes, the backward of the hidden activations."""

    def enter(self, name: str, lead: Lead, connected: bool) -> None:
        """A hidden activation is about to be computed, of inputs of this leading shape.

        `connected`: a gradient can come back to its inputs.
        """

    def bypassed(self, name: str, why: str) -> None:
        """A patched module ran its class's own forward, in which nothing can be observed."""

    def backward(self, name: str, form: Form, inputs: tuple[Tensor, ...], grad_h: Tensor, options: dict) -> tuple:
        """The gradients of `inputs`; `options` are activation and backend."""


class ObservedHidden(torch.autograd.Function):
    """`Form.forward`, whose backward is the observer's: of the node, so that one graph can have another observer."""

    @staticmethod
    def forward(ctx, observer: Observer, name: str, form: Form, options: dict, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        ctx.observer, ctx.mlp_name, ctx.form, ctx.options = observer, name, form, options
        ctx.lead = tuple(inputs[0].shape[:-1])
        return form.forward(*inputs, **options)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_h: Tensor):
        grads = ctx.observer.backward(ctx.mlp_name, ctx.form, ctx.saved_tensors, grad_h, ctx.options)
        return None, None, None, None, *grads


def observed_hidden(observer: Observer, name: str, form: Form, options: dict, inputs: tuple[Tensor, ...]) -> Tensor:
    """`h` of `[T, D]` or `[B, S, D]` inputs, whose backward the observer carries out."""
    # A compiled layer steps out of its graph here: a node that is traced would belong to no observer.
    run = _uncompiled if torch.compiler.is_compiling() else _observed_hidden
    return run(observer, name, form, options, inputs)


def _observed_hidden(observer: Observer, name: str, form: Form, options: dict, inputs: tuple[Tensor, ...]) -> Tensor:
    connected = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    observer.enter(name, tuple(inputs[0].shape[:-1]), connected)
    return ObservedHidden.apply(observer, name, form, options, *inputs)


_uncompiled = _disable_dynamo(_observed_hidden)
