"""Random models: whatever they do with samples, both gradients are those of plain autograd, or the loss raises."""

import copy
import os

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import nn

import ssiuu_kernels as sk

CASES = int(os.environ.get("SSIUU_RANDOM_MODELS", "500"))
VOCABULARY, WIDTH = 7, 4
EPS = 1e-2  # of norms: many steps make rows of zeros, whose rounding a smaller one would blow up


class Vector(nn.Module):
    """A product with, or a sum of rows and, a vector of its own."""

    def __init__(self, width, shift):
        super().__init__()
        self.vector, self.shift = nn.Parameter(torch.randn(width)), shift

    def forward(self, x):
        return x + self.vector if self.shift else x * (1.0 + self.vector)


class Place(nn.Module):
    """Adds a vector by the place in the dimension before the last, as learned positions do."""

    def __init__(self, width, lead):
        super().__init__()
        self.table, self.lead = nn.Embedding(16, width), lead

    def forward(self, x):
        ids = torch.arange(x.shape[-2]) % 16
        return x + self.table(ids[None] if self.lead else ids)


# What a step does with x, whose dimensions i and j are any; every step keeps the number of elements.
def merged(x, i, _j):
    i = i % max(x.dim() - 1, 1)
    return x.flatten(i, i + 1) if x.dim() > 2 else x


def unmerged(x, i, j):
    parts = next((n for n in (j + 2, 2, 3) if x.shape[i] % n == 0 and x.shape[i] > n), None)
    return x if parts is None or x.dim() > 4 else x.unflatten(i, (parts, -1))


def reshaped(x, _i, j):
    shape = list(x.shape)
    return x.reshape(shape[j % x.dim() :] + shape[: j % x.dim()])


def matmul(x, _i, _j):
    return x if x.dim() < 2 else (x @ x.transpose(-1, -2)).tanh() @ x


def attention(x, _i, _j):
    if x.dim() < 3:
        return x
    return F.scaled_dot_product_attention(x, x, x)


def written(x, i, _j):
    x = x.clone()
    x.select(i, 0).mul_(0.5)
    return x


def packed_in_a_list(x, i, j):
    parts = list(x.unbind(i))
    return torch.stack(parts[::-1] if j % 2 else parts, i)


STEPS = {
    "tanh": lambda x, i, j: x.tanh(),
    "transpose": lambda x, i, j: x.transpose(i, j % x.dim()),
    "permute": lambda x, i, j: x.permute([*range(i, x.dim()), *range(i)]),
    "contiguous": lambda x, i, j: x.contiguous(),
    "merge": merged,
    "unmerge": unmerged,
    "reshape": reshaped,
    "flip": lambda x, i, j: x.flip(i),
    "roll": lambda x, i, j: x.roll(j + 1, i),
    "roll all": lambda x, i, j: x.roll(j + 1),
    "softmax": lambda x, i, j: x * x.softmax(i),
    "centre": lambda x, i, j: x - x.mean(i, keepdim=True),
    "sum without the dimension": lambda x, i, j: x + x.sum(i).unsqueeze(i),
    "norm": lambda x, i, j: x / (1 + x.norm(dim=i, keepdim=True)),
    "deviation": lambda x, i, j: x / (1 + x.var(i, correction=0, keepdim=True)),
    "maximum": lambda x, i, j: x - x.max(i, keepdim=True).values,
    "cumsum": lambda x, i, j: x.cumsum(i) / x.shape[i],
    "index": lambda x, i, j: x[(slice(None),) * i + (torch.arange(x.shape[i]).roll(j),)],
    "index_select": lambda x, i, j: x.index_select(i, torch.arange(x.shape[i]).roll(j)),
    "sort": lambda x, i, j: x.sort(i).values,
    "halves swapped": lambda x, i, j: torch.cat(x.chunk(2, i)[:: 1 if j % 2 else -1], i),
    "unbind": packed_in_a_list,
    "shifted": lambda x, i, j: F.pad(x, [0, 0] * (x.dim() - 1 - i) + [1, -1]),
    "first": lambda x, i, j: x + x.narrow(i, 0, 1),
    "first, expanded": lambda x, i, j: x + x.narrow(i, 0, 1).expand_as(x),
    "repeat": lambda x, i, j: x + x.narrow(i, 0, 1).repeat([x.shape[d] if d == i else 1 for d in range(x.dim())]),
    "masked": lambda x, i, j: x.masked_fill(x > 1, 0.3),
    "where": lambda x, i, j: torch.where(x.detach() > 0, x, x.flip(i)),
    "matmul": matmul,
    "attention": attention,
    "layer_norm": lambda x, i, j: F.layer_norm(x, x.shape[i:], eps=EPS),
    "written": written,
    "triangle": lambda x, i, j: x.tril() if x.dim() > 1 else x,
    "outer": lambda x, i, j: torch.einsum("...a,...b->...ab", x, x.tanh()).mean(-1),
    "detached": lambda x, i, j: x * x.detach().flip(i),
}
LAYERS = {
    "linear": lambda width, j: nn.Linear(width, width, bias=j % 2 == 0),
    "scale": lambda width, j: Vector(width, False),
    "shift": lambda width, j: Vector(width, True),
    "LayerNorm": lambda width, j: nn.LayerNorm(width, EPS, bias=j % 2 == 0),
    "RMSNorm": lambda width, j: nn.RMSNorm(width, EPS),
    "place": lambda width, j: Place(width, j % 2 == 0),
}


