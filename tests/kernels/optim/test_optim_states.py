"""States of SsiuuAdamW and SsiuuPenalty that come from elsewhere: copies, pickles, checkpoints, other optimizers."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import ssiuu_kernels as sk
from ssiuu_kernels.optim import update_in_backward

from ...support.models import logits_of, tiny_batch, tiny_model
from .test_optim_input import BOTH, OPTIONS, apply, everything, give_gradients, parameters, run

FORGET = torch.tensor([True, True, False, False])
SHARED = {"lr": 1e-2, "penalty_weight": 10.0, "penalty_share": 0.3}
WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
}


@pytest.fixture(autouse=True)
def _hooks_on_matrices(monkeypatch):
    monkeypatch.setattr(update_in_backward, "WAITING", 200)


def saved_and_loaded(pair):
    buffer = io.BytesIO()
    torch.save(pair, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


WAYS["torch.save"] = saved_and_loaded
KINDS = {
    "plain": {},
    "capturable": {"capturable": True},
    "update in backward": {"update_in_backward": True},
    "options": {"state_dtype": torch.bfloat16, "stochastic_rounding": True, "seed": 3},
}


def trained(model, optimizer, steps, batch):
    for _ in range(steps):
        with sk.patch(model, scope="all") as handle:
            loss = handle.unlearning_loss(
                logits_of(model, batch), batch["labels"], FORGET, target="geometric_mean_prob"
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_a_copy_of_model_and_optimizer_goes_on_alike(options, way):
    model, batch = tiny_model(), tiny_batch()
    optimizer = sk.SsiuuAdamW(model.parameters(), **SHARED, **options)
    trained(model, optimizer, 2, batch)
    other, other_optimizer = way((model, optimizer))
    assert other_optimizer.last_weight == optimizer.last_weight
    trained(model, optimizer, 2, batch)
    trained(other, other_optimizer, 2, batch)
    for (name, param), twin in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(param, twin[1]), name
    assert other_optimizer.penalty_weight == optimizer.penalty_weight


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_copy_of_the_penalty_goes_on_alike(way):
    params = parameters()
    penalty = sk.SsiuuPenalty(params, penalty_share=0.3)
    run(penalty, 2)
    others, other = way((params, penalty))
    give_gradients(params)
    for param, twin in zip(params, others, strict=True):
        twin.grad, twin.target_grad = param.grad.clone(), param.target_grad.clone()
    apply(penalty)
    apply(other)
    assert all(torch.equal(x, y) for x, y in zip(everything(penalty), everything(other), strict=True))


def test_a_scheduled_optimizer_is_copied():
    """A scheduler wraps `step` of the instance; the copy has a step of its own."""
    params = parameters()
    optimizer = sk.SsiuuAdamW(params, **OPTIONS)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    other = copy.deepcopy(optimizer)
    before = everything(optimizer)
    run(other)
    after = everything(optimizer)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_a_copied_model_is_not_updated_by_the_first_ones_optimizer():
    """Its parameters may be given to another optimizer."""
    model, batch = tiny_model(), tiny_batch()
    optimizer = sk.SsiuuAdamW(model.parameters(), update_in_backward=True, **SHARED)
    for other in (copy.deepcopy(model), saved_and_loaded(model)):
        trained(other, sk.SsiuuAdamW(other.parameters(), update_in_backward=True, **SHARED), 1, batch)
    trained(model, optimizer, 1, batch)


def test_a_copy_between_backward_and_step_is_refused():
    model, batch = tiny_model(), tiny_batch()
    optimizer = sk.SsiuuAdamW(model.parameters(), update_in_backward=True, **SHARED)
    with sk.patch(model, scope="all") as handle:
        handle.unlearning_loss(logits_of(model, batch), batch["labels"], FORGET).backward()
    with pytest.raises(ValueError, match=r"copied between backward and step\(\)"):
        copy.deepcopy(optimizer)


@pytest.mark.parametrize(
    "options", [{}, {"update_in_backward": True}, {"capturable": True}, {"anchor": "original"}], ids=str
)
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2)], ids=["a number", "a tensor"])
def test_a_distributed_checkpoint_goes_on_alike(lr, flatten, options, tmp_path):
    """It makes the states of the fresh optimizer by a step of lr 0 on zero gradients, and without target gradients."""
    choices = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, batch = tiny_model(), tiny_batch()
    options = {**SHARED, **options, "lr": lr}
    optimizer = sk.SsiuuAdamW(model.parameters(), **options)
    trained(model, optimizer, 2, batch)
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer, options=choices)}, checkpoint_id=tmp_path)
    other = copy.deepcopy(model)
    resumed = sk.SsiuuAdamW(other.parameters(), **options)
    weights = [param.detach().clone() for param in other.parameters()]
    loaded = {"optimizer": get_optimizer_state_dict(other, resumed, options=choices)}
    dcp.load(loaded, checkpoint_id=tmp_path)
    set_optimizer_state_dict(other, resumed, loaded["optimizer"], options=choices)
    assert all(torch.equal(param, weight) for param, weight in zip(other.parameters(), weights, strict=True))
    trained(model, optimizer, 2, batch)
    trained(other, resumed, 2, batch)
    for (name, param), twin in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(param, twin), name


def test_a_distributed_state_without_anchor_is_of_the_previous():
    """Version 0.1.0 saved none. torch itself refuses a flattened one, in which any option of a group is missing."""
    model, batch = tiny_model(), tiny_batch()
    optimizer = sk.SsiuuAdamW(model.parameters(), **SHARED)
    trained(model, optimizer, 2, batch)
    saved = get_optimizer_state_dict(model, optimizer)
    for group in saved["param_groups"]:
        del group["anchor"]
    other = copy.deepcopy(model)
    resumed = sk.SsiuuAdamW(other.parameters(), **SHARED)
    set_optimizer_state_dict(other, resumed, saved)
    assert resumed.param_groups[0]["anchor"] == "previous"
    trained(model, optimizer, 2, batch)
    trained(other, resumed, 2, batch)
    for (name, param), twin in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(param, twin), name


def adamw_state(params, steps=3, **options):
    optimizer = torch.optim.AdamW(params, lr=0.1, **options)
    for _ in range(steps):
        give_gradients(params)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_the_states_of_adamw_are_taken(options, capturable):
    """The next step is AdamW's, for there is no A to be held against; the one after it penalises."""
    params = parameters()
    plain = adamw_state(params, **options)
    others = [torch.nn.Parameter(param.detach().clone()) for param in params]
    optimizer = sk.SsiuuAdamW(others, penalty_weight=10.0, penalty_share=0.3, capturable=capturable)
    optimizer.load_state_dict(plain.state_dict())
    for param, other in zip(params, others, strict=True):
        give_gradients([param])
        other.grad, other.target_grad = param.grad.clone(), param.target_grad.clone()
    plain.step()
    optimizer.step()
    assert all(torch.allclose(x, y, rtol=1e-5, atol=1e-6) for x, y in zip(params, others, strict=True))
    assert optimizer.penalty_weight == 10.0
    assert optimizer.last_stats.penalty_grad_norm == 0
    run(optimizer)
    assert optimizer.last_stats.penalty_grad_norm > 0
    assert optimizer.penalty_weight != 10.0


