"""A patched model under an ordinary loss is the unpatched one: outputs, gradients and hook calls, bit for bit."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ssiuu_kernels as sk
from ssiuu_kernels.gradients.one_backward.installed import RowForwards

from ...support.gradients import FORGET, TARGET, both_gradients, distances
from ...support.models import FAMILIES, logits_of, tiny_batch, tiny_model
from ...support.torch_llama import WIDTH
from .test_rows import Layer, Model, batch_of, engine_of


def ordinary(model, batch, autocast=False):
    """Logits and gradients of a cross-entropy."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = logits_of(model, batch)
        F.cross_entropy(logits[:, :-1].float().flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
    return logits.detach(), {name: param.grad for name, param in model.named_parameters()}


def assert_same_bits(actual, expected):
    assert torch.equal(actual[0], expected[0])
    for name, grad in expected[1].items():
        assert (grad is None) == (actual[1][name] is None), name
        assert grad is None or torch.equal(grad, actual[1][name]), name


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.float64, False), (torch.float32, True),
     (torch.bfloat16, True)],
    ids=["float32", "bfloat16", "float64", "float32 autocast", "bfloat16 autocast"],
)  # fmt: skip
@pytest.mark.parametrize("family", ["torch_llama", *FAMILIES])
def test_families(family, dtype, autocast):
    model, batch = tiny_model(family, dtype), tiny_batch()
    expected = ordinary(model, batch, autocast)
    RowForwards(model, None)  # without the MLP's kernels, which round differently
    assert_same_bits(ordinary(model, batch, autocast), expected)


class Norm(torch.autograd.Function):
    """An RMSNorm of another library's, as Liger's: it takes the weight past PyTorch's dispatch."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad * weight, (grad * x).flatten(0, -2).sum(0)


class LinearOfZero3(torch.autograd.Function):
    """As DeepSpeed's, which takes the place of `F.linear`."""

    @staticmethod
    def forward(ctx, x, weight, bias=None):
        ctx.save_for_backward(x, weight, bias)
        y = x.matmul(weight.t())
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        return grad.matmul(weight), flat.t().matmul(x.flatten(0, -2)), None if bias is None else flat.sum(0)


@torch.jit.script
def scripted(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * weight.sin()


class Uses(nn.Module):
    """A module that uses its two vectors by a function of both."""

    def __init__(self, function):
        super().__init__()
        self.a, self.b, self.function = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH)), function

    def forward(self, x):
        return self.function(x, self.a, self.b)


USES = {
    "another library's function": lambda x, a, b: Norm.apply(x, a) + b,
    "another library's function of a cast": lambda x, a, b: Norm.apply(x, a.double()) + b,
    "a scripted function": lambda x, a, b: scripted(x, a) * b,
    "cat": lambda x, a, b: x * torch.cat([a, b])[:WIDTH] + torch.cat((a, b))[WIDTH:],
    "stack": lambda x, a, b: x * torch.stack([a, b]).sum(0),
    "a list in a list": lambda x, a, b: x * torch.block_diag(a, b)[0, :WIDTH] + torch.block_diag(*[a, b])[1, WIDTH:],
    "out of order": lambda x, a, b: a - x * 2 * b,
    "in place": lambda x, a, b: (x * a).add_(b).mul_(a),
    "a matrix of vectors": lambda x, a, b: x @ torch.outer(a, b),
    "norm of itself": lambda x, a, b: x * F.normalize(a, dim=0) + b.mean(),
    "expanded": lambda x, a, b: x * a.expand_as(x) + b[None, None],
    "data": lambda x, a, b: x * a + b * float(a.data.sum() > 0) + b.detach(),
    "its type": lambda x, a, b: x * a if isinstance(a, nn.Parameter) and a.requires_grad else x * b,
    "rms_norm": lambda x, a, b: F.rms_norm(x, (WIDTH,), a, 1e-5) + F.rms_norm(x, (WIDTH,), b),
    "layer_norm": lambda x, a, b: F.layer_norm(x, (WIDTH,), a, b),
    "layer_norm over tokens too": lambda x, a, b: F.layer_norm(x, x.shape[1:]) * a + b,
    "both as weight and as value": lambda x, a, b: F.layer_norm(x, (WIDTH,), a, a) * b,
    "used after the call": lambda x, a, b: x.square() * (1 + a) + b.float().double() * (1.0 + b.type_as(x)),
}


