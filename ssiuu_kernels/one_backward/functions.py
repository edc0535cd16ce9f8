"""The ways in which a parameter meets the rows of a batch, as autograd functions that know the rows apart.

Each forward is PyTorch's own. Each backward first makes the data gradient, which reads the parameter, and then the
parameter's: the plain one; or, in the backward of an unlearning loss, whose signal is `ds_b` for every sample, the two
weighted ones, `dL` (returned to autograd) and `sum_b dP_b` (added to `param.target_grad`). Nothing is kept for later.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops.wgrad_pair.reference import ALL, scaled, take, weighted_product, wgrad_pair_reference
from ..target_grad import add_target_grad, gradient_dtype
from .row_weights import LayerRows, Lead, RowWeights

Pair = tuple[Tensor, Tensor | None]  # gradient of the loss, and of the target where there is one


class RowFunction(torch.autograd.Function):
    """What the functions share. `inspect_graph` reads and sets the attributes of their nodes.

    Attributes of a node:
        lead: leading shape of the rows.
        params: the parameters that it serves (None for one that is absent), in the order of its arguments.
        versions: theirs at the time of the forward.
        weights: those of the forward it belongs to; None where no unlearning loss has claimed it.
        answer_grad: of the layer that made the logits: the gradient in the rows that predict an answer token, all
            others being 0. It then takes the place of the one that autograd brings.
        targets: ids of the parameters that get a target gradient.
    """

    @staticmethod
    def describe(ctx, lead: Lead, *params: Tensor | None) -> None:
        """Set the attributes, in the forward."""
        ctx.lead = tuple(lead)
        ctx.params = params
        ctx.versions = [None if param is None else param._version for param in params]
        ctx.weights, ctx.answer_grad, ctx.targets = None, None, frozenset()


def _rows_of(ctx) -> LayerRows | None:
    """The rows' weights; None in the backward of any other loss."""
    weights: RowWeights | None = ctx.weights
    if weights is None or not weights.armed:
        return None
    return weights.rows(ctx.lead) if ctx.answer_grad is None else weights.answer_rows()


def _deliver(ctx, param: Tensor, pair: Pair) -> Tensor:
    """Add the target gradient to `param.target_grad`; the loss gradient, for autograd to add to `param.grad`."""
    loss_grad, target_grad = pair
    if id(param) in ctx.targets and target_grad is not None:
        add_target_grad(param, target_grad)
    return loss_grad.to(gradient_dtype(param))


def _matrix_pair(ctx, param: Tensor, rows: LayerRows | None, x: Tensor, grad_y: Tensor) -> Pair:
    """`grad_y^T x`, `[out, in]`, weighted."""
    if rows is None:
        return weighted_product(x, grad_y), None
    if rows.target is None or id(param) not in ctx.targets:
        return weighted_product(x, grad_y, rows.loss), None
    if rows.all_zero:
        return weighted_product(x, grad_y, rows.loss), torch.zeros_like(param)
    return wgrad_pair_reference(x, grad_y, rows.loss, rows.target, rows.target_rows, rows.other_rows, rows.ratio)


def _vector_pair(rows: LayerRows | None, terms: Tensor) -> Pair:
    """Weighted sums over the rows of `terms` `[T, D]`, in float32 or wider; `[D]`."""
    terms = terms if terms.dtype == torch.float64 else terms.float()
    if rows is None or rows.target is None:
        return terms.sum(0) if rows is None else rows.loss @ terms, None
    return tuple(torch.stack([rows.loss, rows.target]) @ terms)


