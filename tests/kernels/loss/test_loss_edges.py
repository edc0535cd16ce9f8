"""Where other people's training loops meet the loss: scalers, empty batches, compiled models, wrong arguments."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import ssiuu_kernels as sk
from ssiuu_kernels.gradients.one_backward import targets

from ...support.gradients import FORGET, TARGET, both_gradients, distances, gradients
from ...support.models import logits_of, tiny_batch, tiny_model

ENGINES = ["one-backward", "two-backward"]


def repeated(batch, times):
    """The batch with longer answers, so that P(answer) is small."""
    return {name: tensor.repeat(1, times) for name, tensor in batch.items()}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("scale", [1.0, 256.0], ids=["unscaled", "GradScaler"])
@pytest.mark.parametrize("family", ["torch_llama", "gpt2"])
def test_float16_autocast_keeps_small_probabilities(family, scale, engine):
    """P(answer) is about 1e-15 here: a target gradient that is multiplied by it in float16 is 0."""
    model, batch = tiny_model(family), repeated(tiny_batch(), 2)
    *expected, _ = gradients(model, batch, "two-backward", target="prob")
    handle = sk.patch(model, scope="all", engine=engine)
    with torch.autocast("cpu", torch.float16):
        logits = logits_of(model, batch)
        loss = handle.unlearning_loss(logits, batch["labels"], FORGET)
    (loss * scale).backward()
    found = both_gradients(model)
    found[0] = {name: grad / scale for name, grad in found[0].items()}
    assert handle.gradient_path.engine == engine
    for kind, actual, wanted in zip(("grad", "target_grad"), found, expected, strict=True):
        norms = torch.stack([torch.stack([actual[name].norm(), wanted[name].norm()]) for name in wanted])
        assert (norms[:, 0] > 0).all(), kind
        assert torch.tensor(list(distances(actual, wanted).values())).mean() < 0.05, kind


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_in_half_precision(dtype, engine):
    model, batch = tiny_model("torch_llama", dtype), tiny_batch()
    wide = tiny_model("torch_llama", torch.float64)
    wide.load_state_dict(model.state_dict())
    *expected, _ = gradients(wide, batch, "two-backward")
    *found, _ = gradients(model, batch, engine)
    for actual, wanted in zip(found, expected, strict=True):
        assert torch.tensor(list(distances(actual, wanted).values())).mean() < 0.1


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("objective", ["gd", "ga", "npo", "dpo"])
@pytest.mark.parametrize("forgotten", [False, True], ids=["no forget sample", "no retain sample"])
def test_a_batch_without_one_kind_contributes_what_it_has(objective, forgotten, engine):
    model, batch = tiny_model("torch_llama", torch.float64), tiny_batch()
    forget = torch.full((4,), forgotten)
    handle = sk.patch(model, scope="all", engine=engine)
    options = {"reference_log_probs": torch.zeros(4)} if objective in ("npo", "dpo") else {}
    loss = lambda: handle.unlearning_loss(  # noqa: E731
        logits_of(model, batch), batch["labels"], forget, objective, TARGET, **options
    )
    if objective == "dpo" and forgotten:
        with pytest.raises(ValueError, match="needs a preferred answer for each"):
            loss()
        return
    loss().backward()
    found, targets = both_gradients(model)
    assert bool(targets) == forgotten
    s = sk.sequence_log_probs(logits_of(model, batch), batch["labels"])
    lengths = (batch["labels"][:, 1:] != -100).sum()
    expected = {
        ("gd", False): lambda: -s.sum() / lengths,
        ("gd", True): lambda: s.sum() / lengths,
        ("ga", False): lambda: s.sum() * 0,
        ("ga", True): lambda: s.sum() / lengths,
        ("npo", False): lambda: -s.sum() / lengths,
        ("npo", True): lambda: -20 * F.logsigmoid(-0.1 * s).mean(),
        ("dpo", False): lambda: -s.sum() / lengths,
    }[objective, forgotten]
    grads = torch.autograd.grad(expected(), list(model.parameters()))
    wanted = dict(zip(dict(model.named_parameters()), grads, strict=True))
    assert max(distances(found, wanted).values() if any(g.any() for g in grads) else [0]) <= 1e-10
    assert any(g.any() for g in grads) == any(grad.any() for grad in found.values())


def test_micro_batches_without_a_forget_sample_add_nothing_to_the_target():
    model, batch = tiny_model("torch_llama", torch.float64), tiny_batch()
    handle = sk.patch(model, scope="all")
    found = {}
    for parts in ([FORGET], [FORGET, ~FORGET & False]):
        model.zero_grad()
        for forget in parts:
            handle.unlearning_loss(logits_of(model, batch), batch["labels"], forget, target=TARGET).backward()
        found[len(parts)] = both_gradients(model)[1]
    assert max(distances(found[2], found[1]).values()) <= 1e-12


@pytest.mark.parametrize("given", ["inputs_embeds", "frozen embeddings"])
def test_leaves_that_are_no_parameters_get_the_losss_gradient(given):
    model, batch = tiny_model("gpt2" if given == "inputs_embeds" else "torch_llama", torch.float64), tiny_batch()
    found = {}
    for engine in ENGINES:
        copied, leaves = copy.deepcopy(model), []
        embeddings = copied.get_input_embeddings()
        handle = sk.patch(copied, scope="all", engine=engine)
        if given == "inputs_embeds":
            leaves.append(embeddings(batch["input_ids"]).detach().requires_grad_())
            logits = copied(inputs_embeds=leaves[0], attention_mask=batch["attention_mask"]).logits
        else:  # as transformers' enable_input_require_grads, which PEFT and trl call
            embeddings.requires_grad_(False)
            embeddings.register_forward_hook(
                lambda _module, _args, y, leaves=leaves: leaves.append(y.requires_grad_()) or y
            )
            logits = logits_of(copied, batch)
        handle.unlearning_loss(logits, batch["labels"], FORGET, target=TARGET).backward()
        assert handle.gradient_path.engine == engine
        found[engine] = leaves[0].grad
    assert torch.allclose(*found.values(), rtol=1e-9, atol=1e-14)


def test_a_leaf_that_all_samples_share_falls_back():
    model, batch = tiny_model("gpt2", torch.float64), tiny_batch()
    handle = sk.patch(model, scope="all")
    prompt = torch.randn(1, 2, 32, dtype=torch.float64, requires_grad=True)
    embeds = torch.cat([prompt.expand(4, -1, -1), model.get_input_embeddings()(batch["input_ids"])[:, 2:]], 1)
    logits = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits
    handle.unlearning_loss(logits, batch["labels"], FORGET).backward()
    assert handle.gradient_path.engine == "two-backward"


@pytest.mark.parametrize(
    ("part", "backend"),
    [("model", "aot_eager"), ("layer", "aot_eager"), ("mlp", "aot_eager"), ("mlp", "inductor")],
)
@pytest.mark.parametrize("order", ["patched first", "compiled first", "compiled and run first"])
def test_compiled_models_fall_back(order, part, backend):
    torch._dynamo.reset()
    model, batch = tiny_model("torch_llama"), tiny_batch()
    *expected, _ = gradients(model, batch, "two-backward")
    handle = sk.patch(model, scope="all") if order == "patched first" else None
    compiled = {"model": [model], "layer": model.model.layers, "mlp": [layer.mlp for layer in model.model.layers]}
    for module in compiled[part]:
        module.compile(backend=backend)
    if order == "compiled and run first":
        logits_of(model, batch).square().mean().backward()
    handle = handle or sk.patch(model, scope="all")
    for ordinary in (True, False):
        model.zero_grad()
        logits = logits_of(model, batch)
        if ordinary:
            logits.square().mean().backward()
        else:
            handle.unlearning_loss(logits, batch["labels"], FORGET, target=TARGET).backward()
    assert handle.gradient_path.engine == "two-backward"
    for actual, wanted in zip(both_gradients(model), expected, strict=True):
        assert max(distances(actual, wanted).values()) <= 1e-5


def test_a_backward_compiled_to_run_once_is_refused():
    class Compiled(torch.autograd.Function):
        """Stands for torch.compile's: it has the name, and the notes of one that gives its buffers away."""

        metadata = SimpleNamespace(bw_donated_idxs=[0])

        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            return grad

    Compiled.__name__ = "CompiledFunction"
    function = type("CompiledFunction", (Compiled,), {})
    model, batch = tiny_model("torch_llama"), tiny_batch()
    handle = sk.patch(model, scope="all")
    logits = function.apply(logits_of(model, batch))
    with pytest.raises(RuntimeError, match="compiled and run backward before the model was patched"):
        handle.unlearning_loss(logits, batch["labels"], FORGET)
    assert not any(both_gradients(model))


