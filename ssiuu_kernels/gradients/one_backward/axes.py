"""Which dimension of a tensor tells the samples apart, followed from the logits down the autograd graph.

The logits `[B, S, V]` hold one sample per place of their first dimension. A rule for every kind of backward node says
where that dimension is in each of the node's inputs, or that it is lost: the node adds the samples up, reorders them by
values, or is not known. So a row of a layer's input is never taken for a sample's because of a size alone.

The dimension may become a factor of another one (`[B, S, D]` viewed as `[B * S, D]`), which is then
`outer * B * inner` long, and the sample at place i of it is `(i // inner) % B`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

Shape = Sequence[int]


class Axis(NamedTuple):
    """A dimension of a tensor, and the places in it that belong to one sample in a row."""

    dim: int
    inner: int


class Edge(NamedTuple):
    """One input of a backward node's forward operation.

    Attributes:
        node: the backward node of the operation.
        index: which of the operation's differentiable inputs.
        output, input: shapes of the operation's output and of this input.
        count: the length of the axis that is followed, at least 2.
        separates: whether an attention mask keeps samples apart that are packed along this axis; None on another axis.
    """

    node: object
    index: int
    output: Shape
    input: Shape
    count: int
    separates: Callable[[Tensor], bool] | None


# The axis in an operation's input, from the axis in its output; None where it is lost, or not known.
Rule = Callable[[Edge, Axis], Axis | None]


def flattened(axis: Axis, lead: Shape) -> int:
    """`inner` of the axis once all dimensions of `lead` are one."""
    return axis.inner * math.prod(lead[axis.dim + 1 :])


def _dim(edge: Edge, name: str = "dim") -> int:
    return _wrapped(getattr(edge.node, f"_saved_{name}"), len(edge.output))


def _wrapped(dim: int, dims: int) -> int:
    """A dimension counted from the front. Autograd gives negative numbers as unsigned ones."""
    dim = dim - (1 << 64) if dim >= 1 << 63 else dim
    return dim + dims if dim < 0 else dim


def elementwise(edge: Edge, axis: Axis) -> Axis | None:
    """The same places; lost where the input is broadcast along the axis."""
    dim = axis.dim - (len(edge.output) - len(edge.input))
    return Axis(dim, axis.inner) if dim >= 0 and edge.input[dim] == edge.output[axis.dim] else None


def _reshaped(edge: Edge, axis: Axis) -> Axis | None:
    """Another shape of the same elements in the same order."""
    stride, below = flattened(axis, edge.output), 1
    for dim in reversed(range(len(edge.input))):
        size = edge.input[dim]
        if below * size > stride:
            whole = stride % below == 0 and below * size % (stride * edge.count) == 0
            return Axis(dim, stride // below) if whole else None
        below *= size
    return None


def _transposed(edge: Edge, axis: Axis) -> Axis:
    first, second = _dim(edge, "dim0"), _dim(edge, "dim1")
    return axis._replace(dim={first: second, second: first}.get(axis.dim, axis.dim))


def _matrix_transposed(edge: Edge, axis: Axis) -> Axis:
    return axis._replace(dim=len(edge.output) - 1 - axis.dim)


def _permuted(edge: Edge, axis: Axis) -> Axis:
    return axis._replace(dim=_wrapped(edge.node._saved_dims[axis.dim], len(edge.output)))


def _apart_from_dim(edge: Edge, axis: Axis) -> Axis | None:
    """An operation along one dimension, whose other dimensions stay as they are."""
    return axis if axis.dim != _dim(edge) else None


def _apart_from_dims(edge: Edge, axis: Axis) -> Axis | None:
    dims = [_wrapped(dim, len(edge.output)) for dim in edge.node._saved_dims]
    return axis if dims and axis.dim not in dims else None


def _sliced(edge: Edge, axis: Axis) -> Axis | None:
    whole = edge.input[axis.dim] == edge.output[axis.dim]  # a slice as long as the dimension takes it in order
    return axis if whole or axis.dim != _dim(edge) else None


def _padded(edge: Edge, axis: Axis) -> Axis | None:
    pads = edge.node._saved_pad  # from the last dimension on, two each
    start = 2 * (len(edge.output) - 1 - axis.dim)
    return axis if not any(pads[start : start + 2]) else None


def _repeated(edge: Edge, axis: Axis) -> Axis | None:
    dim = axis.dim - (len(edge.output) - len(edge.input))
    return Axis(dim, axis.inner) if dim >= 0 and edge.node._saved_repeats[axis.dim] == 1 else None


def _stacked(edge: Edge, axis: Axis) -> Axis | None:
    new = _dim(edge)
    return None if axis.dim == new else axis._replace(dim=axis.dim - (axis.dim > new))


def _selected(edge: Edge, axis: Axis) -> Axis:
    gone = _wrapped(edge.node._saved_dim, len(edge.input))
    return axis._replace(dim=axis.dim + (axis.dim >= gone))


def _reduced(edge: Edge, axis: Axis) -> Axis | None:
    """A sum, mean or the like over some dimensions."""
    dims = edge.node._saved_dim
    given = range(len(edge.input)) if dims is None else (dims,) if isinstance(dims, int) else dims
    gone = {_wrapped(dim, len(edge.input)) for dim in given} or set(range(len(edge.input)))
    kept = [dim for dim in range(len(edge.input)) if dim not in gone]
    if len(edge.output) == len(edge.input):
        return axis if axis.dim in kept else None
    return axis._replace(dim=kept[axis.dim])


def _matrix_product(edge: Edge, axis: Axis, first: int = 0) -> Axis | None:
    """`[.., m, k] @ [.., k, n]`, whose factors are the inputs `first` and `first + 1`."""
    dims = len(edge.output)
    if axis.dim < dims - 2:
        return axis
    return axis if (axis.dim == dims - 2) == (edge.index == first) else None


def _added_matrix_product(edge: Edge, axis: Axis) -> Axis | None:
    return elementwise(edge, axis) if edge.index == 0 else _matrix_product(edge, axis, first=1)


def _attention(edge: Edge, axis: Axis) -> Axis | None:
    """`softmax(Q K^T) V`; inputs are Q, K, V `[.., rows, width]`, and perhaps a bias of the scores."""
    rows = len(edge.output) - 2
    if edge.index > 2 or axis.dim > rows or edge.input[axis.dim] != edge.output[axis.dim]:
        return None
    if axis.dim < rows or edge.index == 0:
        return axis
    if edge.separates is None:
        return None
    names = ("_raw_saved_attn_mask", "_raw_saved_attn_bias")  # on the CPU, and on GPUs
    mask = next((_kept_tensor(getattr(edge.node, name)) for name in names if hasattr(edge.node, name)), None)
    return axis if mask is not None and edge.separates(mask) else None


def _indexed(edge: Edge, axis: Axis) -> Axis | None:
    """`x[:, .., index, ..]`: the dimensions beside one that is indexed by values."""
    raw = edge.node._raw_saved_indices
    given = [place for place, kept in enumerate(raw) if getattr(kept, "data", kept) is not None]
    index = _kept_tensor(raw[given[0]]) if len(given) == 1 else None
    if index is None:
        return None
    place, width = given[0], index.dim()
    if axis.dim < place:
        return axis
    return axis._replace(dim=axis.dim - width + 1) if axis.dim >= place + width else None


def _kept_tensor(saved: object) -> Tensor | None:
    """What a node has saved; None where a hook keeps it (checkpointing: to look at it would run the layer again)."""
    kept = getattr(saved, "data", None)
    return kept if isinstance(kept, Tensor) else None


def _normalised(edge: Edge, axis: Axis) -> Axis | None:
    """A norm over the last dimensions; the others are its rows."""
    rows = len(edge.output) - len(edge.node._saved_normalized_shape)
    return axis if edge.index == 0 and axis.dim < rows else None


def _first_dimension(edge: Edge, axis: Axis) -> Axis | None:
    """Convolutions, group norms: a sample per place of the first dimension."""
    return axis if edge.index == 0 and axis.dim == 0 else None


def _batch_normalised(edge: Edge, axis: Axis) -> Axis | None:
    return _first_dimension(edge, axis) if not edge.node._saved_training else None


def _feature_wise(edge: Edge, axis: Axis) -> Axis | None:
    """Rows `[.., D]` to rows, each by itself."""
    return axis if axis.dim < len(edge.output) - 1 else None


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        [
            f"{operation}Backward{variant}"
            for operation, variants in {
                "Abs": "0", "Add": "01", "Addcdiv": "0", "Addcmul": "0", "Alias": "0", "Clamp": "01", "ClampMax": "01",
                "ClampMin": "01", "Clone": "0", "Cos": "0", "Div": "0123", "Elu": "0", "Erf": "0", "Exp": "0",
                "Expand": "0", "Expm1": "0", "Gelu": "0", "Hardsigmoid": "0", "Hardswish": "0", "Hardtanh": "0",
                "LeakyRelu": "0", "Lerp": "01", "Log": "0", "Log1P": "0", "LogSigmoid": "0", "MaskedFill": "01",
                "Maximum": "0", "Minimum": "0", "Mish": "0", "Mul": "01", "NanToNum": "0", "NativeDropout": "0",
                "Neg": "0", "Pow": "01", "Reciprocal": "0", "Relu": "0", "Rsqrt": "0", "Rsub": "01", "Sigmoid": "0",
                "Silu": "0", "Sin": "0", "Softplus": "0", "Sqrt": "0", "Sub": "01", "Tanh": "0", "Threshold": "0",
                "ToCopy": "0", "Tril": "0", "Triu": "0", "Where": "0",
            }.items()
            for variant in variants
        ],
        elementwise,
    ),
    **dict.fromkeys(
        ["ReshapeAliasBackward0", "UnsafeViewBackward0", "UnsqueezeBackward0", "ViewBackward0"]
        + [f"SqueezeBackward{variant}" for variant in range(4)],
        _reshaped,
    ),
    "TransposeBackward0": _transposed,
    "TBackward0": _matrix_transposed,
    "PermuteBackward0": _permuted,
    **dict.fromkeys(
        [
            "CatBackward0", "CumsumBackward0", "GluBackward0", "LogSoftmaxBackward0", "SafeSoftmaxBackward0",
            "SoftmaxBackward0", "SplitBackward0", "SplitWithSizesBackward0",
        ],
        _apart_from_dim,
    ),
    **dict.fromkeys(["FlipBackward0", "RollBackward0"], _apart_from_dims),
    "SliceBackward0": _sliced,
    "ConstantPadNdBackward0": _padded,
    "RepeatBackward0": _repeated,
    "StackBackward0": _stacked,
    **dict.fromkeys(["SelectBackward0", "UnbindBackward0"], _selected),
    **dict.fromkeys(
        [
            "AmaxBackward0", "AminBackward0", "LinalgVectorNormBackward0", "LogsumexpBackward0", "MaxBackward0",
            "MeanBackward1", "MinBackward0", "StdBackward0", "SumBackward1", "VarBackward0",
        ],
        _reduced,
    ),
    **dict.fromkeys(["BmmBackward0", "MmBackward0"], _matrix_product),
    **dict.fromkeys(["AddmmBackward0", "BaddbmmBackward0"], _added_matrix_product),
    **dict.fromkeys(
        [
            f"ScaledDotProduct{kernel}AttentionBackward0"
            for kernel in ("Cudnn", "Efficient", "Flash")
        ]
        + ["ScaledDotProductFlashAttentionForCpuBackward0", "ScaledDotProductFusedAttentionOverrideableBackward0"],
        _attention,
    ),
    "IndexBackward0": _indexed,
    **dict.fromkeys(["FusedRmsNormBackward0", "NativeLayerNormBackward0"], _normalised),
    **dict.fromkeys(["ConvolutionBackward0", "NativeGroupNormBackward0"], _first_dimension),
    "NativeBatchNormBackward0": _batch_normalised,
    "ViewAsComplexBackward0": lambda _edge, axis: axis,
    **dict.fromkeys(
        [
            "GeneratedBackwardFor_ssiuu_mlp_forward_defaultBackward",
            "GeneratedBackwardFor_ssiuu_packed_glu_forward_defaultBackward",
            "ObservedHiddenBackward",
            "RecordedOutputBackward",
            "ViewAsRealBackward0",
        ],
        _feature_wise,
    ),
}  # fmt: skip
