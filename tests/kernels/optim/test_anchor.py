"""The anchors "previous" and "original", and `set_anchor`: steps against float64 formulas, and checkpoints."""

import copy
import math

import pytest
import torch

import ssiuu_kernels as sk
from ssiuu_kernels.optim import update_in_backward

from ...support.models import logits_of, tiny_batch, tiny_model
from .test_optim_input import apply, everything, without_forget_samples

ANCHORS = ["previous", "original"]
SIZES = ((30,), (5, 7), (1,))
ADAMW = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
WEIGHT = 0.5
KINDS = {
    "plain": {},
    "capturable": {"capturable": True},
    "update in backward": {"update_in_backward": True},
    "steered": {"penalty_share": 0.3},
}


@pytest.fixture(autouse=True)
def _hooks_on_matrices(monkeypatch):
    """The matrix is updated in the backward, the vectors wait for the step."""
    monkeypatch.setattr(update_in_backward, "WAITING", 35)


def parameters(dtype=torch.float64):
    return [torch.nn.Parameter(torch.randn(size).to(dtype)) for size in SIZES]


def gradients(params):
    """Of one step: dL and gP of every parameter."""
    return [(torch.randn_like(param), torch.randn_like(param)) for param in params]


def step(optimizer, params, grads):
    for param, (_, target_grad) in zip(params, grads, strict=True):
        param.grad, param.target_grad = None, target_grad.clone()
    sum((param * grad).sum() for param, (grad, _) in zip(params, grads, strict=True)).backward()
    apply(optimizer)


class Expected:
    """Algorithm 1 and AdamW for one parameter, in float64, with the anchor as a number or None."""

    def __init__(self, param, anchor):
        self.param, self.anchor = param.detach().double().clone(), anchor
        self.mean, self.square = torch.zeros_like(self.param), torch.zeros_like(self.param)
        self.kept, self.steps = None, 0

    def penalised(self, grad, target_grad, weight):
        """dJ and R_t; stores A_t where the anchor says so."""
        attribution = self.param * target_grad
        change = torch.zeros_like(grad) if self.kept is None else attribution - self.kept
        change = torch.where(attribution < 0, change, 0)
        if self.kept is None or self.anchor == "previous":
            self.kept = attribution
        return grad + 2 * weight * change * target_grad, change.square().sum()

    def step(self, grad, target_grad, weight):
        total, value = self.penalised(grad, target_grad, weight)
        self.steps += 1
        beta1, beta2 = ADAMW["betas"]
        self.mean = beta1 * self.mean + (1 - beta1) * total
        self.square = beta2 * self.square + (1 - beta2) * total.square()
        mean, square = self.mean / (1 - beta1**self.steps), self.square / (1 - beta2**self.steps)
        decayed = self.param * (1 - ADAMW["lr"] * ADAMW["weight_decay"])
        self.param = decayed - ADAMW["lr"] * mean / (square.sqrt() + ADAMW["eps"])
        return value


