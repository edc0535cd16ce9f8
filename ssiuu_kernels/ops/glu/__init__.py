"""The gated MLP's elementwise part, `h = act(gate) * up`, and its backward with attribution statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import backends
from ..activations import check_activation
from ..checks import as_rows, check_like, check_rows, check_segment_values, make_segments
from ..native_support import why_not
from ..results import GluGrads, absent, neuron_scores
from . import native, reference

backends.register("glu_forward", "reference", reference.glu_forward)
backends.register("glu_forward", "native", native.glu_forward, why_not)
backends.register("glu_backward", "reference", reference.glu_backward)
backends.register("glu_backward", "native", native.glu_backward, why_not)


def glu_forward(gate: Tensor, up: Tensor, *, activation: str = "silu", backend: str = "auto") -> Tensor:
    """`h = act(gate) * up`; differentiable, and its backward keeps `gate` and `up` only, never `h`.

    Args:
        gate: `[T, F]` or `[B, S, F]`, float32, bfloat16, float16 or float64; columns next to each other, rows may be
            strided (a slice of a fused `gate_up` projection is read in place).
        up: like gate.
        activation: "silu", "gelu" (erf), "gelu_tanh", "relu" or "relu_squared".
        backend: "auto", "reference", "native" or "triton".

    Returns:
        `h`, shaped and typed like gate. Arithmetic is float32 inside (float64 for float64).

    Raises:
        ValueError, TypeError: arguments of another shape, type or device; a backend that cannot run.
    """
    check_rows("gate", gate)
    check_like("up", up, "gate", gate)
    h = _glu_forward(as_rows(gate), as_rows(up), check_activation(activation), backends.check_backend(backend))
    return h.view(gate.shape)


def glu_backward(
    gate: Tensor,
    up: Tensor,
    grad_h: Tensor,
    *,
    activation: str = "silu",
    segments: Tensor | None = None,
    scores: bool = False,
    recompute_h: bool = False,
    backend: str = "auto",
) -> GluGrads:
    """The gradient of `glu_forward`, and with it the attribution statistics of its neurons, in one pass.

    Moves 5 tensors of `[T, F]` (6 with `recompute_h`) and `6 * B * F` float32 scores. Since `up * grad_up` equals
    `h * grad_h`, the scores of `h` are those of `up`.

    Args:
        gate, up, grad_h: `[T, F]` or `[B, S, F]`, of one type; see `glu_forward`.
        activation: as in `glu_forward`.
        segments: int32 `[B, 2]`, start and end row of each sample in the flattened rows. Rows in no segment get their
            gradients but count in no score. Default: `[B, S, F]` is B samples of S rows, `[T, F]` one sample.
        scores: also return max, min and sum over each sample's rows of `h * grad_h` and `gate * grad_gate`.
        recompute_h: also return `h`.
        backend: as in `glu_forward`.

    Returns:
        `GluGrads`; gradients shaped and typed like gate, scores float32 `[B, F]` of the products before rounding.

    Raises:
        ValueError, TypeError: arguments of another shape, type or device; segments that overlap, go backwards or leave
            the rows; a backend that cannot run.
    """
    check_rows("gate", gate)
    check_like("up", up, "gate", gate)
    check_like("grad_h", grad_h, "gate", gate)
    check_activation(activation)
    grad_gate, grad_up, h, h_scores, gate_scores = _glu_backward(
        as_rows(gate), as_rows(up), as_rows(grad_h), make_segments(gate, segments),
        activation, scores, recompute_h, backends.check_backend(backend),
    )  # fmt: skip
    return GluGrads(
        grad_gate.view(gate.shape),
        grad_up.view(gate.shape),
        h.view(gate.shape) if recompute_h else None,
        neuron_scores(h_scores),
        neuron_scores(gate_scores),
    )


@torch.library.custom_op("ssiuu::glu_forward", mutates_args=())
def _glu_forward(gate: Tensor, up: Tensor, activation: str, backend: str) -> Tensor:
    return backends.select("glu_forward", backend, gate, up)(gate, up, activation)


@_glu_forward.register_fake
def _(gate: Tensor, up: Tensor, activation: str, backend: str) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("ssiuu::glu_backward", mutates_args=())
def _glu_backward(
    gate: Tensor,
    up: Tensor,
    grad_h: Tensor,
    segments: Tensor,
    activation: str,
    scores: bool,
    recompute_h: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if scores:
        check_segment_values(segments, gate.shape[0])
    run = backends.select("glu_backward", backend, gate, up, grad_h)
    return run(gate, up, grad_h, segments, activation, scores, recompute_h)


@_glu_backward.register_fake
def _(gate, up, grad_h, segments, activation, scores, recompute_h, backend):
    score_dtype = torch.float64 if gate.dtype == torch.float64 else torch.float32
    score_shape = (3, segments.shape[0], gate.shape[1]) if scores else (0,)
    h_scores = gate.new_empty(score_shape, dtype=score_dtype if scores else gate.dtype)
    h = gate.new_empty(gate.shape) if recompute_h else absent(gate)
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape), h, h_scores, torch.empty_like(h_scores)


def _save_inputs(ctx, inputs, output) -> None:
    gate, up, ctx.activation, ctx.backend = inputs
    ctx.save_for_backward(gate, up)


def _differentiate(ctx, grad_h: Tensor):
    gate, up = ctx.saved_tensors
    grads = glu_backward(gate, up, grad_h, activation=ctx.activation, backend=ctx.backend)
    return grads.grad_gate, grads.grad_up, None, None


_glu_forward.register_autograd(_differentiate, setup_context=_save_inputs)
