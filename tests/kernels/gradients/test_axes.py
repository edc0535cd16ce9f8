"""Every rule of `axes.RULES` against the gradients of its operation: a sample's places reach that sample's alone."""

import pytest
import torch
import torch.nn.functional as F

from ssiuu_kernels.gradients.one_backward.axes import RULES, Axis, Edge

# On the CPU these nodes are not made: kernels of GPUs, and ours, which are held against two backwards elsewhere.
ELSEWHERE = {
    "ScaledDotProductCudnnAttentionBackward0", "ScaledDotProductEfficientAttentionBackward0",
    "ScaledDotProductFlashAttentionBackward0", "ScaledDotProductFusedAttentionOverrideableBackward0",
    "FusedRmsNormBackward0", "ObservedHiddenBackward", "RecordedOutputBackward",
    "GeneratedBackwardFor_ssiuu_mlp_forward_defaultBackward",
    "GeneratedBackwardFor_ssiuu_packed_glu_forward_defaultBackward",
}  # fmt: skip
SHAPE = (4, 6, 4)

UNARY = {
    name: getattr(torch, name)
    for name in (
        "abs", "clone", "cos", "erf", "exp", "expm1", "log", "log1p", "neg", "reciprocal", "relu", "rsqrt", "sigmoid",
        "sin", "sqrt", "tanh", "tril", "triu", "nan_to_num",
    )
}  # fmt: skip
FUNCTIONAL = {
    name: getattr(F, name)
    for name in ("elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "logsigmoid", "mish", "silu",
                 "softplus")
}  # fmt: skip
OPERATIONS = {
    **{name: lambda t, function=function: function(t.x) for name, function in (UNARY | FUNCTIONAL).items()},
    "alias": lambda t: torch.ops.aten.alias(t.x),
    "add": lambda t: t.x + t.y,
    "add a number": lambda t: torch.ops.aten.add.Scalar(t.x, 1.0),
    "add broadcast": lambda t: t.x + t.row,
    "addcdiv": lambda t: torch.addcdiv(t.x, t.row, t.y),
    "addcmul": lambda t: torch.addcmul(t.row, t.x, t.y),
    "clamp": lambda t: t.x.clamp(0.1, 0.9),
    "clamp tensors": lambda t: torch.clamp(t.x, t.row * 0, t.row + 9),
    "clamp_max": lambda t: t.x.clamp_max(0.9),
    "clamp_max tensor": lambda t: torch.clamp_max(t.x, t.row),
    "clamp_min": lambda t: t.x.clamp_min(0.1),
    "clamp_min tensor": lambda t: torch.clamp_min(t.x, t.row),
    "div": lambda t: t.x / t.row,
    "div a number": lambda t: torch.ops.aten.div.Scalar(t.x, 3.0),
    "div a number in a mode": lambda t: torch.ops.aten.div.Scalar_mode(t.x, 3.0, rounding_mode=None),
    "div floored": lambda t: torch.div(t.x, t.y, rounding_mode="floor"),
    "expand": lambda t: t.row.expand(4, 6, 4),
    "lerp": lambda t: torch.lerp(t.x, t.y, 0.3),
    "lerp tensor": lambda t: torch.lerp(t.x, t.y, t.row),
    "masked_fill": lambda t: t.x.masked_fill(t.x > 0.5, 0.0),
    "masked_fill tensor": lambda t: t.x.masked_fill(t.x > 0.5, t.x.new_ones(())),
    "maximum": lambda t: torch.maximum(t.x, t.row),
    "minimum": lambda t: torch.minimum(t.row, t.x),
    "mul": lambda t: t.x * t.row,
    "mul a number": lambda t: torch.ops.aten.mul.Scalar(t.x, 2.0),
    "dropout": lambda t: torch.native_dropout(t.x, 0.3, True)[0],
    "pow": lambda t: t.x**3,
    "pow tensor": lambda t: t.x**t.row,
    "rsub": lambda t: torch.rsub(t.x, t.row),
    "rsub a number": lambda t: 1 - t.x,
    "sub": lambda t: t.x - t.row,
    "sub a number": lambda t: torch.ops.aten.sub.Scalar(t.x, 1.0),
    "threshold": lambda t: F.threshold(t.x, 0.5, 0.0),
    "to": lambda t: t.x.float(),
    "where": lambda t: torch.where(t.x > 0.5, t.x, t.row),
    "view": lambda t: t.x.view(24, 4),
    "view dims": lambda t: t.x.view(2, 2, 2, 3, 4),
    "reshape": lambda t: t.x.reshape(2, 12, 4),
    "reshape_alias": lambda t: torch.ops.aten._reshape_alias(t.x, [2, 12, 4], [48, 4, 1]),
    "unsafe_view": lambda t: torch.ops.aten._unsafe_view(t.x, [8, 12]),
    "squeeze": lambda t: t.row.squeeze(),
    "squeeze dim": lambda t: t.row.squeeze(-1),
    "squeeze dims": lambda t: t.row.squeeze((1,)),
    "squeeze in place": lambda t: t.row.clone().squeeze_(),
    "unsqueeze": lambda t: t.x.unsqueeze(-2),
    "transpose": lambda t: t.x.transpose(-1, 0),
    "t": lambda t: t.square.t(),
    "permute": lambda t: t.x.permute(-1, 0, 1),
    "cat": lambda t: torch.cat([t.x, t.y], 1),
    "cat samples": lambda t: torch.cat([t.x, t.y], -3),
    "cumsum": lambda t: t.x.cumsum(-2),
    "glu": lambda t: F.glu(t.x, 1),
    "log_softmax": lambda t: t.x.log_softmax(-1),
    "softmax": lambda t: t.x.softmax(0),
    "safe softmax": lambda t: torch.ops.aten._safe_softmax(t.x, -1),
    "split": lambda t: t.x.split(2, 1)[1],
    "split with sizes": lambda t: t.x.split([1, 3], -1)[1],
    "flip": lambda t: t.x.flip(0, -1),
    "roll": lambda t: t.x.roll(1, 1),
    "roll all": lambda t: t.x.roll(1),
    "slice": lambda t: t.x[:, 1:3],
    "slice of samples": lambda t: t.x[1:],
    "slice of all": lambda t: t.x[:],
    "pad": lambda t: F.pad(t.x, (1, 2)),
    "pad and cut": lambda t: F.pad(t.x, (0, 0, 1, -1)),
    "repeat": lambda t: t.x.repeat(1, 2, 1),
    "repeat in front": lambda t: t.x.repeat(2, 1, 1, 1),
    "stack": lambda t: torch.stack([t.x, t.y], 1),
    "select": lambda t: t.x[:, -1],
    "unbind": lambda t: t.x.unbind(-1)[0],
    "amax": lambda t: t.x.amax(0),
    "amin": lambda t: t.x.amin((0, -1), keepdim=True),
    "norm": lambda t: torch.linalg.vector_norm(t.x, dim=1),
    "logsumexp": lambda t: t.x.logsumexp(-1),
    "max": lambda t: t.x.max(1).values,
    "mean": lambda t: t.x.mean((0, 2)),
    "min": lambda t: t.x.min(0, keepdim=True).values,
    "std": lambda t: t.x.std(-1),
    "sum": lambda t: t.x.sum(-2),
    "sum kept": lambda t: t.x.sum(0, keepdim=True),
    "var": lambda t: t.x.var(1, keepdim=True),
    "bmm": lambda t: torch.bmm(t.x, t.m),
    "mm": lambda t: torch.mm(t.square, t.other),
    "addmm": lambda t: torch.addmm(t.bias, t.square, t.other),
    "baddbmm": lambda t: torch.baddbmm(t.bias, t.x, t.m),
    "attention": lambda t: F.scaled_dot_product_attention(t.q, t.k, t.v),
    "index": lambda t: t.x[:, [2, 0, 1, 1]],
    "index of one": lambda t: t.x[..., [3], :],
    "index by a table": lambda t: t.x[:, torch.tensor([[0, 1], [2, 2]])],
    "index of samples": lambda t: t.x[[3, 1, 2, 0]],
    "index twice": lambda t: t.x[[0, 1], [1, 2]],
    "layer_norm": lambda t: F.layer_norm(t.x, (4,)),
    "layer_norm of two": lambda t: F.layer_norm(t.x, (6, 4)),
    "group_norm": lambda t: F.group_norm(t.x, 2),
    "convolution": lambda t: F.conv1d(t.x, torch.ones(3, 6, 2, dtype=t.x.dtype)),
    "batch_norm": lambda t: F.batch_norm(t.x, torch.ones(6).to(t.x), torch.ones(6).to(t.x)),
    "batch_norm of a batch": lambda t: F.batch_norm(t.x, None, None, training=True),
    "view_as_complex": lambda t: torch.view_as_complex(t.x.view(4, 6, 2, 2)),
    "view_as_real": lambda t: torch.view_as_real(torch.view_as_complex(t.x.view(4, 6, 2, 2))),
}


