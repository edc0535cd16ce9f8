"""target_term beside a loss that no log-likelihood is in: both gradients against separate autograd calls."""

import threading

import pytest
import torch
import torch.nn.functional as F

import ssiuu_kernels as sk

from ...support.gradients import FORGET, both_gradients, distances
from ...support.models import FAMILIES, logits_of, tiny_batch, tiny_model


class Watched:
    """A tiny model patched at scope "all", and what its first decoder layer gave in the last forward."""

    def __init__(self, family="torch_llama", dtype=torch.float64, **options):
        self.model, self.batch = tiny_model(family, dtype), tiny_batch()
        self.handle = sk.patch(self.model, scope="all", **options)
        self.model.model.layers[0].register_forward_hook(self._see)

    def _see(self, _module, _inputs, output):
        self.hidden = output[0] if isinstance(output, tuple) else output

    def forward(self):
        """(logits, a squared error of the first layer's output)."""
        logits = logits_of(self.model, self.batch)
        return logits, (self.hidden - 1).square()[self.batch["attention_mask"] == 1].mean()

    def term(self, logits, **options):
        return self.handle.target_term(logits, self.batch["labels"], FORGET, "log_prob", **options)

    def expected(self):
        """(dL, sum of ds) by name, each from a forward and a call of autograd of its own."""
        logits, loss = self.forward()
        total = sk.sequence_log_probs(logits, self.batch["labels"])[FORGET].sum()
        names, params = zip(*self.model.named_parameters(), strict=True)
        found = []
        for value in (loss, total):
            gradients = torch.autograd.grad(value, params, retain_graph=True, allow_unused=True)
            found.append({n: g for n, g in zip(names, gradients, strict=True) if g is not None})
        return found


def assert_both(watched, expected, loss_scale=1.0, target_scale=1.0, tolerance=1e-10):
    loss, target = expected
    loss = {name: loss.get(name, torch.zeros_like(gradient)) for name, gradient in target.items()}
    for actual, wanted, scale in zip(
        both_gradients(watched.model), (loss, target), (loss_scale, target_scale), strict=True
    ):
        worst = max(distances(actual, {n: scale * g for n, g in wanted.items()}).items(), key=lambda item: item[1])
        assert worst[1] <= tolerance, worst


@pytest.mark.parametrize("order", ["term first", "loss first"])
def test_beside_another_loss(order):
    watched = Watched()
    expected = watched.expected()
    logits, loss = watched.forward()
    term = watched.term(logits)
    if order == "term first":
        loss = (watched.hidden - 1).square()[watched.batch["attention_mask"] == 1].mean()
    assert term.item() == 0
    (loss + term if order == "loss first" else term + loss).backward()
    assert_both(watched, expected)
    assert watched.handle.gradient_path.engine == "two-backward"


@pytest.mark.parametrize(
    "family", [name for name in FAMILIES if name in ("llama", "qwen3", "phi3", "olmo2", "mistral")]
)
def test_of_transformers_models(family):
    watched = Watched(family)
    expected = watched.expected()
    logits, loss = watched.forward()
    (loss + watched.term(logits)).backward()
    assert_both(watched, expected, tolerance=1e-5)


def test_beside_a_cross_entropy_of_the_same_logits():
    watched = Watched()
    logits, _ = watched.forward()
    labels = watched.batch["labels"]

    def cross_entropy(logits):
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    params = list(watched.model.parameters())
    names = [name for name, _ in watched.model.named_parameters()]
    wanted = dict(zip(names, torch.autograd.grad(cross_entropy(logits), params), strict=True))
    logits, _ = watched.forward()
    (cross_entropy(logits) + watched.term(logits)).backward()
    assert_both(watched, (wanted, watched.expected()[1]))


def test_checkpointing():
    watched = Watched("llama")
    expected = watched.expected()
    watched.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    logits, loss = watched.forward()
    (loss + watched.term(logits)).backward()
    assert_both(watched, expected, tolerance=1e-5)


def test_micro_batches_add_up_and_a_factor_scales_the_loss_alone():
    watched = Watched()
    expected = watched.expected()
    for _ in range(2):
        logits, loss = watched.forward()
        ((loss + watched.term(logits)) * 0.25).backward()
    assert_both(watched, expected, loss_scale=0.5, target_scale=2.0)
    assert watched.model.lm_head.weight.target_grad_info.scaled


def test_two_terms_in_one_backward():
    watched = Watched()
    expected = watched.expected()
    logits, loss = watched.forward()
    total = loss + watched.term(logits)
    logits, loss = watched.forward()
    (total + loss + watched.term(logits)).backward()
    assert_both(watched, expected, loss_scale=2.0, target_scale=2.0)


def test_a_mask_on_a_parameter_masks_its_target_too():
    watched = Watched()
    expected = watched.expected()
    param = watched.model.model.layers[0].mlp.down_proj.weight
    mask = torch.rand_like(param) > 0.5
    param.register_hook(lambda grad: grad * mask)
    logits, loss = watched.forward()
    (loss + watched.term(logits)).backward()
    for gradients in expected:
        gradients["model.layers.0.mlp.down_proj.weight"] *= mask
    assert_both(watched, expected)


