"""unlearning_loss: both gradients against separate autograd calls."""

import pytest
import torch

import ssiuu_kernels as sk

from ...support.gradients import distances
from ...support.models import FAMILIES, NAN_LEFT_PADDED, logits_of, rounding, tiny_batch, tiny_model

FORGET = torch.tensor([True, False, True, False])


def gradients(model, batch, function):
    """d function(log_probs, lengths) / d parameters, by name, from a graph of its own."""
    log_probs = sk.sequence_log_probs(logits_of(model, batch), batch["labels"])
    lengths = (batch["labels"][:, 1:] != -100).sum(1)
    names, params = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(function(log_probs, lengths), params), strict=True))


def gd(s, lengths):
    return s[FORGET].sum() / lengths[FORGET].sum() - s[~FORGET].sum() / lengths[~FORGET].sum()


OBJECTIVES = {
    "gd": ("gd", gd),
    "ga": ("ga", lambda s, lengths: s[FORGET].sum() / lengths[FORGET].sum()),
    "callable": (lambda s, lengths, forget: (s[forget] / 3).exp().sum(), lambda s, _: (s[FORGET] / 3).exp().sum()),
}
TARGETS = {
    "prob": lambda s, _: s[FORGET].exp().sum(),
    "geometric_mean_prob": lambda s, lengths: (s / lengths)[FORGET].exp().sum(),
    "log_prob": lambda s, _: s[FORGET].sum(),
}


def assert_equal_gradients(actual, expected, tolerance=1e-10):
    worst = max(distances(actual, expected).items(), key=lambda item: item[1])
    assert worst[1] <= tolerance, worst


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("family", ["torch_llama", *FAMILIES])
def test_both_gradients(family, objective, target, checkpointing):
    model, batch = tiny_model(family, torch.float64), tiny_batch("right" if family in NAN_LEFT_PADDED else "left")
    handle = sk.patch(model, scope="all")
    given, plain = OBJECTIVES[objective]
    loss_gradients = gradients(model, batch, plain)
    target_gradients = gradients(model, batch, TARGETS[target])
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    handle.unlearning_loss(logits_of(model, batch), batch["labels"], FORGET, given, target).backward()
    tolerance = rounding(family, torch.float64)
    assert_equal_gradients({n: p.grad for n, p in model.named_parameters()}, loss_gradients, tolerance)
    assert_equal_gradients({n: p.target_grad for n, p in model.named_parameters()}, target_gradients, tolerance)


def test_scaling_the_loss_scales_the_loss_gradient_alone():
    model, batch = tiny_model("torch_llama", torch.float64), tiny_batch()
    handle = sk.patch(model, scope="all")
    loss_gradients = gradients(model, batch, gd)
    target_gradients = gradients(model, batch, TARGETS["prob"])
    (0.25 * handle.unlearning_loss(logits_of(model, batch), batch["labels"], FORGET)).backward()
    assert_equal_gradients({n: 4 * p.grad for n, p in model.named_parameters()}, loss_gradients)
    assert_equal_gradients({n: p.target_grad for n, p in model.named_parameters()}, target_gradients)


def test_both_gradients_accumulate():
    model, batch = tiny_model("torch_llama", torch.float64), tiny_batch()
    handle = sk.patch(model, scope="all")
    for _ in range(2):
        handle.unlearning_loss(logits_of(model, batch), batch["labels"], FORGET).backward()
    expected = gradients(model, batch, TARGETS["prob"])
    assert_equal_gradients({n: p.target_grad / 2 for n, p in model.named_parameters()}, expected)


@pytest.mark.parametrize("engine", sk.ENGINES)
def test_two_losses_in_one_backward_add_up(engine):
    model, batch = tiny_model("torch_llama", torch.float64), tiny_batch()
    handle = sk.patch(model, scope="all", engine=engine)
    losses = [
        handle.unlearning_loss(logits_of(model, batch), batch["labels"], FORGET, objective)
        for objective in ("gd", "ga")
    ]
    expected = gradients(model, batch, TARGETS["prob"])
    sum(losses).backward()
    assert_equal_gradients({n: p.target_grad / 2 for n, p in model.named_parameters()}, expected)


def test_scope_mlp_fills_the_patched_mlps_alone():
    model, batch = tiny_model(), tiny_batch()
    handle = sk.patch(model)
    handle.unlearning_loss(logits_of(model, batch), batch["labels"], FORGET).backward()
    filled = {name for name, param in model.named_parameters() if hasattr(param, "target_grad")}
    assert filled == {name for name, _ in model.named_parameters() if ".mlp." in name}


def test_no_target_fills_no_target_grad():
    model, batch = tiny_model(), tiny_batch()
    handle = sk.patch(model, scope="all")
    handle.unlearning_loss(logits_of(model, batch), batch["labels"], FORGET, target=None).backward()
    assert not any(hasattr(param, "target_grad") for param in model.parameters())


def test_a_second_backward_on_one_loss_is_refused():
    model, batch = tiny_model(), tiny_batch()
    loss = sk.patch(model, scope="all").unlearning_loss(logits_of(model, batch), batch["labels"], FORGET)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


BAD = {
    "mask of another length": ("bool mask", {"forget": torch.tensor([True, False])}),
    "mask of numbers": ("bool mask", {"forget": torch.ones(4)}),
    "unknown objective": ("nppo", {"objective": "nppo"}),
    "target of attribution": ("expected one of prob, geometric_mean_prob, log_prob", {"target": "logit"}),
    "unknown target": ("loss", {"target": "loss"}),
}


@pytest.mark.parametrize(("message", "changes"), BAD.values(), ids=BAD)
def test_bad_input(message, changes):
    model, batch = tiny_model(), tiny_batch()
    handle = sk.patch(model)
    arguments = {"logits": logits_of(model, batch), "labels": batch["labels"], "forget": FORGET, **changes}
    with pytest.raises(ValueError, match=message):
        handle.unlearning_loss(**arguments)


def test_logits_without_gradient():
    model, batch = tiny_model(), tiny_batch()
    with torch.no_grad():
        logits = logits_of(model, batch)
    with pytest.raises(ValueError, match="logits carry no gradient"):
        sk.patch(model).unlearning_loss(logits, batch["labels"], FORGET)
