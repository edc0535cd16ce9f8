"""The gated MLP's elementwise part, `h = act(gate) * up`, and its backward with attribution statistics."""

from __future__ import annotations

from torch import Tensor

from ..common.activations import check_activation
from ..common.checks import as_rows, check_like, check_rows, longest_sample, make_segments
from ..common.results import GluGrads, PackedGluGrads
from .arguments import BackwardArguments
from .dispatch import mlp_backward, mlp_forward, packed_forward
from .neuron_penalty import NeuronPenalty, check_penalty
from .outputs import grad_views


def glu_forward(gate: Tensor, up: Tensor, *, activation: str = "silu", backend: str = "auto") -> Tensor:
    """`h = act(gate) * up`; differentiable, and its backward keeps `gate` and `up` only, never `h`.

    Moves 3 tensors of `[T, F]`.

    Args:
        gate: `[T, F]` or `[B, S, F]`, float32, bfloat16, float16 or float64; columns next to each other, rows may be
            strided.
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
    return mlp_forward(gate, up, check_activation(activation), backend)


def glu_backward(
    gate: Tensor,
    up: Tensor,
    grad_h: Tensor,
    *,
    activation: str = "silu",
    segments: Tensor | None = None,
    scores: bool = False,
    recompute_h: bool = False,
    penalty: NeuronPenalty | None = None,
    backend: str = "auto",
) -> GluGrads:
    """The gradient of `glu_forward`, and with it the attribution statistics of its neurons, in one pass.

    Moves 5 tensors of `[T, F]` (6 with `recompute_h`) and `6 * B * F` float32 scores; the penalty adds `2 * B * F`, and
    reads the three inputs twice where a sample's rows do not fit on chip. Since `up * grad_up` equals `h * grad_h`, the
    scores of `h` are those of `up`.

    Args:
        gate, up, grad_h: `[T, F]` or `[B, S, F]`, of one type; see `glu_forward`.
        activation: as in `glu_forward`.
        segments: int32 `[B, 2]`, start and end row of each sample in the flattened rows. Rows in no segment get their
            gradients but count in no score. Default: `[B, S, F]` is B samples of S rows, `[T, F]` one sample.
        scores: also return max, min and sum over each sample's rows of `h * grad_h` and `gate * grad_gate`.
        recompute_h: also return `h`.
        penalty: also add the gradient of the penalty on neurons, and update its bank.
        backend: as in `glu_forward`.

    Returns:
        `GluGrads`; gradients shaped and typed like gate, scores float32 `[B, F]` of the products before rounding, and
        of grad_h as it arrived, without the penalty.

    Raises:
        ValueError, TypeError: arguments of another shape, type or device; segments that overlap, go backwards or leave
            the rows; a backend that cannot run.
    """
    check_rows("gate", gate)
    check_like("up", up, "gate", gate)
    check_like("grad_h", grad_h, "gate", gate)
    check_activation(activation)
    longest = longest_sample(gate, segments)
    segments = make_segments(gate, segments)
    check_penalty(penalty, gate, segments)
    arguments = BackwardArguments(
        as_rows(gate), as_rows(up), as_rows(grad_h), segments, activation,
        scores=scores, recompute_h=recompute_h, longest=longest, penalty=penalty,
    )  # fmt: skip
    grads, h, h_scores, gate_scores = mlp_backward(arguments, backend)
    grad_gate, grad_up = (grad.view(gate.shape) for grad in grad_views(grads, packed=False))
    return GluGrads(grad_gate, grad_up, h.view(gate.shape) if recompute_h else None, h_scores, gate_scores)


def packed_glu_forward(gate_up: Tensor, *, activation: str = "silu", backend: str = "auto") -> Tensor:
    """`glu_forward` of a fused `gate_up_proj`'s output: the first half is gate, the second up, both read in place.

    Args:
        gate_up: `[T, 2F]` or `[B, S, 2F]`; types as in `glu_forward`.
        activation, backend: as in `glu_forward`.

    Returns:
        `h`, `[T, F]` or `[B, S, F]`; differentiable.

    Raises:
        ValueError, TypeError: as `glu_forward`; an odd number of columns.
    """
    _check_packed(gate_up)
    return packed_forward(gate_up, check_activation(activation), backend)


def packed_glu_backward(
    gate_up: Tensor,
    grad_h: Tensor,
    *,
    activation: str = "silu",
    segments: Tensor | None = None,
    scores: bool = False,
    recompute_h: bool = False,
    penalty: NeuronPenalty | None = None,
    backend: str = "auto",
) -> PackedGluGrads:
    """`glu_backward` of a fused `gate_up_proj`'s output; both gradients are written into one tensor, without copies.

    Args:
        gate_up: `[T, 2F]` or `[B, S, 2F]`.
        grad_h: `[T, F]` or `[B, S, F]`, typed like gate_up.
        activation, segments, scores, recompute_h, penalty, backend: as in `glu_backward`.

    Returns:
        `PackedGluGrads`.

    Raises:
        ValueError, TypeError: as `glu_backward`; an odd number of columns.
    """
    _check_packed(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    check_like("grad_h", grad_h, "half of gate_up", gate)
    check_activation(activation)
    longest = longest_sample(gate, segments)
    segments = make_segments(gate, segments)
    check_penalty(penalty, gate, segments)
    arguments = BackwardArguments(
        as_rows(gate), as_rows(up), as_rows(grad_h), segments, activation,
        scores=scores, recompute_h=recompute_h, packed=True, longest=longest, penalty=penalty,
    )  # fmt: skip
    grads, h, h_scores, gate_scores = mlp_backward(arguments, backend)
    h = h.view(grad_h.shape) if recompute_h else None
    return PackedGluGrads(grads.view(gate_up.shape), h, h_scores, gate_scores)


def _check_packed(gate_up: Tensor) -> None:
    check_rows("gate_up", gate_up)
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up has shape {list(gate_up.shape)}; expected an even number of columns, gate then up")
