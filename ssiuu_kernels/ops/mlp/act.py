"""The ungated MLP's elementwise part, `h = act(x)`, and its backward with attribution statistics."""

from __future__ import annotations

from torch import Tensor

from ..common.activations import check_activation
from ..common.checks import as_rows, check_like, check_rows, longest_sample, make_segments
from ..common.results import ActGrads
from .arguments import BackwardArguments
from .dispatch import mlp_backward, mlp_forward
from .neuron_penalty import NeuronPenalty, check_penalty


def act_forward(x: Tensor, *, activation: str = "silu", backend: str = "auto") -> Tensor:
    """`h = act(x)`, as in GPT-2, GPT-NeoX, OPT, Phi and Falcon; differentiable, and its backward keeps `x` only.

    Moves 2 tensors of `[T, F]`.

    Args:
        x: `[T, F]` or `[B, S, F]`, float32, bfloat16, float16 or float64; the up projection's output. Columns next to
            each other, rows may be strided.
        activation: "silu", "gelu" (erf), "gelu_tanh", "relu" or "relu_squared".
        backend: "auto", "reference", "native" or "triton".

    Returns:
        `h`, shaped and typed like x. Arithmetic is float32 inside (float64 for float64).

    Raises:
        ValueError, TypeError: an argument of another shape or type; a backend that cannot run.
    """
    check_rows("x", x)
    return mlp_forward(x, None, check_activation(activation), backend)


def act_backward(
    x: Tensor,
    grad_h: Tensor,
    *,
    activation: str = "silu",
    segments: Tensor | None = None,
    scores: bool = False,
    recompute_h: bool = False,
    penalty: NeuronPenalty | None = None,
    backend: str = "auto",
) -> ActGrads:
    """The gradient of `act_forward`, and with it the attribution statistics of its neurons, in one pass.

    Moves 3 tensors of `[T, F]` (4 with `recompute_h`) and `6 * B * F` float32 scores.

    Args:
        x, grad_h: `[T, F]` or `[B, S, F]`, of one type; see `act_forward`.
        activation: as in `act_forward`.
        segments, recompute_h, penalty, backend: as in `glu_backward`.
        scores: also return max, min and sum over each sample's rows of `h * grad_h` and `x * grad_x`.

    Returns:
        `ActGrads`; the gradient shaped and typed like x, scores float32 `[B, F]`.

    Raises:
        ValueError, TypeError: as `glu_backward`.
    """
    check_rows("x", x)
    check_like("grad_h", grad_h, "x", x)
    check_activation(activation)
    longest = longest_sample(x, segments)
    segments = make_segments(x, segments)
    check_penalty(penalty, x, segments)
    arguments = BackwardArguments(
        as_rows(x), None, as_rows(grad_h), segments, activation,
        scores=scores, recompute_h=recompute_h, longest=longest, penalty=penalty,
    )  # fmt: skip
    grad_x, h, h_scores, x_scores = mlp_backward(arguments, backend)
    return ActGrads(grad_x.view(x.shape), h.view(x.shape) if recompute_h else None, h_scores, x_scores)