class RowLinear(RowFunction):
    """`x W^T + b`; `transposed`: `x W + b`, as in GPT-2's Conv1D."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
        RowFunction.describe(ctx, x.shape[:-1], weight, bias)
        ctx.x_dtype, ctx.transposed = x.dtype, transposed
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # as autocast would, so that this is what is saved
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight.t() if transposed else weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: Tensor):
        x, weight = ctx.saved_tensors
        rows, places = _rows_of(ctx), ALL
        shape = x.shape
        x = x.reshape(-1, x.shape[-1])
        if ctx.answer_grad is None:
            grad_y = grad_y.reshape(-1, grad_y.shape[-1])
        else:
            places, grad_y, ctx.answer_grad = ctx.weights.answers.rows, ctx.answer_grad, None
            x = take(x, places)
        grads: list[Tensor | None] = [None, None, None, None]
        if ctx.needs_input_grad[0]:
            matrix = weight.to(grad_y.dtype)
            grad_x = grad_y @ (matrix.t() if ctx.transposed else matrix)
            if places is not ALL:
                grad_x = grad_x.new_zeros(ctx.lead[0] * ctx.lead[1], shape[-1]).index_copy_(0, places, grad_x)
            grads[0] = grad_x.view(shape).to(ctx.x_dtype)
        param, bias = ctx.params
        if ctx.needs_input_grad[1]:
            factors = (grad_y, x) if ctx.transposed else (x, grad_y)
            grads[1] = _deliver(ctx, param, _matrix_pair(ctx, param, rows, *factors))
        if ctx.needs_input_grad[2]:
            grads[2] = _deliver(ctx, bias, _vector_pair(rows, grad_y))
        return tuple(grads)


class RowEmbedding(RowFunction):
    """Rows of an embedding table by their ids."""

    @staticmethod
    def forward(ctx, ids: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
        RowFunction.describe(ctx, ids.shape, weight)
        ctx.save_for_backward(ids)
        ctx.padding_idx = -1 if padding_idx is None else padding_idx
        return F.embedding(ids, weight, padding_idx)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: Tensor):
        (ids,), (param,) = ctx.saved_tensors, ctx.params
        rows = _rows_of(ctx)
        ids, grad_y = ids.reshape(-1), grad_y.reshape(-1, grad_y.shape[-1])

        def table_grad(weights: Tensor | None, places) -> Tensor:
            part = take(grad_y, places)
            part = part if weights is None else scaled(part, take(weights, places)[:, None])
            return torch.ops.aten.embedding_dense_backward(part, take(ids, places), len(param), ctx.padding_idx, False)

        pair = table_grad(None if rows is None else rows.loss, ALL), None
        if rows is not None and rows.target is not None and id(param) in ctx.targets:
            pair = pair[0], table_grad(rows.target, rows.target_rows)
        return None, _deliver(ctx, param, pair), None


class RowScale(RowFunction):
    """`x * value`, value `[D]` being the parameter or the parameter plus a constant (RMSNorm's weight)."""

    @staticmethod
    def forward(ctx, x: Tensor, param: Tensor, value: Tensor) -> Tensor:
        RowFunction.describe(ctx, x.shape[:-1], param)
        ctx.save_for_backward(x, value)
        return x * value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: Tensor):
        (x, value), (param,) = ctx.saved_tensors, ctx.params
        grad_x = (grad_y * value).to(x.dtype)
        pair = _vector_pair(_rows_of(ctx), _wide_product(grad_y, x).reshape(-1, x.shape[-1]))
        return grad_x, _deliver(ctx, param, pair), None


class RowShift(RowFunction):
    """`x + param`, param `[D]`: a bias that is added on its own."""

    @staticmethod
    def forward(ctx, x: Tensor, param: Tensor, value: Tensor) -> Tensor:
        RowFunction.describe(ctx, x.shape[:-1], param)
        ctx.x_dtype = x.dtype
        return x + value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: Tensor):
        (param,) = ctx.params
        pair = _vector_pair(_rows_of(ctx), grad_y.reshape(-1, grad_y.shape[-1]))
        return grad_y.to(ctx.x_dtype), _deliver(ctx, param, pair), None


class RowLayerNorm(RowFunction):
    """Layer normalisation over the last dimension, with weight and bias."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        RowFunction.describe(ctx, x.shape[:-1], weight, bias)
        y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: Tensor):
        x, mean, rstd, weight = ctx.saved_tensors
        param, bias = ctx.params
        rows, width = _rows_of(ctx), x.shape[-1]
        grad_x, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad_y, x, [width], mean, rstd, weight, bias, [True, False, False]
        )
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            terms = _wide_product(grad_y, (x - mean) * rstd).reshape(-1, width)
            grad_weight = _deliver(ctx, param, _vector_pair(rows, terms))
        if ctx.needs_input_grad[2]:
            grad_bias = _deliver(ctx, bias, _vector_pair(rows, grad_y.reshape(-1, width)))
        return grad_x, grad_weight, grad_bias, None


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """In float32 at least, as PyTorch's own kernels sum such products."""
    return a * b if a.dtype == torch.float64 else a.float() * b.float()
