"""The ways in which a parameter meets the rows of a batch, as autograd functions that know the rows apart.

Each forward is PyTorch's own. Each backward first makes the data gradient, which reads the parameter, and then the
parameter's: the plain one, by the operations that PyTorch's own autograd calls; or, in the backward of an unlearning
loss, whose signal is `ds_b` for every sample, the two weighted ones, `dL` (returned to autograd) and `sum_b dP_b`
(handed to the loss's `Targets`). Nothing is kept for later.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops.wgrad_pair.product import ALL, scaled, take, weighted_pair, weighted_product
from ..target_grad import gradient_dtype
from .row_weights import LayerRows, Lead, RowWeights

Pair = tuple[Tensor, Tensor | None]  # gradient of the loss, and of the target where there is one


class RowFunction(torch.autograd.Function):
    """What the functions share. `inspect_graph` reads and sets the attributes of their nodes.

    Attributes of a node:
        lead: leading shape of the rows.
        params: the parameters that it serves (None for one that is absent), in the order of its arguments.
        versions: theirs at the time of the forward.
        weights: those of the forward it belongs to; None where no unlearning loss has claimed it.
        layout: in which order its rows are the samples'.
        targets: `Targets` of the loss that has claimed it.
        rows_grad: the gradient to use in place of the one that autograd brings. Of the layer that made the logits: in
            the rows that predict an answer token, all others being 0. Of an embedding that was broadcast over the
            samples: before autograd added them up.
        answers_only: whether `rows_grad` is that of the answers' rows.
    """

    @staticmethod
    def describe(ctx, lead: Lead, *params: Tensor | None) -> None:
        """Set the attributes, in the forward."""
        ctx.lead = tuple(lead)
        ctx.params = params
        ctx.versions = [None if param is None else param._version for param in params]
        ctx.weights = ctx.layout = ctx.targets = ctx.rows_grad = None
        ctx.answers_only = False


def _rows_of(ctx, dtype: torch.dtype) -> LayerRows | None:
    """The rows' weights, for products in `dtype`; None in the backward of any other loss."""
    weights: RowWeights | None = ctx.weights
    if weights is None or not weights.armed:
        return None
    return weights.rows(None if ctx.answers_only else ctx.layout, dtype == torch.float16)


def _deliver(ctx, param: Tensor, pair: Pair, rows: LayerRows) -> Tensor:
    """Hand the target gradient to `ctx.targets`; the loss gradient, for autograd to add to `param.grad`."""
    loss_grad, target_grad = (
        grad if grad is None else _multiplied(grad.to(gradient_dtype(param)), scale)
        for grad, scale in zip(pair, rows.scales, strict=True)
    )
    if target_grad is not None and param in ctx.targets:
        ctx.targets.add(param, target_grad)
    return loss_grad


def _multiplied(grad: Tensor, scale: float) -> Tensor:
    return grad if scale == 1 else grad * scale


def _matrix_pair(ctx, param: Tensor, rows: LayerRows, x: Tensor, grad_y: Tensor) -> Pair:
    """`grad_y^T x`, `[out, in]`, weighted."""
    if rows.target is None or param not in ctx.targets:
        return weighted_product(x, grad_y, rows.loss), None
    if rows.all_zero:
        return weighted_product(x, grad_y, rows.loss), torch.zeros_like(param)
    return weighted_pair(x, grad_y, rows.loss, rows.target, rows.target_rows, rows.other_rows, rows.ratio)


def _vector_grad(ctx, param: Tensor, rows: LayerRows, terms: Tensor) -> Tensor:
    """The loss gradient of a vector: weighted sums over the rows of `terms` `[T, D]`, in float32 or wider; `[D]`."""
    weights = rows.loss[None] if rows.target is None else torch.stack([rows.loss, rows.target])
    wide = torch.promote_types(torch.promote_types(terms.dtype, torch.float32), weights.dtype)
    sums = weights.to(wide) @ terms.to(wide)
    return _deliver(ctx, param, (sums[0], None if rows.target is None else sums[1]), rows)