REFUSED = {
    "maximize": ("maximize=True", lambda ps: adamw_state(ps, maximize=True).state_dict()),
    "amsgrad": ("amsgrad=True", lambda ps: adamw_state(ps, amsgrad=True).state_dict()),
    "momentum": ("momentum_buffer and no step", lambda ps: sgd_state(ps)),
    "the penalty alone": ("no exp_avg", lambda ps: penalty_state(ps)),
    "another shape": ("expected its parameter's", lambda ps: adamw_state(list(reversed(ps))).state_dict()),
    "a destroyed lambda": ("penalty_weight=nan", lambda ps: destroyed_state(ps)),
}


def sgd_state(params):
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    optimizer.step()
    return optimizer.state_dict()


def penalty_state(params):
    penalty = sk.SsiuuPenalty(params)
    penalty.apply_()
    return penalty.state_dict()


def destroyed_state(params):
    state = copy.deepcopy(sk.SsiuuAdamW(params).state_dict())
    state["param_groups"][0].update(penalty_share=0.25, penalty_weight=torch.tensor(math.nan))
    return state


@pytest.mark.parametrize(("message", "saved"), REFUSED.values(), ids=REFUSED)
def test_states_that_do_not_fit_change_nothing(message, saved):
    optimizer = sk.SsiuuAdamW(parameters(), **OPTIONS)
    run(optimizer)
    before, options = everything(optimizer), dict(optimizer.param_groups[0])
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved(parameters()))
    assert all(torch.equal(x, y) for x, y in zip(before, everything(optimizer), strict=True))
    assert optimizer.param_groups[0] == options


def test_the_penalty_takes_the_states_of_the_optimizer():
    optimizer = sk.SsiuuAdamW(parameters(), **OPTIONS)
    run(optimizer, 2)
    params = parameters()
    penalty = sk.SsiuuPenalty(params)
    penalty.load_state_dict(optimizer.state_dict())
    assert penalty.penalty_weight == OPTIONS["penalty_weight"]
    assert set(penalty.state[params[0]]) == {"step", "prev_attribution"}
    run(penalty)
    assert penalty.last_stats.penalty_grad_norm > 0


@pytest.mark.parametrize("kind", BOTH)
def test_the_states_of_an_older_version_are_taken(kind):
    """They have zeros where nothing was measured, and steps as numbers."""
    optimizer = kind(parameters())
    run(optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    params = parameters()
    resumed = kind(params)
    resumed.load_state_dict(saved)
    assert [resumed.state[param]["step"] for param in params] == [2, 2]
    run(resumed)
    assert resumed.last_stats.penalty_grad_norm > 0


@pytest.mark.parametrize("kind", BOTH)
def test_states_are_loaded_twice(kind):
    """torch adds a default at the first time that the groups lack."""
    optimizer = kind(parameters())
    run(optimizer, 2)
    saved, resumed = optimizer.state_dict(), kind(parameters())
    for _ in range(2):
        resumed.load_state_dict(saved)
    assert resumed.state_dict()["param_groups"] == saved["param_groups"]
    resumed.add_param_group({"params": parameters((3,))})


@pytest.mark.parametrize(("first", "second"), [(False, True), (True, False)])
def test_capturable_states_and_others_are_exchanged(first, second):
    params = parameters()
    optimizer = sk.SsiuuAdamW(params, capturable=first, **OPTIONS)
    run(optimizer, 2)
    others = [torch.nn.Parameter(param.detach().clone()) for param in params]
    resumed = sk.SsiuuAdamW(others, capturable=second, **OPTIONS)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for param, other in zip(params, others, strict=True):
        give_gradients([param])
        other.grad, other.target_grad = param.grad.clone(), param.target_grad.clone()
    optimizer.step()
    resumed.step()
    assert isinstance(resumed.state[others[0]]["step"], torch.Tensor) == second
    assert all(torch.allclose(x, y, rtol=1e-5, atol=1e-6) for x, y in zip(params, others, strict=True))
