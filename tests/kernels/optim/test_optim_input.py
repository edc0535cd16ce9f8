"""SsiuuAdamW and SsiuuPenalty given what they cannot use, or what is unusual: right, or refused and nothing written."""

import copy
import logging
import math

import pytest
import torch

import ssiuu_kernels as sk
from ssiuu_kernels.gradients.target_grad import TargetGradInfo
from ssiuu_kernels.optim import penalised

OPTIONS = {"lr": 0.1, "penalty_weight": 10.0, "weight_decay": 0.1}


def parameters(*sizes):
    params = [torch.nn.Parameter(torch.randn(size)) for size in sizes or ((30,), (5, 7))]
    give_gradients(params)
    return params


def give_gradients(params):
    for param in params:
        param.grad, param.target_grad = torch.randn_like(param), torch.randn_like(param)


def run(optimizer, steps=1):
    for _ in range(steps):
        give_gradients(optimizer.param_groups[0]["params"])
        apply(optimizer)


def apply(optimizer):
    optimizer.apply_() if isinstance(optimizer, sk.SsiuuPenalty) else optimizer.step()


def everything(optimizer):
    """Copies of all that a step writes."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    grads = [param.grad.to_dense() for param in params if param.grad is not None]
    states = [optimizer.state[param] for param in params if param in optimizer.state]
    values = [value for state in states for value in state.values()]
    return [torch.as_tensor(x).detach().clone() for x in (*params, *grads, *values)]


def assert_refused(optimizer, message, error=ValueError):
    before = everything(optimizer)
    with pytest.raises(error, match=message):
        apply(optimizer)
    after = everything(optimizer)[: len(before)]
    assert all(torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in zip(before, after, strict=True))


BOTH = [sk.SsiuuAdamW, sk.SsiuuPenalty]
BAD_GROUPS = {
    "a share above 1": ("penalty_share=1.5", {"penalty_share": 1.5}),
    "NaN for a share": ("penalty_share=nan", {"penalty_share": math.nan}),
    "a negative weight": ("penalty_weight=-1", {"penalty_weight": -1.0}),
    "NaN for a weight": ("penalty_weight=nan", {"penalty_weight": math.nan}),
    "a weight that overflows": (r"penalty_weight=1e\+39", {"penalty_weight": 1e39}),
    "an infinite weight in a tensor": ("penalty_weight=inf", {"penalty_weight": torch.tensor(math.inf)}),
    "a weight with a dimension": (r"penalty_weight has shape \[1\]", {"penalty_weight": torch.ones(1)}),
    "a share from a weight of 0": ("cannot be steered", {"penalty_weight": 0.0, "penalty_share": 0.5}),
    "an unknown anchor": ("anchor='first'; expected one of previous, original", {"anchor": "first"}),
    "maximize": ("maximize=True", {"maximize": True}),
    "amsgrad": ("amsgrad=True", {"amsgrad": True}),
    "differentiable": ("differentiable=True", {"differentiable": True}),
    "decay in the gradient": ("decoupled_weight_decay=False", {"decoupled_weight_decay": False}),
}
BAD_ADAMW_GROUPS = {
    "NaN for lr": ("lr=nan", {"lr": math.nan}),
    "NaN for lr in a tensor": ("lr=nan", {"lr": torch.tensor(math.nan)}),
    "an lr with a dimension": (r"lr has shape \[2\]", {"lr": torch.ones(2)}),
    "a negative lr": ("lr=-1", {"lr": -1.0}),
    "an infinite eps": ("eps=inf", {"eps": math.inf}),
    "a negative decay": ("weight_decay=-1", {"weight_decay": -1.0}),
    "a beta of 1": ("betas", {"betas": (0.9, 1.0)}),
}
CASES = [(kind, *case) for kind in BOTH for case in BAD_GROUPS.values()]
CASES += [(sk.SsiuuAdamW, *case) for case in BAD_ADAMW_GROUPS.values()]


@pytest.mark.parametrize(("kind", "message", "options"), CASES)
def test_a_bad_option_of_a_group_is_found_before_anything_is_written(kind, message, options):
    """Given to the constructor, to add_param_group, loaded, or edited by hand; in the second of two groups."""
    params = parameters()
    groups = [{"params": [params[0]]}, {"params": [params[1]]}]
    with pytest.raises(ValueError, match=message):
        kind([groups[0], {**groups[1], **options}])
    optimizer = kind(params[:1])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({**groups[1], **options})
    assert len(optimizer.param_groups) == 1
    optimizer = kind(groups)
    run(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][1].update(options)
    before = everything(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert all(torch.equal(x, y) for x, y in zip(before, everything(optimizer), strict=True))
    optimizer.param_groups[1].update(options)
    give_gradients(params)
    assert_refused(optimizer, message)


def test_options_that_change_nothing_are_let_be():
    (param,) = parameters((30,))
    optimizer = sk.SsiuuAdamW([{"params": [param], "foreach": True, "maximize": False, "name": "all"}], **OPTIONS)
    optimizer.step()
    assert optimizer.param_groups[0]["name"] == "all"


def sparse(params):
    params[1].grad = torch.sparse_coo_tensor([[0], [1]], [1.0], (5, 7))


def other_shape(params):
    params[1].target_grad = torch.randn(7, 5)


def other_type(params):
    params[1].target_grad = params[1].target_grad.bfloat16()


def no_target(params):
    params[1].target_grad = None


def shared_memory(params):
    params[1].grad = params[1].data


def transposed(params):
    params[1].data = torch.randn(7, 5).t()


BAD_TENSORS = {
    "a sparse gradient": ("sparse", sparse),
    "another shape": ("target_grad", other_shape),
    "another type": ("target_grad", other_type),
    "no target gradient": ("no target_grad", no_target),
    "shared memory": ("share memory", shared_memory),
    "a parameter that is transposed": ("not contiguous", transposed),
}


@pytest.mark.parametrize("alone", [True, False], ids=["launches of their own", "one launch"])
@pytest.mark.parametrize(("message", "spoil"), BAD_TENSORS.values(), ids=BAD_TENSORS)
@pytest.mark.parametrize("kind", BOTH)
def test_a_bad_tensor_is_found_before_anything_is_written(kind, message, spoil, alone, monkeypatch):
    monkeypatch.setattr(penalised, "SMALL", 0 if alone else penalised.SMALL)
    params = parameters()
    optimizer = kind(params)
    run(optimizer)
    give_gradients(params)
    spoil(params)
    assert_refused(optimizer, message)


@pytest.mark.parametrize("kind", BOTH)
def test_a_backend_that_cannot_take_one_of_the_types_is_found_before_anything_is_written(kind):
    params = [torch.nn.Parameter(torch.randn(9).to(dtype)) for dtype in (torch.float32, torch.float16)]
    optimizer = kind(params, backend="native")
    give_gradients(params)
    assert_refused(optimizer, "float16 is not supported")


@pytest.mark.parametrize("kind", BOTH)
def test_parameters_of_many_types_are_updated_alike(kind):
    types = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    params = [torch.nn.Parameter(torch.randn(9).to(dtype)) for dtype in types]
    optimizer = kind(params, **(OPTIONS if kind is sk.SsiuuAdamW else {}))
    before = everything(optimizer)
    run(optimizer, 2)
    states = [optimizer.state[param]["prev_attribution"].dtype for param in params]
    assert states == [torch.float32, torch.float32, torch.bfloat16, torch.float64]
    written = params if kind is sk.SsiuuAdamW else [param.grad for param in params]
    assert not any(torch.equal(x, y) for x, y in zip(written, before, strict=False))


def test_float16_is_trained_in_steps_of_the_learning_rate():
    """The square of its gradients is 0 in float16."""
    param = torch.nn.Parameter(torch.ones(9, dtype=torch.float16))
    optimizer = sk.SsiuuAdamW([param], lr=0.01, penalty_weight=0.0)
    for _ in range(5):
        param.grad, param.target_grad = torch.full_like(param, 1e-4), torch.zeros_like(param)
        optimizer.step()
    assert torch.allclose(param.float(), torch.tensor(0.95), atol=2e-3)


@pytest.mark.parametrize("kind", BOTH)
def test_a_target_gradient_without_a_gradient_is_part_of_no_step(kind):
    params = parameters()
    optimizer = kind(params)
    params[1].grad = None
    apply(optimizer)
    assert params[1].target_grad is None


BAD_PARAMETERS = {
    "a complex one": (TypeError, "parameter 1", lambda p: [p, torch.nn.Parameter(torch.ones(3, dtype=torch.cfloat))]),
    "a transposed one": (ValueError, "not contiguous", lambda p: [p, torch.nn.Parameter(torch.randn(3, 4).t())]),
    "one twice": (ValueError, "twice", lambda p: [p, p]),
}


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.parametrize(("error", "message", "params"), BAD_PARAMETERS.values(), ids=BAD_PARAMETERS)
@pytest.mark.parametrize("kind", BOTH)
def test_parameters_that_cannot_be_updated_are_refused(kind, error, message, params):
    first, fresh = parameters((3,), (3,))
    with pytest.raises(error, match=message):
        kind(params(first))
    optimizer = kind([fresh])
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": params(first)})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("update_in_backward", [False, True])
def test_frozen_parameters_of_any_kind_are_left_alone(update_in_backward):
    (param,) = parameters((30,))
    frozen = [
        torch.nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=False)
        for dtype in (torch.uint8, torch.float32, torch.cfloat)
    ]
    frozen.append(torch.nn.Parameter(torch.randn(3, 4).t(), requires_grad=False))
    optimizer = sk.SsiuuAdamW([*frozen, param], update_in_backward=update_in_backward, **OPTIONS)
    before = param.detach().clone()
    param.grad = None
    (param * 2).sum().backward()
    optimizer.step()
    assert not torch.equal(param, before)
    assert all(x.requires_grad is False and x not in optimizer.state for x in frozen)


@pytest.mark.parametrize("kind", BOTH)
def test_an_empty_parameter(kind):
    params = parameters((0,), (0, 4), (5,))
    optimizer = kind(params)
    run(optimizer, 2)
    assert optimizer.last_stats.loss_grad_norm.isfinite()


@pytest.mark.parametrize("kind", BOTH)
def test_gradients_that_are_not_contiguous(kind):
    params = parameters((5, 7))
    others = [torch.nn.Parameter(param.detach().clone()) for param in params]
    optimizers = [kind(params), kind(others)]
    for _ in range(2):
        give_gradients(params)
        for param, other in zip(params, others, strict=True):
            other.grad, other.target_grad = (x.t().contiguous().t() for x in (param.grad, param.target_grad))
        for optimizer in optimizers:
            apply(optimizer)
    assert all(torch.equal(x, y) for x, y in zip(everything(optimizers[0]), everything(optimizers[1]), strict=True))


@pytest.mark.parametrize("kind", BOTH)
def test_two_steps_after_one_backward_are_refused(kind):
    optimizer = kind(parameters())
    run(optimizer)
    assert_refused(optimizer, "before every step")


@pytest.mark.parametrize("kind", BOTH)
def test_more_than_one_process_is_refused(kind, monkeypatch):
    optimizer = kind(parameters())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert_refused(optimizer, "2 processes; expected one")


def test_a_closure_gives_the_loss():
    params = parameters()
    optimizer = sk.SsiuuAdamW(params, **OPTIONS)

    def closure():
        optimizer.zero_grad()
        give_gradients(params)
        return torch.tensor(3.0, requires_grad=True) * 2

    loss = optimizer.step(closure)
    assert loss == 6
    assert loss.requires_grad


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1, dtype=torch.float64)], ids=["a number", "a tensor"])
def test_a_scheduler_sets_the_rate(lr):
    params = parameters()
    others = [torch.nn.Parameter(param.detach().clone()) for param in params]
    optimizer, other = sk.SsiuuAdamW(params, lr=lr), sk.SsiuuAdamW(others, lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for step in range(3):
        give_gradients(params)
        for param, twin in zip(params, others, strict=True):
            twin.grad, twin.target_grad = param.grad.clone(), param.target_grad.clone()
        other.param_groups[0]["lr"] = 0.1 * 0.5**step
        optimizer.step()
        other.step()
        scheduler.step()
    assert all(torch.allclose(x, y, rtol=1e-6) for x, y in zip(params, others, strict=True))


@pytest.mark.parametrize("kind", BOTH)
def test_states_that_the_user_cleared_start_again(kind):
    params = parameters()
    optimizer = kind(params)
    run(optimizer, 3)
    optimizer.state.clear()
    run(optimizer)
    assert [optimizer.state[param]["step"] for param in params] == [1, 1]
    assert optimizer.last_stats.penalty_grad_norm == 0


def test_a_state_that_lacks_a_moment_is_refused():
    params = parameters()
    optimizer = sk.SsiuuAdamW(params, **OPTIONS)
    run(optimizer)
    del optimizer.state[params[1]]["exp_avg"]
    give_gradients(params)
    assert_refused(optimizer, "no exp_avg")


@pytest.mark.parametrize("kind", BOTH)
def test_an_attribution_that_was_nan_heals(kind):
    """One NaN among the target gradients of one step spoils neither weights nor later penalties."""
    params = parameters((30,))
    optimizer = kind(params, penalty_weight=10.0)
    params[0].target_grad[3] = math.nan
    apply(optimizer)
    run(optimizer, 2)
    assert all(x.isfinite().all() for x in everything(optimizer))
    assert optimizer.last_stats.value > 0


def without_forget_samples(params):
    for param in params:
        param.grad, param.target_grad = torch.randn_like(param), None
        param.target_grad_info = TargetGradInfo(samples=0, grad_version=None, scale=torch.ones(()))


@pytest.mark.parametrize("first", [True, False], ids=["the first step", "a later step"])
@pytest.mark.parametrize("options", [{}, {"capturable": True}, {"penalty_share": 0.3}], ids=str)
def test_a_step_without_forget_samples_is_adamw(options, first):
    params = parameters()
    optimizer = sk.SsiuuAdamW(params, **OPTIONS, **options)
    run(optimizer, 0 if first else 2)
    others = [torch.nn.Parameter(param.detach().clone()) for param in params]
    plain = torch.optim.AdamW(others, lr=0.1, weight_decay=0.1)
    for param, other in zip(params, others, strict=True):
        state = optimizer.state.get(param)
        if state:
            moments = {name: state[name].clone() for name in ("exp_avg", "exp_avg_sq")}
            plain.state[other] = {"step": torch.tensor(float(state["step"])), **moments}
    before = [optimizer.state[p]["prev_attribution"].clone() if not first else None for p in params]
    weight = optimizer.penalty_weight
    without_forget_samples(params)
    for param, other in zip(params, others, strict=True):
        other.grad = param.grad.clone()
    optimizer.step()
    plain.step()
    for param, other, attribution in zip(params, others, before, strict=True):
        assert torch.allclose(param, other, rtol=1e-5, atol=1e-6)
        kept = optimizer.state[param]["prev_attribution"]
        assert kept.isnan().all() if first else torch.equal(kept, attribution)
        assert param.target_grad_info is None
    assert optimizer.penalty_weight == weight
    run(optimizer)
    assert (optimizer.last_stats.penalty_grad_norm == 0) == first  # nothing was measured before the second step
    run(optimizer)
    assert optimizer.last_stats.penalty_grad_norm > 0


def test_a_penalty_without_forget_samples_adds_nothing():
    params = parameters()
    penalty = sk.SsiuuPenalty(params, penalty_weight=10.0)
    run(penalty, 2)
    before = [penalty.state[param]["prev_attribution"].clone() for param in params]
    without_forget_samples(params)
    grads = [param.grad.clone() for param in params]
    assert penalty.apply_() is None
    assert all(torch.equal(param.grad, grad) for param, grad in zip(params, grads, strict=True))
    for param, attribution in zip(params, before, strict=True):
        assert torch.equal(penalty.state[param]["prev_attribution"], attribution)


CHANGES = {
    "clipped": (True, 1.0, True),
    "unscaled by a GradScaler": (True, 65536.0, False),
    "left alone": (False, 1.0, False),
}


@pytest.mark.parametrize(("changed", "scale", "warned"), CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("kind", BOTH)
def test_gradients_that_were_changed_are_warned_of_once(kind, changed, scale, warned, caplog):
    params = parameters()
    optimizer = kind(params)
    with caplog.at_level(logging.WARNING, "ssiuu_kernels"):
        for _ in range(2):
            give_gradients(params)
            for param in params:
                version = param.grad._version
                param.target_grad_info = TargetGradInfo(samples=2, grad_version=version, scale=torch.tensor(scale))
                if changed:
                    param.grad.mul_(0.5)
            apply(optimizer)
    messages = [record.message for record in caplog.records if "max_grad_norm=0.0" in record.message]
    assert len(messages) == warned