class RandomModel(nn.Module):
    """An embedding, random steps, and a layer that makes the logits of `[B, S]` ids.

    Args:
        steps: (name of a step or a layer, a number that chooses a dimension, another number).
        ids: int64 `[B, S]`; the layers get the sizes that they meet with these.
    """

    def __init__(self, steps, ids):
        super().__init__()
        self.steps, self.layers = steps, nn.ModuleList()
        self.embedding, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.making = True
        self.double()(ids)
        self.making = False

    def forward(self, ids):
        x, layers = self.embedding(ids), iter(self.layers)
        for name, i, j in self.steps:
            if name in STEPS:
                x = STEPS[name](x, i % x.dim(), j)
            elif self.making:
                self.layers.append(LAYERS[name](x.shape[-1], j).double())
                x = self.layers[-1](x)
            else:
                x = next(layers)(x)
        return self.head(x.reshape(*ids.shape, WIDTH))


def expected_gradients(model, ids, labels, forget):
    """dL of gradient difference and the target's gradient, by name, by autograd on a model without a patch."""
    token = model(ids)[:, :-1].log_softmax(-1).gather(2, labels[:, 1:, None].clamp(min=0))[..., 0]
    answered = labels[:, 1:] != -100
    s, lengths = (token * answered).sum(1), answered.sum(1)
    zero = s.sum() * 0
    mean = lambda chosen: s[chosen].sum() / lengths[chosen].sum() if chosen.any() else zero  # noqa: E731
    loss = mean(forget) - mean(~forget)
    names, params = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    kinds = loss, (s / lengths)[forget].exp().sum() + zero
    return [
        dict(zip(names, torch.autograd.grad(kind, params, retain_graph=True, allow_unused=True), strict=True))
        for kind in kinds
    ]


def assert_close(actual, expected):
    known = {name: grad for name, grad in expected.items() if grad is not None}
    # Where samples' gradients cancel, rounding is that of what cancels, which is of order 1.
    size = sum(grad.square().sum() for grad in known.values()).sqrt().clamp(min=1e-5)
    for name, grad in known.items():
        found = torch.zeros_like(grad) if actual[name] is None else actual[name]
        assert ((found - grad).norm() / size).item() <= 1e-9, name


STEP = st.tuples(st.sampled_from([*STEPS, *LAYERS, *LAYERS, *LAYERS]), st.integers(0, 3), st.integers(0, 3))


@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(
    steps=st.lists(STEP, min_size=1, max_size=7),
    samples=st.integers(1, 4),
    length=st.integers(2, 4),
    marked=st.integers(0, 15),
    frozen=st.integers(0, 63),
    seed=st.integers(0, 2**31 - 1),
)
def test_random_models(steps, samples, length, marked, frozen, seed):
    torch.manual_seed(seed)
    ids = torch.randint(VOCABULARY, (samples, length))
    labels = ids.masked_fill(torch.rand(samples, length) < 0.3, -100)
    labels[:, -1] = ids[:, -1]
    forget = torch.tensor([bool(marked >> b & 1) for b in range(samples)])
    model = RandomModel(steps, ids)
    for place, param in enumerate(model.parameters()):
        param.requires_grad_(frozen & 1 == 0 or place % 6 != frozen // 2 % 6)
    expected = expected_gradients(copy.deepcopy(model), ids, labels, forget)
    handle = sk.patch(model, scope="all")
    handle.unlearning_loss(model(ids), labels, forget, target="geometric_mean_prob").backward()
    event(handle.gradient_path.engine)
    assert_close({name: param.grad for name, param in model.named_parameters()}, expected[0])
    targets = {name: getattr(param, "target_grad", None) for name, param in model.named_parameters()}
    if forget.any():
        assert_close(targets, expected[1])
    else:
        assert all(grad is None for grad in targets.values())
