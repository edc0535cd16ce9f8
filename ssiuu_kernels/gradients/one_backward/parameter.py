"""A stand-in for a parameter, through which a module's own forward runs on the functions of `functions.py`.

A module is not recognised by its class: while its forward runs, each of its trainable parameters is replaced by a
`RowParameter`, and what the forward does with it decides. A use that is in `USES` runs on our function; any other gets
the parameter itself, and autograd's gradient. A use that PyTorch does not tell us of (a function of another library, a
scripted one) gets the stand-in, which is an alias of the parameter in autograd's graph: the gradient is autograd's too.
`graph.py` finds either.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...patched_forward import install_forward, remove_forward
from .functions import RowEmbedding, RowLayerNorm, RowLinear, RowRMSNorm, RowScale, RowShift


class RowParameter(Tensor):
    """A trainable parameter, or the parameter transposed, cast, or plus a constant.

    Attributes:
        param: the parameter.
        live: the value with its autograd graph, for a use that is not ours: the parameter itself, or made of it.
        transposed: whether this is `param.T`.
    """

    _is_param = True  # isinstance(self.weight, nn.Parameter) stays true

    param: nn.Parameter
    live: Tensor
    transposed: bool

    @classmethod
    def of(cls, param: nn.Parameter, live: Tensor | None = None, transposed: bool = False) -> RowParameter:
        live = param if live is None else live
        stand_in = live.as_subclass(cls)
        stand_in.param, stand_in.live, stand_in.transposed = param, live, transposed
        return stand_in

    def derived(self, function: Callable, args: tuple, kwargs: dict, transposed: bool = False) -> RowParameter:
        """`function` of this stand-in: its derivative with respect to the parameter is 1, or it is the transpose."""
        return self.of(self.param, function(*map(_live, args), **kwargs), transposed)

    @property
    def is_itself(self) -> bool:
        """Whether this is the parameter as it is, neither transposed nor changed."""
        return self.live is self.param

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
    """The value that PyTorch is to see; in lists and tuples too (`torch.cat([self.a, self.b])`)."""
    if isinstance(value, RowParameter):
        return value.live
    if type(value) in (list, tuple):
        return type(value)(map(_live, value))
    return value


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
    if isinstance(x, RowParameter) or not _parameters_or_constants(weight, bias) or weight.dim() != 2 or x.dim() < 2:
        return NotImplemented
    return RowLinear.apply(x, _plain(weight), _plain(bias), False)


def _addmm(_function, bias, x, weight, **options):
    if options or isinstance(x, RowParameter) or not _parameters_or_constants(weight, bias) or bias.dim() != 1:
        return NotImplemented
    return RowLinear.apply(x, _plain(weight), _plain(bias), True)


def _matmul(_function, x, weight):
    if isinstance(x, RowParameter) or not isinstance(weight, RowParameter) or weight.dim() != 2 or x.dim() < 2:
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
    return RowEmbedding.apply(ids, weight.param, padding_idx)


def _layer_norm(_function, x, normalized_shape, weight=None, bias=None, eps=1e-5):
    vectors = [vector for vector in (weight, bias) if vector is not None]
    known = all(isinstance(vector, RowParameter) or _is_constant(vector) for vector in vectors)
    if isinstance(x, RowParameter) or weight is None or not known or weight.dim() != 1:
        return NotImplemented
    return RowLayerNorm.apply(x, _live(weight), _live(bias), eps, *map(_plain, (weight, bias)))


def _rms_norm(_function, x, normalized_shape, weight=None, eps=None):
    if isinstance(x, RowParameter) or not _is_param(weight) or weight.dim() != 1:
        return NotImplemented
    if x.dtype == weight.dtype in (torch.float32, torch.float64):
        normalised = F.rms_norm(x, normalized_shape, None, eps)
        if normalised.grad_fn is not None and normalised.grad_fn.name() == "MulBackward0":
            return RowScale.apply(normalised, weight.live, weight.param)  # no kernel of its own here, but these steps
    return RowRMSNorm.apply(x, weight.param, eps)


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
        return row_function.apply(other, vector.live, vector.param)

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
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return forward(self, *args, **kwargs)
    # A parameter of another class (quantised, sharded) means something else; and one that is a stand-in already is that
    # of another thread, or of a call of this module by itself, which will put the parameter back.
    trainable = {name: p for name, p in self._parameters.items() if type(p) is nn.Parameter and p.requires_grad}
    stand_ins = {name: RowParameter.of(param) for name, param in trainable.items()}
    self._parameters.update(stand_ins)
    try:
        return forward(self, *args, **kwargs)
    finally:
        for name, stand_in in stand_ins.items():
            if self._parameters.get(name) is stand_in:  # not replaced by the forward
                self._parameters[name] = trainable[name]


def install(module: nn.Module) -> None:
    """Run this module's forward on stand-ins, until `remove`."""
    install_forward(module, _forward)


def remove(module: nn.Module) -> None:
    """Give the module its own forward back."""
    remove_forward(module)