def assert_as_without_stand_ins(model):
    """Under an ordinary loss bit for bit, and under an unlearning loss but for rounding."""
    ids, _ = batch_of()
    plain = copy.deepcopy(model)
    RowForwards(model, None)
    results = []
    for each in (model, plain):
        logits = each(ids)
        logits.square().mean().backward()
        results.append((logits.detach(), {name: param.grad for name, param in each.named_parameters()}))
    assert_same_bits(*results)
    engine_of(plain)


@pytest.mark.parametrize("function", USES.values(), ids=USES)
def test_uses_of_a_parameter(function):
    model = Model(nn.Sequential(Layer(), Uses(function), Layer())).double()
    assert_as_without_stand_ins(model)


def test_a_library_that_replaces_linear(monkeypatch):
    monkeypatch.setattr(F, "linear", LinearOfZero3.apply)
    model, batch = tiny_model("torch_llama", torch.float64), tiny_batch()
    expected = ordinary(copy.deepcopy(model), batch)
    handle = sk.patch(model, scope="all")
    actual = ordinary(model, batch)
    assert all(actual[1][name] is not None for name in expected[1])
    assert max(distances(actual[1], expected[1]).values()) <= 1e-12
    model.zero_grad()
    handle.unlearning_loss(logits_of(model, batch), batch["labels"], FORGET).backward()
    assert handle.gradient_path.engine == "two-backward"
    assert all(param.grad.any() and param.target_grad is not None for param in model.parameters())


@pytest.mark.parametrize("ids", [torch.tensor(2), torch.arange(5), torch.arange(5)[None], torch.ones(3, 2, 4).long()])
def test_an_embedding_gives_the_shape_that_it_was_asked_for(ids):
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.linear = nn.Embedding(8, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.linear(x) * self.table(ids).view(-1, WIDTH).sum(0)

    model, seen = Model(Inner()).double(), []
    model.inner.table.register_forward_hook(lambda _module, _args, y: seen.append(y.shape))
    batch, _ = batch_of()
    expected = model(batch)
    RowForwards(model, None)
    assert torch.equal(model(batch), expected)
    assert seen[0] == seen[1] == (*ids.shape, WIDTH)
    engine_of(Model(Inner()))


def test_second_derivatives():
    model = Model(nn.Sequential(Layer(), Uses(USES["rms_norm"]), Uses(USES["layer_norm"]), Uses(USES["out of order"])))
    model = model.double()
    ids, _ = batch_of()
    params = list(model.parameters())

    def penalty():
        grads = torch.autograd.grad(model(ids).sin().sum(), params, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), params)

    expected = penalty()
    RowForwards(model, None)
    for name, actual, wanted in zip(dict(model.named_parameters()), penalty(), expected, strict=True):
        assert torch.allclose(actual, wanted, rtol=1e-9, atol=1e-12), name


def test_transforms_of_torch_func():
    model = Model(Layer()).double()
    ids, _ = batch_of()

    def found():
        params = {name: param.detach() for name, param in model.named_parameters()}
        loss = lambda params: torch.func.functional_call(model, params, (ids,)).square().mean()  # noqa: E731
        return torch.func.grad(loss)(params)

    expected = found()
    sk.patch(model, scope="all")
    for name, grad in found().items():
        assert torch.equal(grad, expected[name])


