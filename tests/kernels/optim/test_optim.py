"""SsiuuAdamW and SsiuuPenalty against Algorithm 1 written out with plain tensors."""

import copy
import math

import pytest
import torch

import ssiuu_kernels as sk
from ssiuu_kernels.optim import penalised

from ...support.models import logits_of, tiny_batch, tiny_model

FORGET = torch.tensor([True, True, False, False])
# eps lies above the rounding of the gradients: below it Adam turns the sign of what should be 0 into a whole step.
ADAMW = {"lr": 2e-3, "betas": (0.9, 0.99), "eps": 1e-5, "weight_decay": 0.05}
LAMBDA = 1e5  # a random model gives an answer of one token a probability near 0.02; here the penalty takes part


def losses(model, batch):
    """GD's loss and the sum of the forget answers' probabilities."""
    s = sk.sequence_log_probs(logits_of(model, batch), batch["labels"])
    lengths = (batch["labels"][:, 1:] != -100).sum(1)
    loss = s[FORGET].sum() / lengths[FORGET].sum() - s[~FORGET].sum() / lengths[~FORGET].sum()
    return loss, s[FORGET].exp().sum()


def literal_algorithm_1(model, batch, steps, penalty_weight):
    """Algorithm 1 with two forwards, two backwards, plain tensors and torch.optim.AdamW. Returns R_t of every step."""
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params, **ADAMW)
    previous, values = None, []
    for _ in range(steps):
        loss_grads = torch.autograd.grad(losses(model, batch)[0], params)
        target_grads = torch.autograd.grad(losses(model, batch)[1], params)
        attributions = [p.detach() * g for p, g in zip(params, target_grads, strict=True)]
        value = 0.0
        for index, param in enumerate(params):
            param.grad = loss_grads[index].clone()
            if previous is not None:
                change = attributions[index] - previous[index]
                change[attributions[index] >= 0] = 0
                param.grad += 2 * penalty_weight * change * target_grads[index]
                value += change.square().sum().item()
        optimizer.step()
        previous = attributions
        values.append(value)
    return values


def short_answers():
    """A batch whose answers are one token, so that a random model gives them probabilities that matter."""
    batch = tiny_batch()
    answer = batch["labels"] != -100
    batch["labels"] = batch["labels"].masked_fill(answer & (answer.cumsum(1) < 4), -100)
    return batch


def weight_that_counts(model, batch):
    """LAMBDA as it would be at P = 0.02: the penalty goes as the square of the answers' random probability."""
    probability = losses(model, batch)[1].item() / FORGET.sum().item()
    return LAMBDA * (0.02 / probability) ** 2


@pytest.mark.parametrize(
    ("dtype", "backend", "tolerance"),
    [(torch.float64, "reference", 1e-9), (torch.float32, "native", 1e-4), (torch.float32, "reference", 1e-4)],
)
@pytest.mark.parametrize("is_penalised", [True, False])
def test_adamw_equals_algorithm_1_over_20_steps(is_penalised, dtype, backend, tolerance):
    model, batch = tiny_model("torch_llama", dtype), short_answers()
    penalty_weight = weight_that_counts(model, batch) if is_penalised else 0.0
    expected = copy.deepcopy(model)
    expected_values = literal_algorithm_1(expected, batch, 20, penalty_weight)
    handle = sk.patch(model, scope="all", backend=backend)
    optimizer = sk.SsiuuAdamW(model.parameters(), **ADAMW, penalty_weight=penalty_weight, backend=backend)
    values = []
    for _ in range(20):
        optimizer.zero_grad()
        handle.unlearning_loss(logits_of(model, batch), batch["labels"], FORGET).backward()
        optimizer.step()
        values.append(optimizer.last_stats.value.item())
    for (name, param), wanted in zip(model.named_parameters(), expected.parameters(), strict=True):
        difference = (param - wanted).norm() / wanted.norm()
        assert difference.item() <= tolerance, name
    if dtype == torch.float64:
        assert values == pytest.approx(expected_values, rel=1e-6)