def prepared(**options):
    model, batch = tiny_model("torch_llama"), tiny_batch()
    handle = sk.patch(model, scope="all", **options)
    return model, handle.unlearning_loss(logits_of(model, batch), batch["labels"], FORGET, target=TARGET)


@pytest.mark.parametrize(
    "use",
    [
        lambda loss, params: torch.autograd.grad(loss, params, allow_unused=True),
        lambda loss, params: torch.autograd.grad(loss / 2 + 1, params, allow_unused=True),
        lambda loss, params: torch.autograd.grad([loss], params, allow_unused=True),
        lambda loss, params: loss.backward(inputs=params),
        lambda loss, params: torch.autograd.backward(loss, inputs=params),
    ],
)
def test_gradients_asked_for_elsewhere_are_refused(use):
    model, loss = prepared()
    with pytest.raises(ValueError, match=r"makes its gradients in backward\(\) alone"):
        use(loss, list(model.parameters()))
    assert not any(both_gradients(model))


def test_autograd_grad_of_two_backwards_is_the_losss_gradient():
    model, loss = prepared(engine="two-backward")
    params = list(model.parameters())
    found = torch.autograd.grad(loss, params, retain_graph=True)
    model.zero_grad()
    loss.backward()
    assert all(torch.equal(grad, param.grad) for grad, param in zip(found, params, strict=True))


