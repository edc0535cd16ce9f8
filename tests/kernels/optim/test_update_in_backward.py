"""SsiuuAdamW(update_in_backward=True): the same weights, fewer gradients alive, and what cannot go with it."""

import copy
import gc

import pytest
import torch

import ssiuu_kernels as sk
from ssiuu_kernels.gradients.target_grad import TargetGradInfo
from ssiuu_kernels.optim import penalised, update_in_backward

from ...support.models import logits_of, tiny_batch, tiny_model

FORGET = torch.tensor([True, True, False, False])
OPTIONS = {"lr": 1e-2, "penalty_weight": 1e6}  # so that the penalty takes part


@pytest.fixture(autouse=True)
def _large(monkeypatch):
    """Tiny matrices count as large, so that they are updated in the backward; vectors wait for the step."""
    monkeypatch.setattr(penalised, "SMALL", 200)
    monkeypatch.setattr(update_in_backward, "WAITING", 200)


def checkpointed(model):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def share_a_weight(model):
    """Two layers, each checkpointed apart, read one weight."""
    first, second = model.model.layers
    second.self_attn.q_proj.weight = first.self_attn.q_proj.weight
    second.mlp = first.mlp


def share_and_checkpoint(model):
    share_a_weight(model)
    checkpointed(model)


def backward(handle, model, batch, target="geometric_mean_prob"):
    handle.unlearning_loss(logits_of(model, batch), batch["labels"], FORGET, target=target).backward()


def trained(model, batch, steps=4, engine="one-backward", saved=None, **options):
    """The optimizer after some steps of training `model`."""
    with sk.patch(model, scope="all", engine=engine) as handle:
        optimizer = sk.SsiuuAdamW(model.parameters(), **{**OPTIONS, **options})
        if saved is not None:
            optimizer.load_state_dict(saved)
        for _ in range(steps):
            backward(handle, model, batch)
            optimizer.step()
            optimizer.zero_grad()
    return optimizer


def assert_same_weights(model, expected):
    for (name, param), wanted in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(param, wanted), name


CHANGES = {
    "tied embeddings": lambda model: None,
    "checkpointing": checkpointed,
    "a shared weight": share_a_weight,
    "a shared weight and checkpointing": share_and_checkpoint,
}


@pytest.mark.parametrize("engine", ["one-backward", "two-backward"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_ends_in_the_same_weights_bit_for_bit(change, engine):
    model, batch = tiny_model(), tiny_batch()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    change(model)
    expected = copy.deepcopy(model)
    wanted = trained(expected, batch, engine=engine, update_in_backward=False)
    found = trained(model, batch, engine=engine, update_in_backward=True)
    assert_same_weights(model, expected)
    assert found.last_stats.negative == wanted.last_stats.negative
    assert torch.isclose(found.last_stats.loss_grad_norm, wanted.last_stats.loss_grad_norm, rtol=1e-12)


@pytest.mark.gpu
def test_ends_in_the_same_weights_on_a_device(monkeypatch):
    monkeypatch.setattr("tests.kernels.optim.test_update_in_backward.FORGET", FORGET.cuda())
    model, batch = tiny_model(), tiny_batch()
    share_and_checkpoint(model)
    expected = copy.deepcopy(model)
    trained(expected, batch)
    trained(model, batch, update_in_backward=True)
    assert_same_weights(model, expected)


def test_a_steered_lambda_is_steered_alike():
    model, batch = tiny_model(), tiny_batch()
    expected = copy.deepcopy(model)
    wanted = trained(expected, batch, penalty_share=0.3)
    found = trained(model, batch, penalty_share=0.3, update_in_backward=True)
    assert found.penalty_weight == pytest.approx(wanted.penalty_weight, rel=1e-9)
    assert found.penalty_weight != OPTIONS["penalty_weight"]


def test_a_recomputed_forward_sees_the_weights_of_the_forward():
    """The hidden states that checkpointing computes anew are those of the first time, to the bit."""
    model, batch, seen = tiny_model(), tiny_batch(), []
    share_and_checkpoint(model)
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(lambda _module, _args, y: seen.append(y.detach().clone()))
    with sk.patch(model, scope="all") as handle:
        optimizer = sk.SsiuuAdamW(model.parameters(), update_in_backward=True, **OPTIONS)
        before = [param.detach().clone() for param in model.parameters()]
        backward(handle, model, batch)
        assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True) if p.numel() > 200)
        optimizer.step()
    first, second, second_again, first_again = seen
    assert torch.equal(first, first_again)
    assert torch.equal(second, second_again)