def test_the_penalty_takes_part():
    """Guards the test above: at its weight, the penalty moves the weights by far more than its tolerances."""
    model, batch = tiny_model("torch_llama", torch.float64), short_answers()
    plain = copy.deepcopy(model)
    literal_algorithm_1(model, batch, 20, weight_that_counts(model, batch))
    literal_algorithm_1(plain, batch, 20, 0.0)
    moved = max((p - q).norm() / q.norm() for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    assert moved > 1e-3


def test_penalty_before_another_optimizer_equals_the_fused_one():
    batch, models = short_answers(), [tiny_model("torch_llama", torch.float64)]
    models.append(copy.deepcopy(models[0]))
    fused = sk.SsiuuAdamW(models[0].parameters(), **ADAMW, penalty_weight=LAMBDA)
    plain = torch.optim.AdamW(models[1].parameters(), **ADAMW)
    penalty = sk.SsiuuPenalty(models[1].parameters(), penalty_weight=LAMBDA)
    handles = [sk.patch(model, scope="all") for model in models]
    for _ in range(5):
        for model, handle in zip(models, handles, strict=True):
            model.zero_grad()
            handle.unlearning_loss(logits_of(model, batch), batch["labels"], FORGET).backward()
        fused.step()
        penalty.apply_()
        plain.step()
    for param, wanted in zip(*(model.parameters() for model in models), strict=True):
        assert torch.allclose(param, wanted, rtol=1e-9, atol=1e-12)


def parameter(**gradients):
    param = torch.nn.Parameter(torch.randn(30))
    for name, gradient in gradients.items():
        setattr(param, name, gradient)
    return param


def step_once(optimizer, param):
    param.grad, param.target_grad = torch.randn(30), torch.randn(30)
    optimizer.step()


def test_resumes_bit_for_bit():
    start = torch.randn(30)
    gradients = torch.randn(6, 2, 30)

    def run(param, optimizer, steps):
        for grad, target_grad in steps:
            param.grad, param.target_grad = grad.clone(), target_grad.clone()
            optimizer.step()

    whole = torch.nn.Parameter(start.clone())
    run(whole, sk.SsiuuAdamW([whole], lr=0.1, penalty_share=0.3), gradients)
    first = torch.nn.Parameter(start.clone())
    optimizer = sk.SsiuuAdamW([first], lr=0.1, penalty_share=0.3)
    run(first, optimizer, gradients[:3])
    second = torch.nn.Parameter(first.detach().clone())
    resumed = sk.SsiuuAdamW([second], lr=0.5)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(second, resumed, gradients[3:])
    assert torch.equal(second, whole)


def test_step_consumes_the_target_gradient():
    param = parameter()
    step_once(sk.SsiuuAdamW([param]), param)
    assert param.target_grad is None
    assert param.grad is not None


def test_zero_grad_clears_both():
    param = parameter(grad=torch.randn(30), target_grad=torch.randn(30))
    sk.SsiuuAdamW([param]).zero_grad()
    assert param.grad is None
    assert param.target_grad is None


def test_a_missing_target_gradient_changes_nothing():
    complete, lacking = parameter(grad=torch.ones(30), target_grad=torch.ones(30)), parameter(grad=torch.ones(30))
    before = complete.detach().clone()
    with pytest.raises(ValueError, match="no target_grad"):
        sk.SsiuuAdamW([complete, lacking]).step()
    assert torch.equal(complete, before)


def test_a_parameter_without_gradient_is_left_alone():
    param, idle = parameter(), parameter()
    before = idle.detach().clone()
    step_once(sk.SsiuuAdamW([param, idle]), param)
    assert torch.equal(idle, before)


def test_the_share_reaches_the_one_asked_for():
    """A quadratic pull against a penalty of fixed strength: the steered share settles within a few steps."""
    torch.manual_seed(0)  # the share of random gradients scatters; what is tested is the rule
    param = torch.nn.Parameter(torch.randn(20000))
    optimizer = sk.SsiuuAdamW([param], lr=0.0, penalty_weight=1e-3, penalty_share=0.25)
    shares = []
    for _ in range(15):
        param.grad, param.target_grad = torch.randn(20000), 1e-2 * torch.randn(20000)
        optimizer.step()
        shares.append(optimizer.last_stats.share.item())
    assert all(abs(share - 0.25) < 0.02 for share in shares[-5:])
    assert optimizer.penalty_weight > 1


def many_parameters(dtype=torch.float32):
    return [torch.nn.Parameter(torch.randn(size).to(dtype)) for size in ((30,), (5, 7), (1,), (64, 3))]


def give_gradients(params):
    for param in params:
        param.grad, param.target_grad = torch.randn_like(param), torch.randn_like(param)


def twins(params):
    copies = [torch.nn.Parameter(param.detach().clone()) for param in params]
    for param, twin in zip(params, copies, strict=True):
        twin.grad, twin.target_grad = param.grad.clone(), param.target_grad.clone()
    return copies


def test_parameters_in_one_launch_are_updated_as_one_by_one(monkeypatch):
    params = many_parameters()
    give_gradients(params)
    others = twins(params)
    together, alone = sk.SsiuuAdamW(params, lr=0.1), sk.SsiuuAdamW(others, lr=0.1)
    together.step()
    monkeypatch.setattr(penalised, "SMALL", 0)
    alone.step()
    assert all(torch.equal(param, other) for param, other in zip(params, others, strict=True))
    assert torch.allclose(torch.stack(together.last_stats), torch.stack(alone.last_stats))


def test_parameters_of_every_type_and_age_are_updated_in_one_step():
    params = [*many_parameters(), *many_parameters(torch.bfloat16)]
    give_gradients(params[1:])
    optimizer = sk.SsiuuAdamW(params, lr=0.1)
    optimizer.step()
    give_gradients(params)  # the first has its first step now
    before = [optimizer.state[param]["exp_avg"].clone() if optimizer.state[param] else None for param in params]
    optimizer.step()
    for param, old in zip(params, before, strict=True):
        assert old is None or not torch.equal(optimizer.state[param]["exp_avg"], old)
    assert [optimizer.state[param]["step"] for param in params] == [1] + [2] * 7


@pytest.mark.parametrize("share", [None, 0.3])
def test_capturable_is_the_same_optimizer(share):
    params = many_parameters()
    give_gradients(params)
    others = twins(params)
    lr = torch.tensor(0.1, dtype=torch.float64)
    plain = sk.SsiuuAdamW(params, lr=0.1, penalty_share=share)
    capturable = sk.SsiuuAdamW(others, lr=lr, penalty_share=share, capturable=True)
    for _ in range(4):
        gradients = [(torch.randn_like(param), torch.randn_like(param)) for param in params]
        for optimizer, own in ((plain, params), (capturable, others)):
            for param, (grad, target_grad) in zip(own, gradients, strict=True):
                param.grad, param.target_grad = grad.clone(), target_grad.clone()
            optimizer.step()
    for param, other in zip(params, others, strict=True):
        assert torch.allclose(param, other, rtol=1e-5, atol=1e-6)
    assert capturable.penalty_weight == pytest.approx(plain.penalty_weight, rel=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("anchor", ["previous", "original"])
def test_a_captured_step_is_replayed(anchor, backend):
    """Three replays of a captured step equal three steps, lambda, anchor and bias corrections included."""
    params = many_parameters()
    give_gradients(params)
    others = twins(params)
    options = {"lr": 0.1, "penalty_share": 0.3, "anchor": anchor, "backend": backend}
    eager = sk.SsiuuAdamW(params, **options)
    captured = sk.SsiuuAdamW(others, capturable=True, **options)
    target_grads = [other.target_grad for other in others]

    def step():
        for other, target_grad in zip(others, target_grads, strict=True):
            other.target_grad = target_grad
        captured.step()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # kernels are compiled and states made outside of the graph
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(3):
        graph.replay()
    for _ in range(4):
        for param, target_grad in zip(params, target_grads, strict=True):
            param.target_grad = target_grad.clone()
        eager.step()
    for param, other in zip(params, others, strict=True):
        assert torch.allclose(param, other, rtol=1e-5, atol=1e-6)
        anchors = (optimizer.state[p]["prev_attribution"] for optimizer, p in ((eager, param), (captured, other)))
        assert torch.allclose(*anchors, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_a_step_reads_nothing_of_the_device(backend):
    params = many_parameters()
    optimizer = sk.SsiuuAdamW(params, penalty_share=0.3, capturable=True, backend=backend)
    give_gradients(params)
    optimizer.step()
    give_gradients(params)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_states_keep_their_type_across_a_resume():
    params = many_parameters(torch.bfloat16)
    give_gradients(params)
    optimizer = sk.SsiuuAdamW(params, state_dtype=torch.float32)
    optimizer.step()
    resumed = sk.SsiuuAdamW(many_parameters(torch.bfloat16), state_dtype=torch.float32)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for param, other in zip(params, resumed.param_groups[0]["params"], strict=True):
        for name in ("prev_attribution", "exp_avg", "exp_avg_sq"):
            assert resumed.state[other][name].dtype == torch.float32
            assert torch.equal(resumed.state[other][name], optimizer.state[param][name])


def test_stochastic_rounding_draws_by_seed_and_place():
    def run(seed):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.ones(500, dtype=torch.bfloat16)) for _ in range(2)]
        for param in params:
            param.grad = param.target_grad = torch.full((500,), 0.3, dtype=torch.bfloat16)
            param.target_grad = param.target_grad.clone()
        sk.SsiuuAdamW(params, lr=1e-3, stochastic_rounding=True, seed=seed).step()
        return [param.detach() for param in params]

    first, second = run(1)
    assert all(torch.equal(a, b) for a, b in zip(run(1), (first, second), strict=True))
    assert not torch.equal(first, second)
    assert not torch.equal(first, run(2)[0])
    assert len(first.unique()) == 2


BAD = {
    "penalty_weight=-1": {"penalty_weight": -1},
    "penalty_weight=nan": {"penalty_weight": math.nan},
    "penalty_share=1.5": {"penalty_share": 1.5},
    "cannot be steered": {"penalty_weight": 0, "penalty_share": 0.3},
    "lr=-1": {"lr": -1},
    "betas": {"betas": (0.9, 1.0)},
    "state_dtype=torch.float16": {"state_dtype": torch.float16},
    "backend='gpu'": {"backend": "gpu"},
}


@pytest.mark.parametrize(("message", "options"), BAD.items(), ids=BAD)
def test_bad_options(message, options):
    with pytest.raises(ValueError, match=message):
        sk.SsiuuAdamW([parameter()], **options)