def test_the_value_is_a_number_like_any_other():
    _, loss = prepared()
    assert type(loss.detach()) is torch.Tensor
    assert float(loss.detach()) == loss.item()
    assert f"{loss:.3f}" == f"{loss.item():.3f}"
    assert torch.isfinite(loss)
    assert (loss / 2).requires_grad


@pytest.fixture
def _warn_again(monkeypatch):
    monkeypatch.setattr(targets, "_warned", False)


@pytest.mark.usefixtures("_warn_again")
@pytest.mark.parametrize("engine", ENGINES)
def test_losses_that_are_summed_and_not_divided_are_said_once(engine, caplog):
    model, batch = tiny_model("torch_llama"), tiny_batch()
    handle = sk.patch(model, scope="all", engine=engine)

    def backward(factor):
        loss = handle.unlearning_loss(logits_of(model, batch), batch["labels"], FORGET)
        (loss * factor).backward()

    with caplog.at_level(logging.WARNING):
        backward(0.5)
        backward(0.5)
        model.zero_grad()
        backward(1)
        model.zero_grad()
        backward(1)
        assert not caplog.records
        for _ in range(3):
            backward(1)
    assert len(caplog.records) == 1
    assert "without being divided by their number" in caplog.text


def test_logits_of_a_copy_are_refused():
    model, batch = tiny_model("torch_llama"), tiny_batch()
    other = copy.deepcopy(model)
    handle = sk.patch(model, scope="all")
    with pytest.raises(ValueError, match="depend on no trainable parameter of the handle's scope"):
        handle.unlearning_loss(logits_of(other, batch), batch["labels"], FORGET)


