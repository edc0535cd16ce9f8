"""The one rule and the one table by which an op's result is judged right."""

import torch
from torch import Tensor

# Room beside twice PyTorch's own error, in units of the result's largest value, for PyTorch's error on a handful of
# numbers can be 0 by luck: one rounding where the result is stored in a narrower type than it was computed in, and
# where it is not, four, for the formulas have some eight operations of half a rounding each.
ROUNDING = {torch.float64: 4 * 2**-52, torch.float32: 4 * 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}

# Largest relative L2 distance from the exact result, for any size, where bias could hide behind large elements.
RELATIVE_L2 = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def assert_as_accurate_as_pytorch(actual: Tensor, exact: Tensor, eager: Tensor, dtype: torch.dtype) -> None:
    """`actual` errs at most twice as much as `eager`, PyTorch computing the same in `dtype`; `exact` is float64."""
    assert actual.shape == exact.shape
    actual, eager = actual.double(), eager.double()
    assert actual.isfinite().all()
    if exact.numel() == 0:
        return
    error, allowed = (actual - exact).abs().max(), 2 * (eager - exact).abs().max()
    floor = ROUNDING[dtype] * exact.abs().max() + torch.finfo(torch.float32).tiny
    assert error <= allowed + floor, f"error {error:.3e}, PyTorch's own {allowed / 2:.3e}, floor {floor:.3e}"


def assert_same_direction(actual: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """`actual` and `exact` agree as vectors: relative L2 distance and cosine.

    One number has no direction, and where its terms cancel no relative accuracy: the rule above judges it alone.
    """
    if exact.numel() == 1:
        return
    actual, exact = actual.double().flatten(), exact.double().flatten()
    norm = exact.norm()
    tiny = torch.finfo(torch.float32).tiny  # what is smaller than a normal number may be flushed to 0
    if norm <= tiny:
        assert actual.norm() <= tiny
        return
    assert (actual - exact).norm() / norm <= RELATIVE_L2[dtype]
    assert torch.dot(actual, exact) / (actual.norm() * norm) >= 1 - RELATIVE_L2[dtype]