def test_threads_leave_the_parameters_in_place():
    started, go_on = threading.Event(), threading.Event()

    def slowly(x):
        started.set()
        go_on.wait(20)
        return x

    model = Model(Uses(lambda x, a, b: slowly(x) * a + b)).double()
    params, (ids, labels) = dict(model.named_parameters()), batch_of()
    handle = sk.patch(model, scope="all")
    logits = {}
    first = threading.Thread(target=lambda: logits.update(first=model(ids)))
    first.start()
    started.wait(20)
    second = threading.Thread(target=lambda: logits.update(second=model(ids)))
    second.start()
    go_on.set()
    first.join()
    second.join()
    assert all(param is params[name] and type(param) is nn.Parameter for name, param in model.named_parameters())
    for part in logits.values():
        model.zero_grad()
        handle.unlearning_loss(part, labels, FORGET, target=TARGET).backward()
        assert all(param.grad is not None and param.target_grad is not None for param in params.values())


def test_a_forward_that_replaces_its_parameter():
    class Renewed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(WIDTH))

        def forward(self, x):
            self.weight = nn.Parameter(torch.full((WIDTH,), 2.0))
            return x * self.weight

    model = Model(Renewed())
    sk.patch(model, scope="all")
    model(batch_of()[0])
    assert torch.equal(model.inner.weight, torch.full((WIDTH,), 2.0))


def test_a_forward_that_raises_puts_the_parameters_back():
    def failing(x, a, b):
        raise KeyError("a fault of the model's")

    model = Model(Uses(failing))
    params = dict(model.named_parameters())
    sk.patch(model, scope="all")
    with pytest.raises(KeyError):
        model(batch_of()[0])
    assert all(param is params[name] for name, param in model.named_parameters())


@pytest.mark.parametrize("function", [lambda grad: grad * 0, lambda grad: grad.clamp(-1e-3, 1e-3), lambda grad: None])
def test_gradient_hooks_reach_the_target_gradient(function):
    model, batch = tiny_model("torch_llama", torch.float64), tiny_batch()
    found = {}
    for engine in ("one-backward", "two-backward"):
        copied = copy.deepcopy(model)
        for name in ("lm_head.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight"):
            copied.get_parameter(name).register_hook(function)
        handle = sk.patch(copied, scope="all", engine=engine)
        for _ in range(2):
            handle.unlearning_loss(logits_of(copied, batch), batch["labels"], FORGET, target=TARGET).backward()
        assert handle.gradient_path.engine == engine
        found[engine] = both_gradients(copied)
    for actual, expected in zip(*found.values(), strict=True):
        assert max(distances(actual, expected).values()) <= 1e-10


@pytest.mark.parametrize("engine", ["one-backward", "two-backward"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_step_that_was_given_up_leaves_nothing(engine, set_to_none):
    model, batch = tiny_model("torch_llama", torch.float64), tiny_batch()
    handle = sk.patch(model, scope="all", engine=engine)

    def backward():
        handle.unlearning_loss(logits_of(model, batch), batch["labels"], FORGET, target=TARGET).backward()
        return both_gradients(model)

    (_, once) = backward()
    once = {name: grad.clone() for name, grad in once.items()}
    model.zero_grad(set_to_none=set_to_none)  # which knows nothing of target_grad
    (_, again) = backward()
    assert max(distances(again, once).values()) <= 1e-12
    (_, twice) = backward()
    assert max(distances(twice, {name: 2 * grad for name, grad in once.items()}).values()) <= 1e-12


HOOKS = {
    "backward hook": lambda module: module.register_full_backward_hook(
        lambda _m, grads, _g: (grads[0].clamp(-1e-4, 1e-4),)
    ),
    "backward pre-hook": lambda module: module.register_full_backward_pre_hook(lambda _m, grads: (grads[0] * 2,)),
    "forward hook": lambda module: module.register_forward_hook(lambda _m, _args, y: y * 2),
    "in place on the output": lambda module: module.register_forward_hook(lambda _m, _args, y: y.add_(1).mul_(2)),
}


@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
def test_hooks_on_modules(hook):
    model = Model(nn.Sequential(Layer(), Layer())).double()
    hook(model.inner[1].linear)
    assert_as_without_stand_ins(model)
