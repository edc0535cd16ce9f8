"""lambda: where it is steered to, when it is not, and that each group has its own."""

import math

import pytest
import torch

import ssiuu_kernels as sk
from ssiuu_kernels.ops import PenaltyStats
from ssiuu_kernels.optim import steering, update_in_backward
from ssiuu_kernels.optim.steering import next_weight, steered_weight

from ...support.models import logits_of, tiny_batch, tiny_model

KINDS = {"plain": {}, "capturable": {"capturable": True}, "update in backward": {"update_in_backward": True}}


def steered(weight, share):
    return steered_weight(torch.tensor(weight), torch.tensor(share), 0.25).item()


def test_it_moves_towards_the_share_wanted():
    assert steered(2.0, 0.25) == pytest.approx(2.0)
    assert steered(2.0, 0.1) > 2.0
    assert steered(2.0, 0.6) < 2.0
    assert steered(2.0, 0.0) == pytest.approx(2000.0)
    assert math.isfinite(steered(2.0, 1.0))


def test_it_stays_within_bounds():
    highest = lowest = torch.tensor(1.0, dtype=torch.float64)
    for _ in range(200):
        highest = steered_weight(highest, torch.tensor(0.0), 0.25)
        lowest = steered_weight(lowest, torch.tensor(1.0), 0.25)
    assert highest == steering.LARGEST
    assert lowest == steering.SMALLEST
    assert (2 * highest).float().isfinite()
    assert (2 * lowest).float() > 0


def stats(**changes):
    values = {"value": 1.0, "penalty_grad_norm": 1.0, "loss_grad_norm": 1.0, "share": 0.0, "negative": 9.0}
    return PenaltyStats(**{k: torch.tensor(v, dtype=torch.float64) for k, v in {**values, **changes}.items()})


SAYS_NOTHING = {
    "an empty I-": {"negative": 0.0},
    "no penalty gradient": {"penalty_grad_norm": 0.0},
    "one that underflows": {"penalty_grad_norm": 1e-30},
    "no loss gradient": {"loss_grad_norm": 0.0, "share": 1.0},
    "an infinite loss gradient": {"loss_grad_norm": math.inf},
    "an infinite penalty gradient": {"penalty_grad_norm": math.inf},
    "NaN": {"penalty_grad_norm": math.nan},
}


@pytest.mark.parametrize("changes", SAYS_NOTHING.values(), ids=SAYS_NOTHING)
def test_a_step_that_says_nothing_leaves_it(changes):
    weight = torch.tensor(3.0, dtype=torch.float64)
    assert next_weight(weight, stats(), 0.25) > weight
    assert next_weight(weight, stats(**changes), 0.25) == weight


@pytest.mark.parametrize("kind", ["plain", "capturable"])
def test_an_answer_that_is_forgotten_destroys_no_weight(kind):
    """P falls below e^-44 and stays there for longer than lambda would take to leave float32."""
    param = torch.nn.Parameter(torch.randn(500))
    optimizer = sk.SsiuuAdamW([param], lr=1e-3, penalty_share=0.25, penalty_weight=1.0, **KINDS[kind])
    for probability in [0.1] * 5 + [1e-20] * 40 + [0.0] * 5:
        param.grad, param.target_grad = torch.randn(500), probability * torch.randn(500)
        optimizer.step()
        if probability == 0.1:
            known = optimizer.penalty_weight
        assert param.isfinite().all()
    assert optimizer.penalty_weight == pytest.approx(known, rel=1e3)
    before = param.detach().clone()
    param.grad, param.target_grad = torch.randn(500), 0.1 * torch.randn(500)
    optimizer.step()
    assert (param - before).abs().max() < 10 * 1e-3  # the first step after P came back is one of Adam's size


def test_no_penalty_no_steering():
    """A target gradient of 0, and attributions that are all positive."""
    param = torch.nn.Parameter(torch.ones(50))
    optimizer = sk.SsiuuAdamW([param], lr=1e-3, penalty_share=0.25, penalty_weight=1.0)
    for target_grad in (torch.zeros(50), torch.ones(50), -torch.zeros(50), torch.ones(50)):
        param.grad, param.target_grad = torch.ones(50), target_grad
        optimizer.step()
    assert optimizer.penalty_weight == 1.0


@pytest.fixture
def _hooks_on_all(monkeypatch):
    monkeypatch.setattr(update_in_backward, "WAITING", 200)


@pytest.mark.usefixtures("_hooks_on_all")
@pytest.mark.parametrize("kind", KINDS)
def test_each_group_is_steered_by_its_own_share(kind):
    """Two shares, and a third group whose lambda stays."""
    sizes = (20000, 20000, 30)
    params = [torch.nn.Parameter(torch.randn(size)) for size in sizes]
    shares = (0.05, 0.5, None)
    groups = [{"params": [p], "penalty_share": s} for p, s in zip(params, shares, strict=True)]
    optimizer = sk.SsiuuAdamW(groups, lr=0.0, penalty_weight=1e-2, **KINDS[kind])
    for _ in range(15):
        for param, scale in zip(params, (1e-2, 1e-1, 1.0), strict=True):
            param.target_grad = scale * torch.randn_like(param)
        sum((param * torch.randn_like(param)).sum() for param in params).backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = [float(group["penalty_weight"]) for group in optimizer.param_groups]
    assert weights[2] == 1e-2
    for param, weight, share in zip(params[:2], weights, shares, strict=False):
        target_grad = (1e-2 if share == 0.05 else 1e-1) * torch.randn_like(param)
        attribution, before = param * target_grad, param * target_grad.flip(0)
        penalty = (2 * weight * (attribution - before) * target_grad)[attribution < 0]
        found = (penalty.abs() > torch.randn_like(penalty).abs()).double().mean()
        assert found == pytest.approx(share, abs=0.3 * share)


def test_two_shares_in_a_model():
    """Of a model's parameters, the embedding has one share and the rest another; both lambdas stay numbers."""
    model, batch = tiny_model(), tiny_batch()
    forget = torch.tensor([True, True, False, False])
    embedding = model.model.embed_tokens.weight
    groups = [
        {"params": [embedding], "penalty_share": 0.05},
        {"params": [p for p in model.parameters() if p is not embedding], "penalty_share": 0.5},
    ]
    with sk.patch(model, scope="all") as handle:
        optimizer = sk.SsiuuAdamW(groups, lr=1e-3, penalty_weight=1.0)
        for _ in range(30):
            loss = handle.unlearning_loss(
                logits_of(model, batch), batch["labels"], forget, target="geometric_mean_prob"
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for group in optimizer.param_groups:
        assert 1e-6 < group["penalty_weight"] < 1e18
    assert all(param.isfinite().all() for param in model.parameters())


def test_the_first_step_of_a_parameter_does_not_count():
    """It has no attribution to be held against, and would make the share of its group look low."""
    old, new = (torch.nn.Parameter(torch.randn(2000)) for _ in range(2))
    alone, both = (sk.SsiuuAdamW(list(ps), lr=0.0, penalty_share=0.3) for ps in ((old,), (old, new)))
    for step in range(3):
        grads = [torch.randn(2000) for _ in range(4)]
        for optimizer in (alone, both):
            old.grad, old.target_grad = grads[0].clone(), grads[1].clone()
            new.grad, new.target_grad = (grads[2].clone(), grads[3].clone()) if step == 2 else (None, None)
            optimizer.step()
    assert both.penalty_weight == alone.penalty_weight