def test_packed_samples():
    watched = Watched()
    expected = watched.expected()[1]
    length = watched.batch["labels"].shape[1]
    segments = torch.tensor([[i * length, (i + 1) * length] for i in range(4)], dtype=torch.int32)
    logits, loss = watched.forward()
    (loss + watched.term(logits, segments=segments)).backward()
    assert max(distances(both_gradients(watched.model)[1], expected).values()) < 1e-10


@pytest.mark.parametrize("order", ["term first", "loss first"])
@pytest.mark.parametrize("second", [False, True], ids=["one forward", "another forward after the term"])
def test_updates_in_backward_are_those_of_a_step_after_it(order, second, monkeypatch):
    monkeypatch.setattr("ssiuu_kernels.optim.update_in_backward.WAITING", 100)
    weights = []
    seed = torch.seed()
    for in_backward in (False, True):
        torch.manual_seed(seed)
        watched = Watched()
        options = {"lr": 1e-3, "eps": 1e-5, "penalty_weight": 10.0, "update_in_backward": in_backward}
        optimizer = sk.SsiuuAdamW(watched.model.parameters(), **options)
        for _ in range(3):
            logits, loss = watched.forward()
            total = sk.sequence_log_probs(logits, watched.batch["labels"]).sum() if order == "loss first" else 0
            term = watched.term(logits)
            if order == "term first":
                total = sk.sequence_log_probs(logits, watched.batch["labels"]).sum()
            if second:
                total = total + logits_of(watched.model, watched.batch).square().mean()
            (loss + total + term).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert optimizer.last_stats.value > 0
        weights.append(dict(watched.model.named_parameters()))
    assert max(distances(weights[1], weights[0]).values()) < 1e-9


def test_the_penalty_reaches_parameters_that_the_loss_does_not():
    watched = Watched()
    optimizer = sk.SsiuuAdamW(watched.model.parameters(), lr=1e-3, eps=1e-5, penalty_weight=10.0)
    before = watched.model.lm_head.weight.detach().clone()
    for _ in range(2):  # the first step has no A_{t-1}
        logits, loss = watched.forward()
        (loss + watched.term(logits)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(watched.model.lm_head.weight, before)


def test_a_term_that_was_not_added_is_missed_by_the_optimizer():
    watched = Watched()
    optimizer = sk.SsiuuAdamW(watched.model.parameters())
    logits, loss = watched.forward()
    watched.term(logits)
    loss.backward()
    with pytest.raises(ValueError, match="target_grad"):
        optimizer.step()


def test_a_second_backward_is_refused():
    watched = Watched()
    logits, loss = watched.forward()
    total = loss + watched.term(logits)
    total.backward(retain_graph=True)
    before = watched.model.lm_head.weight.target_grad.clone()
    with pytest.raises(RuntimeError, match="a second time on one target_term"):
        total.backward()
    assert torch.equal(watched.model.lm_head.weight.target_grad, before)


def test_no_forget_sample_gives_no_target():
    watched = Watched()
    logits, loss = watched.forward()
    term = watched.handle.target_term(logits, watched.batch["labels"], torch.zeros(4, dtype=torch.bool))
    (loss + term).backward()
    assert both_gradients(watched.model)[1] == {}


def test_a_forward_of_another_thread_is_refused():
    watched = Watched()
    found, ours = [], torch.zeros((), requires_grad=True).exp().grad_fn._sequence_nr() + 1000

    def run():
        while torch.zeros((), requires_grad=True).exp().grad_fn._sequence_nr() <= ours:
            pass
        found.append(watched.forward()[0])

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    with pytest.raises(ValueError, match="another thread"):
        watched.term(found[0])


REFUSED = {
    "labels of another batch": (lambda w, z: w.handle.target_term(z, w.batch["labels"][:2], FORGET), "labels"),
    "a mask of another length": (lambda w, z: w.handle.target_term(z, w.batch["labels"], FORGET[:2]), "forget"),
    "a target of attribution": (
        lambda w, z: w.handle.target_term(z, w.batch["labels"], FORGET, "margin"),
        "target='margin' is unknown; expected one of prob, geometric_mean_prob, log_prob",
    ),
    "an unknown target": (lambda w, z: w.handle.target_term(z, w.batch["labels"], FORGET, "p"), "target='p'"),
    "logits without a graph": (lambda w, z: w.term(z.detach()), "carry no gradient"),
    "logits of another model": (
        lambda w, _: w.term(logits_of(tiny_model("torch_llama", torch.float64), w.batch)),
        "of a copy",
    ),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input(call, message):
    watched = Watched()
    with pytest.raises(ValueError, match=message):
        call(watched, watched.forward()[0])


def test_level_neuron_has_no_term():
    watched = Watched(level="neuron", forget_samples=2)
    with pytest.raises(ValueError, match="level='neuron' has no target gradient"):
        watched.term(watched.forward()[0])
