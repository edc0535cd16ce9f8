"""A stand-in for a parameter, through which a module's own forward runs on the functions of `functions.py`.

A module is not recognised by its class: while its forward runs, each of its trainable parameters is replaced by a
`RowParameter`, and what the forward does with it decides. A use that is in `USES` runs on our function; any other gets
the parameter itself, and autograd's gradient, which `graph.py` then finds.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..patched_forward import install_forward, remove_forward
from .functions import RowEmbedding, RowLayerNorm, RowLinear, RowScale, RowShift

# Samples of the model's forward that is under way; None outside of one.
batch_size: ContextVar[int | None] = ContextVar("batch_size", default=None)


class RowParameter(Tensor):
    """A trainable parameter, or the parameter transposed, cast, or plus a constant.

    Attributes:
        param: the parameter.
        transposed: whether this is `param.T`.
        live: gives the value with its autograd graph, for a use that is not ours.
    """

    param: nn.Parameter
    transposed: bool
    live: Callable[[], Tensor]

    @classmethod
    def of(cls, param: nn.Parameter) -> RowParameter:
        return cls._make(param.detach(), param, False, lambda: param)

    @classmethod
    def _make(cls, value: Tensor, param: nn.Parameter, transposed: bool, live: Callable[[], Tensor]) -> RowParameter:
        stand_in = Tensor._make_subclass(cls, value)
        stand_in.param, stand_in.transposed, stand_in.live = param, transposed, live
        return stand_in

    def derived(self, function: Callable, args: tuple, kwargs: dict, transposed: bool = False) -> RowParameter:
        """`function` of this stand-in: a value whose derivative by the parameter is 1, or the transpose."""
        with torch.no_grad():
            value = function(*(_detached(arg) for arg in args), **kwargs)
        live = lambda: function(*(_live(arg) for arg in args), **kwargs)  # noqa: E731
        return self._make(value, self.param, transposed, live)

    @property
    def is_itself(self) -> bool:
        """Whether this is the parameter as it is, neither transposed nor changed."""
        return self.data_ptr() == self.param.data_ptr() and self.dtype == self.param.dtype and not self.transposed

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            use = USES.get(function)
            if use is not None:
                result = use(function, *args, **kwargs)
                if result is not NotImplemented:
                    return result
            return function(*(_live(arg) for arg in args), **{name: _live(value) for name, value in kwargs.items()})


def _live(value: object) -> object:
    return value.live() if isinstance(value, RowParameter) else value


def _detached(value: object) -> object:
    return value.as_subclass(Tensor) if isinstance(value, RowParameter) else value


def _is_param(value: object) -> bool:
    return isinstance(value, RowParameter) and value.is_itself


def _is_constant(value: object) -> bool:
    return value is None or (
        isinstance(value, Tensor) and not isinstance(value, RowParameter) and not value.requires_grad
    )


def _plain(value: RowParameter | Tensor | None) -> Tensor | None:
    """What a function of ours takes: the parameter itself, or a constant."""
    return value.param if isinstance(value, RowParameter) else value


def _parameters_or_constants(*values: object) -> bool:
    return all(_is_param(value) or _is_constant(value) for value in values)


def _linear(_function, x, weight, bias=None):
    if isinstance(x, RowParameter) or not _parameters_or_constants(weight, bias) or weight.dim() != 2:
        return NotImplemented
    return RowLinear.apply(x, _plain(weight), _plain(bias), False)


def _addmm(_function, bias, x, weight, **options):
    if options or isinstance(x, RowParameter) or not _parameters_or_constants(weight, bias) or bias.dim() != 1:
        return NotImplemented
    return RowLinear.apply(x, _plain(weight), _plain(bias), True)


def _matmul(_function, x, weight):
    if isinstance(x, RowParameter) or not isinstance(weight, RowParameter) or weight.dim() != 2:
        return NotImplemented
    if weight.transposed or weight.is_itself:
        return RowLinear.apply(x, weight.param, None, not weight.transposed)
    return NotImplemented


def _transpose(function, weight, *args):
    # Tensor.T's getter is a method of the descriptor: it takes the tensor, as the others do.
    if not weight.is_itself or weight.dim() != 2:
        return NotImplemented
    return weight.derived(function, (weight, *args), {}, transposed=True)


def _embedding(
    _function, ids, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False
):
    if not _is_param(weight) or max_norm is not None or scale_grad_by_freq or sparse:
        return NotImplemented
    samples = batch_size.get()
    if len(ids) == 1 and samples is not None:
        # Positions that all samples share: once they are looked up for each, their gradients can be told apart.
        ids = ids.expand(samples, *ids.shape[1:])
    return RowEmbedding.apply(ids, weight.param, padding_idx)


def _layer_norm(_function, x, normalized_shape, weight=None, bias=None, eps=1e-5):
    if isinstance(x, RowParameter) or weight is None or not _parameters_or_constants(weight, bias) or weight.dim() != 1:
        return NotImplemented
    if torch.is_autocast_enabled(x.device.type):
        x = x.float()  # as autocast would
    return RowLayerNorm.apply(x, _plain(weight), _plain(bias), eps)


def _rms_norm(_function, x, normalized_shape, weight=None, eps=None):
    if not _is_param(weight) or weight.dim() != 1:
        return NotImplemented
    return RowScale.apply(F.rms_norm(x, normalized_shape, None, eps), weight.param, _detached(weight))


def _elementwise(row_function: type) -> Callable:
    """A product or a sum of rows `[.., D]` and a vector `[D]`; or of a vector and a number, which is a vector again."""

    def use(function, a, b, **options):
        vector, other = (a, b) if isinstance(a, RowParameter) else (b, a)
        if options or vector.dim() != 1 or vector.transposed or isinstance(other, RowParameter):
            return NotImplemented
        if not isinstance(other, Tensor):
            return vector.derived(function, (a, b), {}) if row_function is RowShift else NotImplemented
        if other.dim() < 2 or other.shape[-1:] != vector.shape:
            return NotImplemented
        return row_function.apply(other, vector.param, _detached(vector))

    return use


def _cast(function, vector, *args, **kwargs):
    if not isinstance(vector, RowParameter) or vector.dim() != 1:
        return NotImplemented
    return vector.derived(function, (vector, *args), kwargs)


USES: dict[Callable, Callable] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    Tensor.t: _transpose,
    Tensor.T.__get__: _transpose,
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    torch.mul: _elementwise(RowScale),
    Tensor.mul: _elementwise(RowScale),
    torch.add: _elementwise(RowShift),
    Tensor.add: _elementwise(RowShift),
    Tensor.float: _cast,
    Tensor.to: _cast,
    Tensor.type_as: _cast,
}


def _forward(self: nn.Module, *args, **kwargs):
    """The class's own forward, run on stand-ins where gradients are wanted."""
    forward = type(self).forward
    trainable = {name: p for name, p in self._parameters.items() if p is not None and p.requires_grad}
    if not trainable or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return forward(self, *args, **kwargs)
    self._parameters.update({name: RowParameter.of(param) for name, param in trainable.items()})
    try:
        return forward(self, *args, **kwargs)
    finally:
        self._parameters.update(trainable)


def install(module: nn.Module) -> None:
    """Run this module's forward on stand-ins, until `remove`."""
    install_forward(module, _forward)


def remove(module: nn.Module) -> None:
    """Give the module its own forward back."""
    remove_forward(module)
