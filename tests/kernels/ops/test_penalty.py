"""penalty_ and penalty_adamw_: every backend against float64 formulas and torch.optim.AdamW."""

import math

import pytest
import torch

import ssiuu_kernels as sk
from ssiuu_kernels.ops.penalty.rounding import random_bits, round_at_random
from ssiuu_kernels.ops.penalty.scalars import step_scalars

from ...support import eager
from ...support.accuracy import assert_as_accurate_as_pytorch, assert_same_direction
from ...support.cases import BACKENDS

# parameter, gradients, states
TYPES = {
    "float32": (torch.float32, torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "float32 states": (torch.bfloat16, torch.bfloat16, torch.float32),
    "float32 gradients": (torch.bfloat16, torch.float32, torch.float32),
}
SIZES = [1, 15, 1003, 70001]
ADAMW = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def make_inputs(size, types):
    """param, grad, target_grad, prev_attribution, exp_avg, exp_avg_sq."""
    param, grad, state = types
    tensors = [torch.randn(size).to(dtype) for dtype in (param, grad, grad, state, state)]
    return [*tensors, torch.rand(size).to(state)]


def doubled(tensors):
    return [tensor.double() for tensor in tensors]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("types", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("step", [1, 2, 7])
def test_penalty(step, size, types, backend):
    param, grad, target_grad, previous, *_ = make_inputs(size, types)
    inputs = (param, grad.clone(), target_grad, previous.clone())
    exact_grad, exact_attribution, exact_stats = eager.penalty(*doubled(inputs), 0.3, step)
    own_grad, own_attribution, _ = eager.penalty(*inputs, 0.3, step)
    stats = sk.ops.penalty_(grad, param, target_grad, previous, weight=0.3, step=step, backend=backend)
    assert_as_accurate_as_pytorch(grad, exact_grad, own_grad, grad.dtype)
    assert_same_direction(grad, exact_grad, grad.dtype)
    assert_as_accurate_as_pytorch(previous, exact_attribution, own_attribution, previous.dtype)
    # The share counts a comparison of rounded numbers: one scalar may fall either way.
    for name, actual, exact in zip(stats._fields, stats, exact_stats, strict=True):
        slack = 1 / max(exact_stats[4].item(), 1) if name == "share" else 0
        assert abs(actual.item() - exact.item()) <= 1e-5 * abs(exact.item()) + slack, name


def adamw_step(tensors, weight, step, dtype):
    """The update in eager PyTorch: the penalised gradient handed to torch.optim.AdamW with its state at step - 1."""
    param, grad, target_grad, previous, exp_avg, exp_avg_sq = (tensor.to(dtype) for tensor in tensors)
    total, attribution, _ = eager.penalty(param, grad, target_grad, previous, weight, step)
    param = torch.nn.Parameter(param)
    optimizer = torch.optim.AdamW([param], **ADAMW, foreach=False)
    optimizer.state[param] = {
        "step": torch.tensor(step - 1.0),
        "exp_avg": exp_avg.clone(),
        "exp_avg_sq": exp_avg_sq.clone(),
    }
    param.grad = total
    optimizer.step()
    state = optimizer.state[param]
    return param.detach(), attribution, state["exp_avg"], state["exp_avg_sq"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("types", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("step", "weight"), [(1, 0.3), (2, 0.3), (50, 0.3), (3, 0.0)])
def test_penalty_adamw(step, weight, size, types, backend):
    tensors = make_inputs(size, types)
    exact = adamw_step([tensor.clone() for tensor in tensors], weight, step, torch.float64)
    own = adamw_step([tensor.clone() for tensor in tensors], weight, step, types[0])
    sk.ops.penalty_adamw_(*tensors, step=step, weight=weight, backend=backend, **ADAMW)
    param, _, _, previous, exp_avg, exp_avg_sq = tensors
    for actual, wanted, eager_value in zip((param, previous, exp_avg, exp_avg_sq), exact, own, strict=True):
        assert_as_accurate_as_pytorch(actual, wanted, eager_value, actual.dtype)
        assert_same_direction(actual, wanted, actual.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_two_forms_give_the_same_statistics(backend):
    param, grad, target_grad, previous, exp_avg, exp_avg_sq = make_inputs(5003, TYPES["float32"])
    alone = sk.ops.penalty_(grad.clone(), param, target_grad, previous.clone(), weight=0.7, step=2, backend=backend)
    fused = sk.ops.penalty_adamw_(
        param, grad, target_grad, previous, exp_avg, exp_avg_sq, step=2, weight=0.7, backend=backend, **ADAMW
    )
    assert alone == fused


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_left_alone_by_the_update(backend):
    tensors = make_inputs(257, TYPES["float32"])
    grad, target_grad = tensors[1].clone(), tensors[2].clone()
    sk.ops.penalty_adamw_(*tensors, step=2, weight=0.3, backend=backend, **ADAMW)
    assert torch.equal(tensors[1], grad)
    assert torch.equal(tensors[2], target_grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    param, grad, target_grad, previous, exp_avg, exp_avg_sq = ([x] for x in make_inputs(40, TYPES["float32"]))
    scalars = step_scalars(2, 0.3, torch.device("cpu"), **ADAMW).host
    torch.library.opcheck(torch.ops.ssiuu.penalty_, (grad, param, target_grad, previous, scalars, None, True, backend))
    states = (previous, exp_avg, exp_avg_sq)
    torch.library.opcheck(
        torch.ops.ssiuu.penalty_adamw_, (param, grad, target_grad, *states, scalars, None, True, [7], backend)
    )


def test_compiles_into_one_graph():
    tensors = make_inputs(40, TYPES["float32"])
    twins = [tensor.clone() for tensor in tensors]

    def update(*tensors):
        return sk.ops.penalty_adamw_(*tensors, step=2, weight=0.3, **ADAMW).value

    value = torch.compile(update, fullgraph=True, backend="aot_eager")(*tensors)
    assert torch.allclose(value, update(*twins))
    assert all(torch.equal(tensor, twin) for tensor, twin in zip(tensors, twins, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("step", [1, 2, 50])
def test_scalars_from_tensors_equal_those_from_numbers(step, backend):
    tensors = make_inputs(303, TYPES["float32"])
    twins = [tensor.clone() for tensor in tensors]
    stats = sk.ops.penalty_adamw_(*tensors, step=step, weight=0.3, backend=backend, **ADAMW)
    options = {**ADAMW, "lr": torch.tensor(ADAMW["lr"], dtype=torch.float64)}
    step, weight = torch.tensor(step), torch.tensor(0.3, dtype=torch.float64)
    same = sk.ops.penalty_adamw_(*twins, step=step, weight=weight, backend=backend, **options)
    assert torch.allclose(torch.stack(same), torch.stack(stats), rtol=1e-6)
    for tensor, twin in zip(tensors, twins, strict=True):
        assert torch.allclose(tensor, twin, rtol=1e-6, atol=1e-12)


MANY = [1, 5000, 0, 33, 8192, 20000, *range(2, 60)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("types", ["float32", "bfloat16"])
def test_many_equal_one_by_one(types, backend):
    """More parameters than one table of a launch holds, one of them empty, chunks and their neighbours."""
    every = [make_inputs(size, TYPES[types]) for size in (MANY if backend != "triton" else MANY[:12])]
    twins = [[tensor.clone() for tensor in tensors] for tensors in every]
    options = {"step": 3, "weight": 0.3, "backend": backend, **ADAMW}
    seeds = list(range(5, 5 + len(every)))
    total = sk.ops.penalty_adamw_many_(*zip(*every, strict=True), **options, seeds=seeds)
    parts = [sk.ops.penalty_adamw_(*tensors, **options, seed=seed) for tensors, seed in zip(twins, seeds, strict=True)]
    for tensors, expected in zip(every, twins, strict=True):
        assert all(torch.equal(tensor, twin) for tensor, twin in zip(tensors, expected, strict=True))
    assert torch.allclose(torch.stack(total), torch.stack(sk.PenaltyStats.total(parts)), rtol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_penalty_of_many_equals_one_by_one(backend):
    every = [make_inputs(size, TYPES["float32"])[:4] for size in (7, 600, 31)]
    twins = [[tensor.clone() for tensor in tensors] for tensors in every]
    options = {"step": 3, "weight": 0.3, "backend": backend}
    params, grads, target_grads, previous = zip(*every, strict=True)
    sk.ops.penalty_many_(grads, params, target_grads, previous, **options)
    for (param, grad, target_grad, before), tensors in zip(twins, every, strict=True):
        sk.ops.penalty_(grad, param, target_grad, before, **options)
        assert torch.equal(tensors[1], grad)
        assert torch.equal(tensors[3], before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("types", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("before", [math.inf, -math.inf, math.nan])
def test_a_weight_of_0_is_adamw_whatever_the_last_attribution(before, types, backend):
    tensors = make_inputs(40, types)
    twins = [tensor.clone() for tensor in tensors]
    tensors[3].fill_(before)
    options = {"step": 5, "weight": 0.0, "backend": backend}
    sk.ops.penalty_adamw_(*tensors, **options, **ADAMW)
    sk.ops.penalty_adamw_(*twins, **options, **ADAMW)
    assert all(torch.equal(tensor, twin) for tensor, twin in zip(tensors, twins, strict=True))
    param, grad, target_grad, *_ = twins
    kept = grad.clone()
    sk.ops.penalty_(grad, param, target_grad, torch.full_like(twins[3], before), **options)
    assert torch.equal(grad, kept)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("types", TYPES.values(), ids=TYPES)
def test_an_attribution_that_was_never_measured_is_not_penalised(types, backend):
    param, grad, target_grad, previous, *_ = make_inputs(40, types)
    twin, zeros = grad.clone(), previous.clone()
    unknown = torch.arange(40) % 3 == 0
    previous[unknown] = math.nan
    options = {"weight": 0.3, "step": 5, "backend": backend}
    stats = sk.ops.penalty_(grad, param, target_grad, previous, **options)
    sk.ops.penalty_(twin, param, target_grad, zeros, **options)
    assert torch.equal(grad[~unknown], twin[~unknown])
    assert stats.value.isfinite()
    assert torch.equal(previous, zeros)  # it is measured now
    untouched = make_inputs(40, types)[1]
    kept = untouched.clone()
    sk.ops.penalty_(untouched, param, target_grad, torch.full_like(previous, math.nan), **options)
    assert torch.equal(untouched, kept)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("types", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize(
    ("step", "seed"), [(1, None), (2, 11), (torch.tensor(1), 11), (torch.tensor(2), None)], ids=str
)
def test_a_kept_anchor_is_written_once_and_changes_nothing_else(seed, step, types, backend):
    """At step 1, and later where it was never measured. The rest of the step is the same, to the bit."""
    tensors = make_inputs(303, types)
    tensors[3][::5] = math.nan
    tensors[3][1::7] = math.inf
    before, twins = tensors[3].clone(), [tensor.clone() for tensor in tensors]
    options = {"step": step, "weight": 0.3, "seed": seed, "backend": backend, **ADAMW}
    stats = sk.ops.penalty_adamw_(*tensors, **options, keep_anchor=True)
    assert stats == sk.ops.penalty_adamw_(*twins, **options)
    expected = twins[3] if step == 1 else torch.where(before.isnan(), twins[3], before)
    assert torch.equal(tensors[3], expected)
    for place in (0, 1, 2, 4, 5):
        assert torch.equal(tensors[place].nan_to_num(7.0), twins[place].nan_to_num(7.0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("types", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("step", [1, 2])
def test_a_kept_anchor_of_the_penalty_alone(step, types, backend):
    param, grad, target_grad, previous, *_ = make_inputs(303, types)
    previous[::5] = math.nan
    before, twin, replaced = previous.clone(), grad.clone(), previous.clone()
    options = {"step": step, "weight": 0.3, "backend": backend}
    stats = sk.ops.penalty_(grad, param, target_grad, previous, **options, keep_anchor=True)
    assert stats == sk.ops.penalty_(twin, param, target_grad, replaced, **options)
    assert torch.equal(grad, twin)
    assert torch.equal(previous, replaced if step == 1 else torch.where(before.isnan(), replaced, before))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("types", TYPES.values(), ids=TYPES)
def test_without_a_kept_anchor_every_attribution_is_stored_to_the_bit(types, backend):
    param, grad, target_grad, previous, *_ = make_inputs(1003, types)
    attribution = param.float() * target_grad.float()
    sk.ops.penalty_(grad, param, target_grad, previous, weight=0.3, step=2, backend=backend)
    assert torch.equal(previous, attribution.to(previous.dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_without_a_kept_anchor_are_exact_where_the_numbers_are_short(backend):
    """Three steps of Algorithm 1 on multiples of 1/16: no product or sum is rounded, in whatever order or fused."""
    previous = torch.full((1003,), math.nan)
    for step in (1, 2, 3):
        param, target_grad, grad = (torch.randint(-48, 49, (1003,)) / 16 for _ in range(3))
        attribution = param.double() * target_grad.double()
        growth = torch.where(attribution < 0, attribution - previous, 0).nan_to_num(0.0)
        expected = grad + 0.5 * growth * target_grad.double()
        stats = sk.ops.penalty_(grad, param, target_grad, previous, weight=0.25, step=step, backend=backend)
        assert torch.equal(grad.double(), expected)
        assert torch.equal(previous.double(), attribution)
        assert stats.value == growth.square().sum()
    assert stats.value > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinity_and_nan_go_where_the_formula_puts_them(backend):
    param, grad, target_grad, previous = eager.specials(4, torch.float32)
    attribution = param * target_grad
    penalised = (attribution < 0) & ~previous.isnan()
    expected = grad + torch.where(penalised, 0.6 * (attribution - previous) * target_grad, 0)
    sk.ops.penalty_(grad, param, target_grad, previous, weight=0.3, step=2, backend=backend)
    assert torch.equal(eager.kinds(grad), eager.kinds(expected))
    assert torch.equal(eager.kinds(previous), eager.kinds(attribution))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("types", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("name", ["weight", "lr"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 1e39])
def test_a_tensor_out_of_range_leaves_the_parameter(value, name, types, backend):
    """It is not read on the host, and so cannot be refused."""
    tensors = make_inputs(40, types)
    before = tensors[0].clone()
    options = {**ADAMW, "weight": 0.3, name: torch.tensor(value, dtype=torch.float64)}
    sk.ops.penalty_adamw_(*tensors, step=3, seed=5, backend=backend, **options)
    assert torch.equal(tensors[0], before)
    assert all(tensor.isfinite().all() for tensor in tensors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 1e39])
def test_a_weight_tensor_out_of_range_adds_nothing(value, backend):
    param, grad, target_grad, previous, *_ = make_inputs(40, TYPES["float32"])
    before = grad.clone()
    weight = torch.tensor(value, dtype=torch.float64)
    sk.ops.penalty_(grad, param, target_grad, previous, weight=weight, step=3, backend=backend)
    assert torch.equal(grad, before)


BAD_SCALARS = {
    "a weight that overflows": ("weight=1e\\+39", {"weight": 1e39}),
    "a negative weight": ("weight=-1", {"weight": -1}),
    "no step": ("step=nan", {"step": math.nan}),
    "an infinite lr": ("lr=inf", {"lr": math.inf}),
    "a negative lr": ("lr=-0.1", {"lr": -0.1}),
    "NaN for eps": ("eps=nan", {"eps": math.nan}),
    "an infinite decay": ("weight_decay=inf", {"weight_decay": math.inf}),
    "a beta of 1": ("betas", {"betas": (1.0, 0.9)}),
    "steps that overflow": ("finite steps", {"lr": 1e29, "betas": (0.9999, 0.9)}),
}


@pytest.mark.parametrize(("message", "changes"), BAD_SCALARS.values(), ids=BAD_SCALARS)
def test_bad_scalars_are_refused_before_anything_is_written(message, changes):
    tensors = make_inputs(9, TYPES["float32"])
    before = [tensor.clone() for tensor in tensors]
    with pytest.raises(ValueError, match=message):
        sk.ops.penalty_adamw_(*tensors, **{"step": 2, "weight": 0.1, **ADAMW, **changes})
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))


def many_arguments():
    return [list(tensors) for tensors in zip(*(make_inputs(6, TYPES["float32"]) for _ in range(3)), strict=True)]


def test_a_parameter_given_twice_is_refused():
    arguments = many_arguments()
    arguments[0][2] = arguments[0][0]
    with pytest.raises(ValueError, match=r"param\[2\] and param\[0\] share memory"):
        sk.ops.penalty_adamw_many_(*arguments, step=2, weight=0.1, **ADAMW)


OVERLAPS = {
    "two parameters": ((0, 0), (0, 2), (0, 4)),
    "a parameter and another's gradient": ((1, 2), (0, 0), (0, 3)),
    "a state and another's parameter": ((5, 1), (0, 2), (3, 8)),
    "two states of one": ((4, 0), (3, 0), (2, 4)),
}


@pytest.mark.parametrize(("one", "other", "starts"), OVERLAPS.values(), ids=OVERLAPS)
def test_views_that_overlap_across_parameters_are_refused(one, other, starts):
    """`one` and `other` are places (list, parameter), their tensors views of one storage."""
    storage, arguments = torch.randn(20), many_arguments()
    for (which, index), start in zip((one, other), starts, strict=True):
        arguments[which][index] = storage[start : start + 6]
    with pytest.raises(ValueError, match="share memory"):
        sk.ops.penalty_adamw_many_(*arguments, step=2, weight=0.1, **ADAMW)


def test_what_is_only_read_may_be_shared():
    arguments = many_arguments()
    arguments[1][1] = arguments[2][0] = arguments[1][0]
    before = arguments[1][0].clone()
    sk.ops.penalty_adamw_many_(*arguments, step=2, weight=0.1, **ADAMW)
    assert torch.equal(arguments[1][0], before)


def test_parameters_of_two_types_are_refused():
    arguments = many_arguments()
    arguments[0][1] = arguments[0][1].bfloat16()
    with pytest.raises(ValueError, match=r"param\[1\] is torch.bfloat16"):
        sk.ops.penalty_adamw_many_(*arguments, step=2, weight=0.1, **ADAMW)


def test_lists_of_different_lengths_are_refused():
    arguments = many_arguments()
    arguments[2].pop()
    with pytest.raises(ValueError, match="'target_grad': 2"):
        sk.ops.penalty_adamw_many_(*arguments, step=2, weight=0.1, **ADAMW)


@pytest.mark.parametrize("backend", BACKENDS)
def test_stochastic_rounding_draws_the_same_everywhere(backend):
    """Every backend rounds to one of the two neighbours, and to that of the reference wherever their floats agree."""
    tensors = make_inputs(1003, TYPES["bfloat16"])
    twins = [tensor.clone() for tensor in tensors]
    options = {"step": 3, "weight": 0.3, "seed": 11, **ADAMW}
    sk.ops.penalty_adamw_(*tensors, **options, backend=backend)
    sk.ops.penalty_adamw_(*twins, **options, backend="reference")
    for tensor, twin in zip(tensors, twins, strict=True):
        assert (tensor == twin).float().mean() > 0.99


@pytest.mark.parametrize("backend", BACKENDS)
def test_stochastic_rounding_keeps_the_mean(backend):
    """One update of many equal scalars: the mean of the rounded values is the exact one, within five deviations."""
    size = 1 << 14
    value = 1 + 2**-7 * 0.3  # three tenths of the way from one bfloat16 number to the next
    exact = torch.full((size,), value)
    tensors = [
        torch.ones(size), torch.zeros(size), torch.full((size,), value), torch.zeros(size), torch.zeros(size),
        torch.zeros(size),
    ]  # fmt: skip
    param, grad, target_grad, previous, exp_avg, exp_avg_sq = tensors
    previous, exp_avg, exp_avg_sq = (x.bfloat16() for x in (previous, exp_avg, exp_avg_sq))
    options = {**ADAMW, "step": 1, "weight": 0.0, "seed": 3, "backend": backend}
    sk.ops.penalty_adamw_(param, grad, target_grad, previous, exp_avg, exp_avg_sq, **options)
    spacing = 2**-7
    deviation = spacing / 2 / size**0.5
    assert abs(previous.double().mean() - exact.double().mean()) < 5 * deviation
    assert set(previous.unique().tolist()) == {1.0, 1.0 + spacing}


def test_stochastic_rounding_depends_on_seed_and_step_alone():
    def run(**options):
        torch.manual_seed(0)
        tensors = make_inputs(500, TYPES["bfloat16"])
        sk.ops.penalty_adamw_(*tensors, **{"step": 2, "weight": 0.3, "seed": 1, **ADAMW, **options})
        return tensors[0]

    assert torch.equal(run(), run())
    assert not torch.equal(run(), run(seed=2))
    assert not torch.equal(random_bits(1, 2, 50, "cpu")[0], random_bits(1, 3, 50, "cpu")[0])


def test_stochastic_rounding_keeps_infinity_and_nan():
    x = torch.tensor([math.inf, -math.inf, math.nan, 3e38])
    for bits in (0, 0xFFFF):
        rounded = round_at_random(x, torch.full((4,), bits))
        assert rounded[:2].tolist() == [math.inf, -math.inf]
        assert rounded[2].isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_is_not_rounded(backend):
    tensors = make_inputs(99, TYPES["float32"])
    twins = [tensor.clone() for tensor in tensors]
    options = {"step": 3, "weight": 0.3, "backend": backend, **ADAMW}
    sk.ops.penalty_adamw_(*tensors, **options, seed=11)
    sk.ops.penalty_adamw_(*twins, **options)
    assert all(torch.equal(tensor, twin) for tensor, twin in zip(tensors, twins, strict=True))


def test_statistics_of_parts_add_up():
    param, grad, target_grad, previous, *_ = make_inputs(400, TYPES["float32"])
    whole = sk.ops.penalty_(grad.clone(), param, target_grad, previous.clone(), weight=0.3, step=2)
    parts = [
        sk.ops.penalty_(*(t[piece].clone() for t in (grad, param, target_grad, previous)), weight=0.3, step=2)
        for piece in (slice(0, 100), slice(100, 400))
    ]
    assert torch.allclose(torch.stack(sk.PenaltyStats.total(parts)), torch.stack(whole), rtol=1e-6)