class RowLinear(RowFunction):
    """`x W^T + b`; `transposed`: `x W + b`, as in GPT-2's Conv1D."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
        RowFunction.describe(ctx, x.shape[:-1], weight, bias)
        ctx.x_dtype, ctx.transposed = x.dtype, transposed
        x = _autocast(x, torch.get_autocast_dtype(x.device.type))  # as autocast would: this is what is saved
        ctx.save_for_backward(x, weight)
        y = F.linear(x, weight.t() if transposed else weight, bias)
        # A view that is made in here could not be written to in place by the model.
        return torch.ops.aten._unsafe_view(y._base, y.shape) if y._is_view() else y

    @staticmethod
    def backward(ctx, grad_y: Tensor):
        x, weight = ctx.saved_tensors
        rows, places = _rows_of(ctx, x.dtype), ALL
        shape = x.shape
        x = x.reshape(-1, x.shape[-1])
        if ctx.rows_grad is None:
            grad_y = grad_y.reshape(-1, grad_y.shape[-1])
        else:
            places, grad_y, ctx.rows_grad = ctx.weights.answers.rows, ctx.rows_grad, None
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
            if rows is None:
                grads[1] = weighted_product(*factors).to(gradient_dtype(param))
            else:
                grads[1] = _deliver(ctx, param, _matrix_pair(ctx, param, rows, *factors), rows)
        if ctx.needs_input_grad[2]:
            grads[2] = _vector(ctx, bias, rows, grad_y)
        return tuple(grads)


def _vector(ctx, param: Tensor, rows: LayerRows | None, terms: Tensor) -> Tensor:
    """The gradient of a vector `[D]` from the terms of its rows, `[.., D]`."""
    if rows is None:
        return terms.sum_to_size(param.shape).to(gradient_dtype(param))
    return _vector_grad(ctx, param, rows, terms.reshape(-1, terms.shape[-1]))


class RowEmbedding(RowFunction):
    """Rows of an embedding table by their ids."""

    @staticmethod
    def forward(ctx, ids: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
        RowFunction.describe(ctx, ids.shape, weight)
        ctx.save_for_backward(ids)
        ctx.padding_idx = -1 if padding_idx is None else padding_idx % len(weight)
        return F.embedding(ids, weight, padding_idx)

    @staticmethod
    def backward(ctx, grad_y: Tensor):
        (ids,), (param,) = ctx.saved_tensors, ctx.params
        if ctx.rows_grad is not None:
            grad_y, ctx.rows_grad = ctx.rows_grad.to(grad_y.dtype), None
            ids = ids.expand(grad_y.shape[:-1])
        rows = _rows_of(ctx, grad_y.dtype)

        def table_grad(part: Tensor, part_ids: Tensor) -> Tensor:
            return torch.ops.aten.embedding_dense_backward(part, part_ids, len(param), ctx.padding_idx, False)

        if rows is None:
            return None, table_grad(grad_y, ids).to(gradient_dtype(param)), None
        ids, grad_y = ids.reshape(-1), grad_y.reshape(-1, grad_y.shape[-1])

        def weighted(weights: Tensor, places) -> Tensor:
            return table_grad(scaled(take(grad_y, places), take(weights, places)[:, None]), take(ids, places))

        wants_target = rows.target is not None and param in ctx.targets
        pair = weighted(rows.loss, ALL), weighted(rows.target, rows.target_rows) if wants_target else None
        return None, _deliver(ctx, param, pair, rows), None


class RowScale(RowFunction):
    """`x * value`, value `[D]` being the parameter or the parameter plus a constant (RMSNorm's weight).

    The plain gradient takes the way through `value`, which has the parameter's graph below it.
    """

    @staticmethod
    def forward(ctx, x: Tensor, value: Tensor, param: Tensor) -> Tensor:
        RowFunction.describe(ctx, x.shape[:-1], param)
        ctx.save_for_backward(x, value)
        return x * value

    @staticmethod
    def backward(ctx, grad_y: Tensor):
        (x, value), (param,) = ctx.saved_tensors, ctx.params
        rows = _rows_of(ctx, grad_y.dtype)
        grad_x = (grad_y * value).to(x.dtype) if ctx.needs_input_grad[0] else None
        if rows is None:
            return grad_x, (grad_y * x).sum_to_size(value.shape).to(value.dtype), None
        return grad_x, None, _vector(ctx, param, rows, _wide_product(grad_y, x))


class RowShift(RowFunction):
    """`x + value`, value `[D]` being the parameter, or the parameter cast: a bias that is added on its own.

    The plain gradient takes the way through `value`, as in `RowScale`.
    """

    @staticmethod
    def forward(ctx, x: Tensor, value: Tensor, param: Tensor) -> Tensor:
        RowFunction.describe(ctx, x.shape[:-1], param)
        ctx.dtypes = x.dtype, value.dtype
        return x + value

    @staticmethod
    def backward(ctx, grad_y: Tensor):
        (x_dtype, value_dtype), (param,) = ctx.dtypes, ctx.params
        rows = _rows_of(ctx, grad_y.dtype)
        if rows is None:
            return grad_y.to(x_dtype), grad_y.sum_to_size(param.shape).to(value_dtype), None
        return grad_y.to(x_dtype), None, _vector(ctx, param, rows, grad_y)


class RowLayerNorm(RowFunction):
    """Layer normalisation over the last dimension; weight and bias are values, as in `RowScale`, or constants."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, weight_param: Tensor, bias_param: Tensor | None
    ) -> Tensor:
        RowFunction.describe(ctx, x.shape[:-1], weight_param, bias_param)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (x, weight, bias)]
        if _autocast_widens_norms(x.device.type):
            x, weight, bias = (_autocast(tensor, torch.float32) for tensor in (x, weight, bias))
        y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        return y

    @staticmethod
    def backward(ctx, grad_y: Tensor):
        x, mean, rstd, weight, bias = ctx.saved_tensors
        rows, wanted = _rows_of(ctx, grad_y.dtype), ctx.needs_input_grad
        mask = list(wanted[:3]) if rows is None else [wanted[0], False, False]
        grads = torch.ops.aten.native_layer_norm_backward(grad_y, x, x.shape[-1:], mean, rstd, weight, bias, mask)
        grads = [grad.to(dtype) if asked else None for grad, dtype, asked in zip(grads, ctx.dtypes, mask, strict=True)]
        if rows is None:
            return *grads, None, None, None
        (weight_param, bias_param), through_params = ctx.params, [None, None]
        if wanted[4]:
            through_params[0] = _vector(ctx, weight_param, rows, _wide_product(grad_y, (x - mean) * rstd))
        if wanted[5]:
            through_params[1] = _vector(ctx, bias_param, rows, grad_y)
        return *grads, None, *through_params