def layer_bytes(model):
    """Bytes of one gradient of the largest layer; the embeddings count as one."""
    layers = [*model.model.layers, model.lm_head, model.model.embed_tokens]
    return max(sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in layers)


@pytest.fixture
def _new_objects_alone():
    """gc.get_objects() gives those that this test makes, and none of the many from before."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("_new_objects_alone")
@pytest.mark.parametrize("early", [True, False])
def test_no_more_than_two_layers_gradients_exist_at_once(early):
    """Counts every gradient alive whenever one is complete; without updates in backward there are far more."""
    config = {"num_hidden_layers": 6, "tie_word_embeddings": False}
    model, batch, counts = tiny_model(**config), tiny_batch(), []
    optimizer = sk.SsiuuAdamW(model.parameters(), update_in_backward=early, **OPTIONS)
    params = list(model.parameters())
    shapes = {param.shape for param in params if param.numel() >= 200}

    def count(_param):
        held = {
            tensor.untyped_storage().data_ptr(): tensor.numel() * tensor.element_size()
            for tensor in gc.get_objects()
            if type(tensor) is torch.Tensor and tensor.shape in shapes and not tensor.requires_grad
        }
        grads = [grad for p in params for grad in (p.grad, getattr(p, "target_grad", None)) if grad is not None]
        held |= {grad.untyped_storage().data_ptr(): grad.numel() * grad.element_size() for grad in grads}
        kept = [
            value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
        ]
        for tensor in [*params, *kept]:
            held.pop(tensor.untyped_storage().data_ptr(), None)
        counts.append(sum(held.values()))

    for param in params:
        param.register_post_accumulate_grad_hook(count)
    with sk.patch(model, scope="all") as handle:
        backward(handle, model, batch)
        optimizer.step()
    two_layers = 2 * 2 * layer_bytes(model)  # two gradients each
    assert (max(counts) <= two_layers) == early
    assert max(counts) > 0


def test_gradients_are_freed():
    model, batch = tiny_model(), tiny_batch()
    trained(model, batch, steps=1, update_in_backward=True)
    assert all(param.grad is None and getattr(param, "target_grad", None) is None for param in model.parameters())


def test_resumes_bit_for_bit():
    model, batch = tiny_model(), tiny_batch()
    whole = copy.deepcopy(model)
    trained(whole, batch, steps=5, update_in_backward=True, penalty_share=0.3)
    state = copy.deepcopy(trained(model, batch, 2, update_in_backward=True, penalty_share=0.3).state_dict())
    gc.collect()
    resumed = copy.deepcopy(model)
    trained(resumed, batch, steps=3, saved=state, update_in_backward=True, penalty_share=0.3)
    assert_same_weights(resumed, whole)


def prepared(scope="all"):
    model, batch = tiny_model(), tiny_batch()
    handle = sk.patch(model, scope=scope)
    optimizer = sk.SsiuuAdamW(model.parameters(), update_in_backward=True, **OPTIONS)
    return model, optimizer, lambda **options: backward(handle, model, batch, **options)


def assert_weights_left(model, before):
    assert all(torch.equal(param, weight) for param, weight in zip(model.parameters(), before, strict=True))


def weights(model):
    return [param.detach().clone() for param in model.parameters()]


def test_accumulation_over_backwards_is_refused():
    model, _optimizer, run = prepared()
    run()
    before = weights(model)
    with pytest.raises(ValueError, match=r"a second backward before step\(\).*update_in_backward=False"):
        run()
    assert_weights_left(model, before)


def test_after_a_refusal_training_goes_on():
    model, optimizer, run = prepared()
    run()
    with pytest.raises(ValueError, match="a second backward"):
        run()
    optimizer.zero_grad()
    optimizer.step()
    before = weights(model)
    run()
    optimizer.step()
    assert not any(torch.equal(param, weight) for param, weight in zip(model.parameters(), before, strict=True))


def test_clipping_is_refused():
    model, optimizer, run = prepared()
    run()
    before = weights(model)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    with pytest.raises(ValueError, match=r"clip_grad_norm_.*instead of clipping"):
        optimizer.step()
    assert_weights_left(model, before)


def test_a_parameter_out_of_scope_is_refused():
    model, _optimizer, run = prepared(scope="mlp")
    before = weights(model)
    with pytest.raises(ValueError, match=r"updated in backward and would get no target_grad.*scope='all'"):
        run()
    assert_weights_left(model, before)


def test_a_loss_without_target_is_refused():
    _, _optimizer, run = prepared()
    with pytest.raises(ValueError, match="target=None asks for none"):
        run(target=None)


def test_another_loss_is_refused():
    model, _optimizer, _ = prepared()
    before = weights(model)
    with pytest.raises(ValueError, match="got no target_grad"):
        logits_of(model, tiny_batch()).sum().backward()
    assert_weights_left(model, before)


def test_two_optimizers_are_refused():
    model, _optimizer, _ = prepared()
    with pytest.raises(ValueError, match="by another optimizer already"):
        sk.SsiuuAdamW(model.parameters(), update_in_backward=True)


def test_new_parameters_are_refused():
    _, optimizer, _ = prepared()
    with pytest.raises(ValueError, match="fixes the parameters"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})


def test_a_dropped_optimizer_lets_go_of_its_parameters():
    model, optimizer, run = prepared()
    del optimizer
    gc.collect()
    run()
    assert all(param.grad is not None for param in model.parameters())


def test_a_step_without_a_backward_is_refused():
    model, optimizer, run = prepared()
    with pytest.raises(ValueError, match="no parameter got a gradient since the last step"):
        optimizer.step()
    run()
    optimizer.step()
    before = weights(model)
    with pytest.raises(ValueError, match="no parameter got a gradient since the last step"):
        optimizer.step()
    assert_weights_left(model, before)


def test_groups_whose_parameters_were_replaced_are_refused():
    """As accelerate's prepare does; in the backward if the old ones are still the model's, in the step if not."""
    model, optimizer, run = prepared()
    before = weights(model)
    group = optimizer.param_groups[0]
    own, others = group["params"], [torch.nn.Parameter(param.detach().clone()) for param in group["params"]]
    group["params"] = others
    with pytest.raises(ValueError, match="hold other parameters than it was made with"):
        run()
    with pytest.raises(ValueError, match="hold other parameters than it was made with"):
        optimizer.step()
    group["params"] = own[1:]
    with pytest.raises(ValueError, match="hold other parameters than it was made with"):
        run()
    assert_weights_left(model, before)


def test_a_bad_group_is_found_before_anything_is_updated():
    model, optimizer, run = prepared()
    before = weights(model)
    optimizer.param_groups[0]["penalty_share"] = 1.5
    with pytest.raises(ValueError, match=r"penalty_share=1\.5"):
        run()
    assert_weights_left(model, before)


def test_more_than_one_process_is_refused_before_anything_is_updated(monkeypatch):
    model, _optimizer, run = prepared()
    before = weights(model)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="2 processes; expected one"):
        run()
    assert_weights_left(model, before)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("waiting", [0, 200], ids=["all at once", "vectors wait"])
def test_a_grad_scaler_is_refused(waiting, unscale, monkeypatch):
    """By the step at the latest: the loss refuses it where it can, before anything is updated."""
    monkeypatch.setattr(update_in_backward, "WAITING", waiting)
    model, batch = tiny_model(), tiny_batch()
    optimizer = sk.SsiuuAdamW(model.parameters(), update_in_backward=True, **OPTIONS)
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    with sk.patch(model, scope="all") as handle:
        loss = handle.unlearning_loss(logits_of(model, batch), batch["labels"], FORGET)
        with pytest.raises(ValueError, match="a GradScaler"):  # noqa: PT012
            scaler.scale(loss).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)


def test_a_grad_scaler_that_is_off_is_none():
    model, optimizer, run = prepared()
    before = weights(model)
    run()
    torch.amp.GradScaler("cpu", enabled=False).step(optimizer)
    assert not any(torch.equal(param, weight) for param, weight in zip(model.parameters(), before, strict=True))


def test_without_it_a_grad_scaler_scales_nothing():
    model, batch = tiny_model(), tiny_batch()
    expected = copy.deepcopy(model)
    for scaler, own in ((None, expected), (torch.amp.GradScaler("cpu", init_scale=128.0), model)):
        optimizer = sk.SsiuuAdamW(own.parameters(), **OPTIONS)
        with sk.patch(own, scope="all") as handle:
            for _ in range(3):
                loss = handle.unlearning_loss(logits_of(own, batch), batch["labels"], FORGET)
                if scaler is None:
                    loss.backward()
                    optimizer.step()
                else:
                    scaler.scale(loss).backward()
                    scaler.step(optimizer)
                    scaler.update()
                optimizer.zero_grad()
    for param, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(param, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("thawed", [False, True])
def test_frozen_parameters(thawed):
    """They are left alone, and updated like the others once they are thawed."""
    model, batch = tiny_model(), tiny_batch()
    expected = copy.deepcopy(model)
    for own, early in ((expected, False), (model, True)):
        frozen = own.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
        before = frozen.detach().clone()
        optimizer = sk.SsiuuAdamW(own.parameters(), update_in_backward=early, **OPTIONS)
        frozen.requires_grad_(thawed)
        with sk.patch(own, scope="all") as handle:
            for _ in range(2):
                backward(handle, own, batch)
                optimizer.step()
                optimizer.zero_grad()
        assert torch.equal(frozen, before) != thawed
    assert_same_weights(model, expected)


def without_forget_samples(params):
    for param in params:
        param.target_grad_info = TargetGradInfo(samples=0, grad_version=None, scale=torch.ones(()))


def test_a_backward_without_forget_samples_is_adamw():
    """Known before the backward begins, as every parameter is updated in it."""
    model, optimizer, run = prepared()
    run()
    optimizer.step()
    expected, states = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    plain = torch.optim.AdamW(expected.parameters(), lr=OPTIONS["lr"], weight_decay=0.0)
    for state in states["state"].values():
        state["step"] = torch.tensor(float(state["step"]))
    plain.load_state_dict({**plain.state_dict(), "state": states["state"]})
    params = list(model.parameters())
    attributions = [optimizer.state[param]["prev_attribution"].clone() for param in params]
    batch = tiny_batch()
    without_forget_samples(params)
    for own, stepped in ((model, optimizer), (expected, plain)):
        torch.nn.functional.cross_entropy(logits_of(own, batch).flatten(0, 1), batch["input_ids"].flatten()).backward()
        stepped.step()
    for param, wanted, attribution in zip(params, expected.parameters(), attributions, strict=True):
        assert torch.allclose(param, wanted, rtol=1e-4, atol=1e-6)
        assert torch.equal(optimizer.state[param]["prev_attribution"], attribution)


def test_a_closure_runs_the_backward():
    model, optimizer, run = prepared()
    before = weights(model)
    optimizer.step(run)
    assert not any(torch.equal(param, weight) for param, weight in zip(model.parameters(), before, strict=True))