WRONG = {
    "no logits": (TypeError, "logits is a NoneType", {"logits": None}),
    "a model's output": (TypeError, r"pass its \.logits", {"logits": SimpleNamespace(logits=torch.zeros(1))}),
    "logits without tokens": (ValueError, r"expected \[B, S, V\]", {"logits": torch.zeros(4, 61)}),
    "no labels": (TypeError, "labels is a NoneType", {"labels": None}),
    "labels in int32": (TypeError, "int32; expected int64", {"labels": torch.ones(4, 11, dtype=torch.int32)}),
    "labels in float": (TypeError, "float32; expected int64", {"labels": torch.ones(4, 11)}),
    "labels of another length": (ValueError, r"labels \[4, 9\]", {"labels": torch.ones(4, 9).long()}),
    "a label beyond the vocabulary": (ValueError, "has the token 61", {"labels": torch.full((4, 11), 61)}),
    "a negative label": (ValueError, "has the token -1", {"labels": torch.full((4, 11), -1)}),
    "forget as a list": (TypeError, "forget is a list", {"forget": [True, False, True, False]}),
    "forget as numbers": (ValueError, "expected a bool mask", {"forget": torch.ones(4)}),
    "no forwards": (ValueError, "0 logits", {"logits": [], "labels": []}),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("error", "message", "changes"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(error, message, changes, engine):
    model, batch = tiny_model("torch_llama"), tiny_batch()
    handle = sk.patch(model, scope="all", engine=engine)
    arguments = {"logits": logits_of(model, batch), "labels": batch["labels"], "forget": FORGET, **changes}
    with pytest.raises(error, match=message):
        handle.unlearning_loss(**arguments)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_scaled_loss_is_refused_where_weights_are_updated_in_backward(engine):
    model, batch = tiny_model("torch_llama"), tiny_batch()
    handle = sk.patch(model, scope="all", engine=engine)
    optimizer = sk.SsiuuAdamW(model.parameters(), update_in_backward=True)
    before = copy.deepcopy(model.state_dict())
    loss = handle.unlearning_loss(logits_of(model, batch), batch["labels"], FORGET)
    with pytest.raises(ValueError, match="the loss was multiplied by 65536"):
        (loss * 65536.0).backward()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    handle.unlearning_loss(logits_of(model, batch), batch["labels"], FORGET).backward()
    optimizer.step()
    assert not all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("in_backward", [False, True], ids=["step", "update in backward"])
def test_a_step_without_a_forget_sample_is_plain_adamw(in_backward, engine):
    model, batch = tiny_model("torch_llama", torch.float64), tiny_batch()
    plain = copy.deepcopy(model)
    handle = sk.patch(model, scope="all", engine=engine)
    optimizer = sk.SsiuuAdamW(model.parameters(), lr=1e-3, penalty_weight=10.0, update_in_backward=in_backward)
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    nothing = torch.zeros(4, dtype=torch.bool)
    for _ in range(3):
        handle.unlearning_loss(logits_of(model, batch), batch["labels"], nothing).backward()
        optimizer.step()
        optimizer.zero_grad()
        lengths = (batch["labels"][:, 1:] != -100).sum()
        (-sk.sequence_log_probs(logits_of(plain, batch), batch["labels"]).sum() / lengths).backward()
        reference.step()
        reference.zero_grad()
    for param, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(param, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("what", ["loss", "step"])
def test_more_than_one_process_is_refused(what, monkeypatch):
    model, loss = prepared()
    optimizer, batch = sk.SsiuuAdamW(model.parameters()), tiny_batch()
    loss.backward()
    handle = sk.patch(copy.deepcopy(model), scope="all")
    refused = {
        "loss": lambda: handle.unlearning_loss(logits_of(model, batch), batch["labels"], FORGET),
        "step": optimizer.step,
    }[what]
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="2 processes; expected one"):
        refused()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_pickle_of_a_parameter_needs_nothing_of_this_package(tmp_path):
    model, loss = prepared()
    loss.backward()
    torch.save(list(model.parameters()), tmp_path / "params.pt")
    content = (tmp_path / "params.pt").read_bytes()
    assert b"ssiuu" not in content