def assert_steps(optimizer, params, expected, steps, before_step=lambda: None):
    for _ in range(steps):
        before_step()
        grads = gradients(params)
        step(optimizer, params, grads)
        values = [own.step(*pair, optimizer.last_weight) for own, pair in zip(expected, grads, strict=True)]
        torch.testing.assert_close(optimizer.last_stats.value, sum(values), rtol=1e-10, atol=0.0)
    for param, own in zip(params, expected, strict=True):
        torch.testing.assert_close(param.detach(), own.param, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(optimizer.state[param]["prev_attribution"], own.kept, rtol=1e-10, atol=1e-12)


def prepared(kind, anchor, **options):
    params = parameters()
    optimizer = sk.SsiuuAdamW(params, **ADAMW, penalty_weight=WEIGHT, anchor=anchor, **KINDS[kind], **options)
    return params, optimizer, [Expected(param, anchor) for param in params]


@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("kind", KINDS)
def test_adamw_equals_the_formulas(kind, anchor):
    params, optimizer, expected = prepared(kind, anchor)
    assert_steps(optimizer, params, expected, 5)
    assert (optimizer.penalty_weight != WEIGHT) == (kind == "steered")


def test_a_model_takes_the_steps_of_version_0_1_0_bit_for_bit():
    """Whose optimizer called the op with the number of the step, and without an anchor to keep."""
    model, batch = tiny_model(), tiny_batch()
    twins = {param: param.detach().clone() for param in model.parameters()}
    names = ("prev_attribution", "exp_avg", "exp_avg_sq")
    states = {param: {name: torch.zeros_like(twin) for name in names} for param, twin in twins.items()}
    optimizer = sk.SsiuuAdamW(model.parameters(), **ADAMW, penalty_weight=10.0)
    forget = torch.tensor([True, True, False, False])
    for number in range(1, 6):
        with sk.patch(model, scope="all") as handle:
            logits = logits_of(model, batch)
            handle.unlearning_loss(logits, batch["labels"], forget, target="geometric_mean_prob").backward()
            value = 0.0
            for param, twin in twins.items():
                grads = (param.grad.clone(), param.target_grad.clone())
                tensors = (twin, *grads, *states[param].values())
                value += sk.ops.penalty_adamw_(*tensors, step=number, weight=10.0, **ADAMW).value
            optimizer.step()
            assert optimizer.last_stats.value == pytest.approx(float(value), rel=1e-12)
            optimizer.zero_grad()
    assert value > 0
    for param, twin in twins.items():
        assert torch.equal(param, twin)
        assert all(torch.equal(optimizer.state[param][name], states[param][name]) for name in names)


@pytest.mark.parametrize("anchor", ANCHORS)
def test_the_penalty_alone_equals_the_formulas(anchor):
    params = parameters()
    penalty = sk.SsiuuPenalty(params, penalty_weight=WEIGHT, anchor=anchor)
    expected = [Expected(param, anchor) for param in params]
    for _ in range(4):
        grads = gradients(params)
        step(penalty, params, grads)
        found = [own.penalised(*pair, WEIGHT) for own, pair in zip(expected, grads, strict=True)]
        torch.testing.assert_close(penalty.last_stats.value, sum(value for _, value in found), rtol=1e-10, atol=0.0)
        for param, own, (total, _) in zip(params, expected, found, strict=True):
            torch.testing.assert_close(param.grad, total)
            param.data.mul_(0.9)  # another optimizer's step
            own.param *= 0.9


@pytest.mark.parametrize("anchor", ANCHORS)
def test_stochastic_rounding_leaves_the_original_as_it_is(anchor):
    """Each step from the bfloat16 weights that it finds: R_t by the formula, and the anchor kept to the bit."""
    params = parameters(torch.bfloat16)
    options = {"anchor": anchor, "stochastic_rounding": True, "seed": 3}
    optimizer = sk.SsiuuAdamW(params, **ADAMW, penalty_weight=WEIGHT, **options)
    first = None
    for _ in range(4):
        grads = gradients(params)
        kept = [optimizer.state[p]["prev_attribution"].clone() for p in params] if first else None
        attributions = [p.detach().double() * pair[1].double() for p, pair in zip(params, grads, strict=True)]
        step(optimizer, params, grads)
        now = [optimizer.state[param]["prev_attribution"].clone() for param in params]
        if first is None:
            first = now
            continue
        changes = [(a - k.double())[a < 0] for a, k in zip(attributions, kept, strict=True)]
        value = sum(change.square().sum() for change in changes)
        torch.testing.assert_close(optimizer.last_stats.value, value, rtol=1e-5, atol=0.0)
        same = [torch.equal(x, y) for x, y in zip(now, first, strict=True)]
        assert same == [anchor == "original"] * len(params)


@pytest.mark.parametrize("capturable", [False, True])
def test_the_original_is_measured_by_the_first_step_that_has_forget_samples(capturable):
    params = parameters()
    optimizer = sk.SsiuuAdamW(params, **ADAMW, anchor="original", capturable=capturable)
    without_forget_samples(params)
    optimizer.step()
    grads = gradients(params)
    attributions = [param.detach() * pair[1] for param, pair in zip(params, grads, strict=True)]
    step(optimizer, params, grads)
    assert optimizer.last_stats.value == 0
    step(optimizer, params, gradients(params))
    assert optimizer.last_stats.value > 0
    for param, attribution in zip(params, attributions, strict=True):
        assert torch.equal(optimizer.state[param]["prev_attribution"], attribution)


def test_each_group_has_its_own_anchor():
    params = parameters()
    groups = [{"params": params[:1], "anchor": "original"}, {"params": params[1:]}]
    optimizer = sk.SsiuuAdamW(groups, **ADAMW, penalty_weight=WEIGHT)
    anchors = ["original", "previous", "previous"]
    expected = [Expected(param, anchor) for param, anchor in zip(params, anchors, strict=True)]
    assert_steps(optimizer, params, expected, 4)


@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_first_step_is_compared_with_a_given_anchor(kind, anchor):
    """R_1 is not 0, and AdamW's bias corrections are still those of its first step."""
    params, optimizer, expected = prepared(kind, anchor)
    given = {param: torch.randn_like(param) for param in params}
    optimizer.set_anchor(given)
    for param, own in zip(params, expected, strict=True):
        own.kept = given[param].detach().clone()
        given[param].zero_()  # it was copied
    assert_steps(optimizer, params, expected, 1)
    assert optimizer.last_stats.value > 0
    assert (optimizer.penalty_weight != WEIGHT) == (kind == "steered")
    assert_steps(optimizer, params, expected, 3)


@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_anchor_is_given_for_every_batch(kind, anchor):
    params, optimizer, expected = prepared(kind, anchor)

    def give():
        given = {param: torch.randn_like(param).float() for param in params}  # of another type than the states
        optimizer.set_anchor(given)
        for param, own in zip(params, expected, strict=True):
            own.kept = given[param].double()

    assert_steps(optimizer, params, expected, 4, give)


def test_a_given_anchor_of_the_penalty_alone():
    params = parameters()
    penalty = sk.SsiuuPenalty(params, penalty_weight=WEIGHT)
    grads, given = gradients(params), [torch.randn_like(param) for param in params]
    penalty.set_anchor(dict(zip(params, given, strict=True)))
    step(penalty, params, grads)
    for param, (grad, target_grad), before in zip(params, grads, given, strict=True):
        attribution = param.detach() * target_grad
        change = torch.where(attribution < 0, attribution - before, 0)
        torch.testing.assert_close(param.grad, grad + 2 * WEIGHT * change * target_grad)


def test_an_anchor_is_given_to_some_and_in_place():
    """A captured graph reads the same memory again; what is not named stays."""
    params, optimizer, _ = prepared("plain", "original")
    step(optimizer, params, gradients(params))
    first, second, third = (optimizer.state[param]["prev_attribution"] for param in params)
    before = second.clone(), third.clone()
    optimizer.set_anchor({params[0]: torch.full_like(params[0], 2.0)})
    assert optimizer.state[params[0]]["prev_attribution"] is first
    assert first.eq(2.0).all()
    assert torch.equal(second, before[0])
    assert torch.equal(third, before[1])


def test_a_given_anchor_of_some_steers_by_those_alone():
    """The other parameter has nothing to be compared with, and would make the share look low."""
    old, new = (torch.nn.Parameter(torch.randn(2000)) for _ in range(2))
    for capturable in (False, True):
        alone, both = (
            sk.SsiuuAdamW(params, lr=0.0, penalty_share=0.3, capturable=capturable) for params in ([old], [old, new])
        )
        given, grads = {old: torch.randn_like(old)}, gradients([old, new])
        for optimizer, params in ((alone, [old]), (both, [old, new])):
            optimizer.set_anchor(given)
            step(optimizer, params, grads[: len(params)])
        assert both.penalty_weight == alone.penalty_weight != 1e-3


BAD_ANCHORS = {
    "a foreign parameter": (ValueError, "not a parameter of this optimizer", lambda p: {p[0].detach().clone(): p[0]}),
    "a name": (ValueError, "a str of shape .*not a parameter of this optimizer", lambda p: {"weight": p[0]}),
    "another shape": (ValueError, r"parameter 1 has shape \[7, 5\]", lambda p: {p[1]: torch.zeros(7, 5)}),
    "a broadcast": (ValueError, r"parameter 1 has shape \[\]", lambda p: {p[1]: torch.tensor(1.0)}),
    "integers": (TypeError, "parameter 1 has dtype torch.int64", lambda p: {p[1]: torch.zeros(5, 7).long()}),
    "a list": (TypeError, "parameter 1 is a list", lambda p: {p[1]: [0.0]}),
    "NaN": (ValueError, "parameter 1 is not finite", lambda p: {p[1]: torch.full((5, 7), math.nan)}),
    "an overflow": (
        ValueError, "parameter 1 is not finite in torch.bfloat16", lambda p: {p[1]: torch.full((5, 7), 3.4e38)}
    ),
    "no mapping": (TypeError, "values is a list; expected a mapping", lambda p: [torch.zeros(30)]),
}  # fmt: skip


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize(("error", "message", "values"), BAD_ANCHORS.values(), ids=BAD_ANCHORS)
@pytest.mark.parametrize("kind", [sk.SsiuuAdamW, sk.SsiuuPenalty])
def test_a_bad_anchor_changes_nothing(kind, error, message, values, stepped):
    params = parameters(torch.bfloat16)
    optimizer = kind(params)
    if stepped:
        step(optimizer, params, gradients(params))
    before = everything(optimizer)
    values = values(params)
    if isinstance(values, dict):
        values = {params[0]: torch.ones(30), **values}
    with pytest.raises(error, match=message):
        optimizer.set_anchor(values)
    assert len(everything(optimizer)) == len(before)
    assert all(torch.equal(x, y) for x, y in zip(before, everything(optimizer), strict=True))


def test_an_anchor_that_comes_after_the_backward_is_refused():
    params, optimizer, _ = prepared("update in backward", "original")
    for param, (_, target_grad) in zip(params, gradients(params), strict=True):
        param.target_grad = target_grad
    sum(param.square().sum() for param in params).backward()
    with pytest.raises(ValueError, match="call it before the backward"):
        optimizer.set_anchor({params[0]: torch.zeros_like(params[0])})
    optimizer.step()
    optimizer.set_anchor({params[0]: torch.zeros_like(params[0])})


def twin_of(params, optimizer, **options):
    """Copies of the parameters under an optimizer that has loaded the state of another."""
    others = [torch.nn.Parameter(param.detach().clone()) for param in params]
    other = sk.SsiuuAdamW(others, **options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return others, other


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("anchor", ANCHORS)
def test_resumes_bit_for_bit(anchor, steps):
    """Before the first step too: the state then holds nothing but the anchor that was given."""
    params, optimizer, _ = prepared("steered", anchor)
    optimizer.set_anchor({param: torch.randn_like(param) for param in params})
    for _ in range(steps):
        step(optimizer, params, gradients(params))
    others, other = twin_of(params, optimizer, anchor=anchor)
    for _ in range(2):
        grads = gradients(params)
        step(optimizer, params, grads)
        step(other, others, grads)
    assert all(torch.equal(x, y) for x, y in zip(everything(optimizer), everything(other), strict=True))
    assert other.penalty_weight == optimizer.penalty_weight


@pytest.mark.parametrize("anchor", ANCHORS)
def test_the_state_of_the_other_anchor_is_refused(anchor):
    params, optimizer, _ = prepared("plain", anchor)
    step(optimizer, params, gradients(params))
    (unwanted,) = set(ANCHORS) - {anchor}
    others, other, _ = prepared("plain", unwanted)
    step(other, others, gradients(others))
    before = everything(other)
    with pytest.raises(ValueError, match=f"anchor='{anchor}' and this optimizer has anchor='{unwanted}'"):
        other.load_state_dict(optimizer.state_dict())
    assert all(torch.equal(x, y) for x, y in zip(before, everything(other), strict=True))
    assert other.param_groups[0]["anchor"] == unwanted


def test_a_state_of_version_0_1_0_is_of_the_previous():
    """It says nothing of an anchor."""
    params, optimizer, _ = prepared("plain", "previous")
    step(optimizer, params, gradients(params))
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group["anchor"]
    others = [torch.nn.Parameter(param.detach().clone()) for param in params]
    other = sk.SsiuuAdamW(others, **ADAMW)
    other.load_state_dict(saved)
    assert other.param_groups[0]["anchor"] == "previous"
    grads = gradients(params)
    step(optimizer, params, grads)
    step(other, others, grads)
    assert all(torch.equal(x, y) for x, y in zip(everything(optimizer), everything(other), strict=True))
    with pytest.raises(ValueError, match="anchor='previous' and this optimizer has anchor='original'"):
        sk.SsiuuAdamW(others, anchor="original").load_state_dict(saved)


def test_the_state_of_adamw_has_no_anchor_yet():
    params = parameters()
    plain = torch.optim.AdamW(params, lr=1e-2)
    for param in params:
        param.grad = torch.randn_like(param)
    plain.step()
    others, other = twin_of(params, plain, anchor="original")
    assert other.param_groups[0]["anchor"] == "original"
    grads = gradients(others)
    attributions = [param.detach() * pair[1] for param, pair in zip(others, grads, strict=True)]
    step(other, others, grads)
    assert other.last_stats.value == 0
    step(other, others, gradients(others))
    assert other.last_stats.value > 0
    for param, attribution in zip(others, attributions, strict=True):
        assert torch.equal(other.state[param]["prev_attribution"], attribution)
