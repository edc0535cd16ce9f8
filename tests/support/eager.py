"""The ops in eager PyTorch, with autograd's derivatives, as a user would write them: what kernels are held against."""

import itertools
import math

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
}

# Around 0, where a product overflows, and beyond; -1e4 is where every smooth activation is 0 in float32.
SPECIALS = [
    0.0, -0.0, 1e-38, -1e-38, 1.5, -1.5, 20.0, -20.0, 1e15, -1e4, -1e15, 3e38, -3e38, math.inf, -math.inf, math.nan
]  # fmt: skip


def specials(count, dtype):
    """`count` tensors `[T, 16]` whose elements side by side are every combination of `SPECIALS`."""
    combined = torch.tensor(list(itertools.product(SPECIALS, repeat=count)), dtype=dtype)
    return [column.reshape(-1, len(SPECIALS)) for column in combined.t().contiguous()]


def kinds(tensor):
    """0 where a number is finite, 1 and 2 for the two infinities, 3 for NaN."""
    return tensor.isposinf() + 2 * tensor.isneginf() + 3 * tensor.isnan()


def segment_scores(product, segments):
    """`[T, D]` -> `[3, B, D]` of max, min and sum over each segment's rows."""
    scores = product.new_zeros(3, len(segments), product.shape[1])
    for sample, (start, end) in enumerate(segments.tolist()):
        if start < end:
            rows = product[start:end]
            scores[:, sample] = torch.stack([rows.max(0).values, rows.min(0).values, rows.sum(0)])
    return scores


def glu(gate, up, grad_h, segments, activation):
    """h, grad_gate, grad_up, h scores and gate scores, all in the inputs' type."""
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    h = ACTIVATIONS[activation](gate) * up
    grad_gate, grad_up = torch.autograd.grad(h, (gate, up), grad_h)
    h, gate = h.detach(), gate.detach()
    return {
        "h": h,
        "grad_gate": grad_gate,
        "grad_up": grad_up,
        "h_scores": segment_scores(h * grad_h, segments),
        "gate_scores": segment_scores(gate * grad_gate, segments),
    }


def neuron_penalty(inputs, grad_h, segments, activation, weight, ratio, bank, rows):
    """Gradients of `sum_b w_b <h, ds_b/dh> + weight * sum_{A<0} (A - bank)^2` by the inputs, and A of the
    samples with a row, flattened, with the largest term of any sum at its end: a sum that cancels is judged by it.

    Args:
        inputs: (gate, up) or (x,); grad_h is `w_b * ds_b/dh` and `ratio * grad_h` is dP_b/dh, both constants.
        bank: `[B, F]`, what was stored for each sample, NaN where nothing was.
    """
    inputs = [x.detach().requires_grad_() for x in inputs]
    h = ACTIVATIONS[activation](inputs[0])
    if len(inputs) == 2:
        h = h * inputs[1]
    dtype = grad_h.dtype
    terms = [ratio[b].to(dtype) * (h * grad_h)[start:end] for b, (start, end) in enumerate(segments.tolist())]
    attribution = torch.stack([term.sum(0) for term in terms])
    largest = max((term.detach().abs().max() for term in terms if len(term)), default=ratio.new_zeros(()))
    grown = (attribution - bank.to(dtype))[(attribution < 0) & ~bank.isnan() & (rows >= 0)[:, None]]
    grads = torch.autograd.grad((h * grad_h).sum() + float(weight) * grown.square().sum(), inputs)
    return grads, torch.cat([attribution.detach()[rows >= 0].flatten(), largest.to(dtype)[None]])


def penalty(param, grad, target_grad, previous, weight, step):
    """The penalised gradient, the new attribution and (value, penalty norm, loss norm, share, negative)."""
    attribution = param * target_grad
    negative = attribution < 0
    change = torch.where(negative, attribution - previous, 0) if step > 1 else torch.zeros_like(attribution)
    penalty_grad = 2 * weight * change * target_grad
    outweighed = (penalty_grad.abs() > grad.abs()) & negative
    stats = (
        change.pow(2).sum(),
        penalty_grad.norm(),
        grad.norm(),
        outweighed.sum() / negative.sum().clamp(min=1),
        negative.sum(),
    )
    return grad + penalty_grad, attribution, stats