class Tensors:
    """Leaves by name, positive and different."""

    def __init__(self):
        shapes = {"x": SHAPE, "y": SHAPE, "row": (6, 1), "m": (4, 4, 6), "square": (6, 6), "other": (6, 6)}
        shapes |= {"bias": (6,), **dict.fromkeys("qkv", (2, 4, 6, 4))}
        for name, shape in shapes.items():
            setattr(self, name, (torch.rand(shape, dtype=torch.float64) + 0.2).requires_grad_())


def reached(output, edge_index, sample, axis, count):
    """Where the gradient of one sample's places in the output is not 0, in one input of the output's node."""
    place = torch.arange(output.shape[axis.dim]).view(-1, *[1] * (output.dim() - axis.dim - 1))
    mask = (place // axis.inner % count == sample).to(output.dtype)
    grad = torch.rand(output.shape, dtype=torch.float64).to(output.dtype) * mask
    node, number = output.grad_fn.next_functions[edge_index]
    edge = torch.autograd.graph.GradientEdge(node, number)
    (found,) = torch.autograd.grad(output, edge, grad, retain_graph=True, allow_unused=True)
    return found


def axes_of(shape):
    """(axis, count) of every way in which samples could be in a dimension."""
    for dim, size in enumerate(shape):
        for count in range(2, size + 1):
            for inner in range(1, size // count + 1):
                if size % (count * inner) == 0:
                    yield Axis(dim, inner), count


def checked(output):
    """How many axes a rule follows into an input, all of them rightly."""
    node, followed = output.grad_fn, 0
    rule = RULES.get(type(node).__name__)
    if rule is None:
        return 0
    for index, (below, number) in enumerate(node.next_functions):
        if below is None:
            continue
        leaf = getattr(below, "variable", None)
        shape = list(leaf.shape) if leaf is not None else below._input_metadata[number].shape
        for axis, count in axes_of(output.shape):
            into = rule(Edge(node, index, list(output.shape), shape, count, None), axis)
            if into is None:
                continue
            followed += 1
            assert shape[into.dim] % (count * into.inner) == 0
            for sample in range(count):
                grad = reached(output, index, sample, axis, count)
                if grad is None:
                    continue
                place = torch.arange(shape[into.dim]).view(-1, *[1] * (len(shape) - into.dim - 1))
                others = (place // into.inner % count != sample).expand(shape)
                assert not grad[others].any(), (axis, count, into)
    return followed


NEVER = ("index twice", "batch_norm of a batch", "roll all")  # all of their dimensions are lost


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_rules(operation):
    name = next(name for name, other in OPERATIONS.items() if other is operation)
    assert (checked(operation(Tensors())) > 0) == (name not in NEVER)


def test_every_rule_is_tried():
    tried = {type(operation(Tensors()).grad_fn).__name__ for operation in OPERATIONS.values()}
    assert set(RULES) - ELSEWHERE - tried == set()
