"""Every refused argument gives one error that names it, before anything is written."""

import pytest
import torch

import ssiuu_kernels as sk

from ...support.cases import as_segments


def rows(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


GLU = {
    "a list": (TypeError, "up", lambda: (rows(2, 3), [1.0], rows(2, 3)), {}),
    "integers": (TypeError, "gate", lambda: (torch.ones(2, 3, dtype=torch.long), rows(2, 3), rows(2, 3)), {}),
    "one dimension": (ValueError, "gate", lambda: (rows(3), rows(3), rows(3)), {}),
    "another width": (ValueError, "up", lambda: (rows(2, 3), rows(2, 4), rows(2, 3)), {}),
    "another type": (ValueError, "grad_h", lambda: (rows(2, 3), rows(2, 3), rows(2, 3, dtype=torch.bfloat16)), {}),
    "another device": (ValueError, "up", lambda: (rows(2, 3), rows(2, 3).to("meta"), rows(2, 3)), {}),
    "unknown activation": (ValueError, "swish", lambda: [rows(2, 3)] * 3, {"activation": "swish"}),
    "unknown backend": (ValueError, "cutlass", lambda: [rows(2, 3)] * 3, {"backend": "cutlass"}),
    "int64 segments": (TypeError, "segments", lambda: [rows(2, 3)] * 3, {"segments": torch.zeros(1, 2).long()}),
    "flat segments": (ValueError, "segments", lambda: [rows(2, 3)] * 3, {"segments": torch.zeros(2).int()}),
    "segments past the end": (ValueError, "segments", lambda: [rows(2, 3)] * 3, {"segments": as_segments([(0, 3)])}),
    "segments before the start": (
        ValueError,
        "segments",
        lambda: [rows(2, 3)] * 3,
        {"segments": as_segments([(-1, 2)])},
    ),
    "segments backwards": (ValueError, "backwards", lambda: [rows(4, 3)] * 3, {"segments": as_segments([(3, 1)])}),
    "segments that overlap": (
        ValueError,
        "overlap",
        lambda: [rows(4, 3)] * 3,
        {"segments": as_segments([(2, 4), (0, 3)])},
    ),
}


@pytest.mark.parametrize(("error", "message", "tensors", "options"), GLU.values(), ids=GLU)
def test_glu_backward(error, message, tensors, options):
    with pytest.raises(error, match=message):
        sk.ops.glu_backward(*tensors(), scores=True, **options)


def test_token_scores_of_different_shapes():
    with pytest.raises(ValueError, match="grad_z"):
        sk.ops.token_scores(rows(2, 3), rows(3, 3))


def penalty_arguments(**changes):
    names = ("grad", "param", "target_grad", "prev_attribution")
    return {**{name: rows(4, 3) for name in names}, "weight": 0.1, "step": 1, **changes}


PENALTY = {
    "another shape": ("target_grad", {"target_grad": rows(3, 4)}),
    "another type": ("target_grad", {"target_grad": rows(4, 3, dtype=torch.bfloat16)}),
    "float64 among float32": ("float64", {"prev_attribution": rows(4, 3, dtype=torch.float64)}),
    "transposed": ("grad", {"grad": rows(3, 4).t()}),
    "negative weight": ("weight", {"weight": -1.0}),
    "infinite weight": ("weight", {"weight": float("inf")}),
    "step 0": ("step", {"step": 0}),
}


@pytest.mark.parametrize(("message", "changes"), PENALTY.values(), ids=PENALTY)
def test_penalty(message, changes):
    with pytest.raises(ValueError, match=message):
        sk.ops.penalty_(**penalty_arguments(**changes))


def test_penalty_on_shared_memory():
    storage = rows(6, 3)
    with pytest.raises(ValueError, match="share memory"):
        sk.ops.penalty_(**penalty_arguments(grad=storage[:4], param=storage[2:]))


def test_a_refused_penalty_writes_nothing():
    arguments = penalty_arguments(step=0)
    before = arguments["prev_attribution"].clone()
    with pytest.raises(ValueError, match="step"):
        sk.ops.penalty_(**arguments)
    assert torch.equal(arguments["prev_attribution"], before)


def test_native_refuses_float64_with_its_reason():
    if not sk.available_backends()["native"].ok:
        pytest.skip("the native module is not built")
    gate = rows(2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"native.*float64 is not supported"):
        sk.ops.glu_forward(gate, gate, backend="native")
