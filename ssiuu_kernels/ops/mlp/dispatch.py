"""What `glu` and `act` have in common: the registered ops of an MLP's activation, `act(gate) * up` or `act(x)`.

`x` is the activation's argument: the gate of a gated MLP, the up projection's output of an ungated one, whose `up` is
None. Backends are in this folder; the public functions and their checks in glu.py and act.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..common import native_host, triton_host
from ..common.checks import as_rows, check_segment_values
from ..common.precision import usable
from ..common.results import NeuronScores, absent, neuron_scores
from . import native, reference
from .arguments import BackwardArguments
from .neuron_penalty import NeuronPenalty, check_penalty_rows
from .outputs import empty_grads, empty_scores

for _op in ("glu_forward", "act_forward"):
    backends.register(_op, "reference", reference.mlp_forward)
    backends.register(_op, "native", native.mlp_forward, native_host.why_not)
    backends.register(_op, "triton", triton_host.lazily(__package__, "mlp_forward"), triton_host.why_not)
for _op in ("glu_backward", "act_backward"):
    backends.register(_op, "reference", reference.mlp_backward)
    backends.register(_op, "native", native.mlp_backward, native_host.why_not)
    backends.register(_op, "triton", triton_host.lazily(__package__, "mlp_backward"), triton_host.why_not)


def mlp_forward(x: Tensor, up: Tensor | None, activation: str, backend: str) -> Tensor:
    """`act(x) * up`, or `act(x)`; differentiable. `[.., F]` as x, which was checked."""
    rows = None if up is None else as_rows(up)
    return _mlp_forward(as_rows(x), rows, activation, backends.check_backend(backend)).view(x.shape)


def packed_forward(gate_up: Tensor, activation: str, backend: str) -> Tensor:
    """`act(gate) * up` of `[.., 2F]`; differentiable."""
    h = _packed_forward(as_rows(gate_up), activation, backends.check_backend(backend))
    return h.view(*gate_up.shape[:-1], -1)


def mlp_backward(
    arguments: BackwardArguments, backend: str
) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor | None, NeuronScores | None, NeuronScores | None]:
    """The gradients (a pair, or one tensor if packed or without up), h, and the scores of h and x; None where not asked
    for."""
    *given, penalty = arguments
    penalty_tensors = _penalty_tensors(penalty, arguments.x)
    grad_x, grad_up, h, h_scores, x_scores = _mlp_backward(*given, *penalty_tensors, backends.check_backend(backend))
    grads = grad_x if arguments.packed or arguments.up is None else (grad_x, grad_up)
    return grads, h if arguments.recompute_h else None, neuron_scores(h_scores), neuron_scores(x_scores)


def _penalty_tensors(penalty: NeuronPenalty | None, like: Tensor) -> tuple[Tensor | None, ...]:
    if penalty is None:
        return None, None, None, None
    weight = penalty.weight
    if not isinstance(weight, Tensor):
        weight = torch.full((), weight, dtype=penalty.bank.dtype, device=like.device)
    else:
        weight = torch.where(usable(weight), weight, 0).to(penalty.bank.dtype)
    return weight, penalty.ratio, penalty.bank, penalty.rows


@torch.library.custom_op("ssiuu::mlp_forward", mutates_args=())
def _mlp_forward(x: Tensor, up: Tensor | None, activation: str, backend: str) -> Tensor:
    op = "act_forward" if up is None else "glu_forward"
    return backends.select(op, backend, x, up)(x, up, activation)


@_mlp_forward.register_fake
def _(x: Tensor, up: Tensor | None, activation: str, backend: str) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("ssiuu::packed_glu_forward", mutates_args=())
def _packed_forward(gate_up: Tensor, activation: str, backend: str) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return backends.select("glu_forward", backend, gate, up)(gate, up, activation)


@_packed_forward.register_fake
def _(gate_up: Tensor, activation: str, backend: str) -> Tensor:
    return gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))


# Flat, as torch.library wants it: the fields of `BackwardArguments`, and of its penalty.
@torch.library.custom_op("ssiuu::mlp_backward", mutates_args=("bank",))
def _mlp_backward(
    x: Tensor,
    up: Tensor | None,
    grad_h: Tensor,
    segments: Tensor,
    activation: str,
    scores: bool,
    recompute_h: bool,
    packed: bool,
    longest: int,
    weight: Tensor | None,
    ratio: Tensor | None,
    bank: Tensor | None,
    bank_rows: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    penalised = bank is not None
    if scores or penalised:
        check_segment_values(segments, x.shape[0])
    if penalised:
        check_penalty_rows(bank_rows, bank)
    run = backends.select("act_backward" if up is None else "glu_backward", backend, x, up, grad_h)
    penalty = NeuronPenalty(weight, ratio, bank, bank_rows) if penalised else None
    options = (activation, scores, recompute_h, packed, longest, penalty)
    return run(BackwardArguments(x, up, grad_h, segments, *options))


@_mlp_backward.register_fake
def _(x, up, grad_h, segments, activation, scores, recompute_h, packed, *_):
    h_scores = empty_scores(x, segments) if scores else absent(x)
    return (
        *empty_grads(x, up, packed),
        x.new_empty(x.shape) if recompute_h else absent(x),
        h_scores,
        torch.empty_like(h_scores),
    )


def _save_inputs(ctx, inputs, output) -> None:
    *tensors, ctx.activation, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _no_segments(x: Tensor) -> Tensor:
    return torch.empty((0, 2), dtype=torch.int32, device=x.device)


def _differentiate(ctx, grad_h: Tensor):
    x, up = ctx.saved_tensors
    grads, *_ = mlp_backward(BackwardArguments(x, up, grad_h, _no_segments(x), ctx.activation), ctx.backend)
    grad_x, grad_up = (grads, None) if up is None else grads
    return grad_x, grad_up, None, None


def _differentiate_packed(ctx, grad_h: Tensor):
    (gate_up,) = ctx.saved_tensors
    gate, up = gate_up.chunk(2, dim=-1)
    arguments = BackwardArguments(gate, up, grad_h, _no_segments(gate), ctx.activation, packed=True)
    grads, *_ = mlp_backward(arguments, ctx.backend)
    return grads.view(gate_up.shape), None, None


_mlp_forward.register_autograd(_differentiate, setup_context=_save_inputs)
_packed_forward.register_autograd(_differentiate_packed, setup_context=_save_inputs)