class RowRMSNorm(RowFunction):
    """`F.rms_norm` over the last dimension, whose kernels differ between devices and versions of torch."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float | None) -> Tensor:
        RowFunction.describe(ctx, x.shape[:-1], weight)
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        # `F.rms_norm` runs again in the backward, so it has to see the same autocast there.
        device = x.device.type
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        return F.rms_norm(x, x.shape[-1:], weight, eps)

    @staticmethod
    def backward(ctx, grad_y: Tensor):
        (x, weight), (param,) = ctx.saved_tensors, ctx.params
        rows, again = _rows_of(ctx, grad_y.dtype), torch.is_grad_enabled()
        device, dtype, enabled = ctx.autocast
        with torch.enable_grad(), torch.autocast(device, dtype, enabled):
            inputs = x.view_as(x), weight.view_as(weight)
            inputs = tuple(tensor if tensor.requires_grad else tensor.requires_grad_() for tensor in inputs)
            y = F.rms_norm(inputs[0], x.shape[-1:], inputs[1], ctx.eps)
        grad_x, grad_weight = torch.autograd.grad(y, inputs, grad_y, create_graph=again)
        if rows is None:
            return grad_x, grad_weight.to(gradient_dtype(param)), None
        normalised = F.rms_norm(x, x.shape[-1:], None, ctx.eps)
        return grad_x, _vector(ctx, param, rows, _wide_product(grad_y, normalised)), None


def _autocast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`tensor` as an operation sees it for which autocast, where it is on, has chosen `dtype`."""
    if tensor is None or tensor.dtype == torch.float64 or not torch.is_autocast_enabled(tensor.device.type):
        return tensor
    return tensor.to(dtype)


@cache
def _autocast_widens_norms(device: str) -> bool:
    """Whether autocast has chosen float32 for `layer_norm` on this kind of device: on GPUs it has, on the CPU not."""
    with torch.autocast(device, torch.bfloat16):
        return F.layer_norm(torch.zeros(1, 2, dtype=torch.bfloat16, device=device), (2,)).dtype == torch.float32


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """In float32 at least, as PyTorch's own kernels sum such products."""
    wide: Callable[[Tensor], Tensor] = lambda x: x if x.dtype == torch.float64 else x.float()  # noqa: E731
    return wide(a) * wide(b)
