"""The penalty on neurons (Eq. 3), as an argument of `glu_backward` and `act_backward`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.precision import LARGEST


class NeuronPenalty(NamedTuple):
    """Asks a backward to add the gradient of `weight * sum_b sum_{i: A_t < 0} (A_{t,b,i} - A_{t-1,b,i})^2`.

    `A_{t,b,i} = ratio_b * sum_k h_{b,k,i} * grad_h_{b,k,i}` over the tokens k of sample b, with
    `dP_b/dh = ratio_b * grad_h` held constant (project design, section 2, "neuron level"). So where `A_t < 0` the
    arriving signal is multiplied by `1 + 2 weight ratio_b (A_t - A_{t-1})`.

    Attributes:
        weight: lambda, from 0 to 1e30; a float, or a 0-dim tensor on the data's device, which is not read on the host:
            out of this range it counts as 0.
        ratio: float32 `[B]`, what turns grad_h into dP_b/dh: `P_b / w_b` where `w_b ds_b/dh` arrives; 0: no penalty.
        bank: float32 `[N, F]`, contiguous; `A_{t-1}` of N samples, NaN where a sample has not been seen. Overwritten
            with `A_t`. (float64, as ratio, for float64 data.)
        rows: int64 `[B]`, each sample's row of the bank, no row twice; -1 for a sample without one, which is not
            penalised. Values are checked on the CPU, and trusted on a GPU.
    """

    weight: float | Tensor
    ratio: Tensor
    bank: Tensor
    rows: Tensor


def check_penalty(penalty: NeuronPenalty | None, x: Tensor, segments: Tensor) -> None:
    """The penalty's tensors fit data `[.., F]` of `len(segments)` samples."""
    if penalty is None:
        return
    weight, ratio, bank, rows = penalty
    samples, width = len(segments), x.shape[-1]
    state = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, tensor, dtype, shape in (
        ("ratio", ratio, state, [samples]),
        ("bank", bank, state, [None, width]),
        ("rows", rows, torch.int64, [samples]),
    ):
        if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
            came = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"penalty.{name} is {came}; expected a {dtype} tensor")
        came = list(tensor.shape)
        if len(came) != len(shape) or any(size not in (None, n) for n, size in zip(came, shape, strict=True)):
            expected = ["N" if size is None else size for size in shape]
            raise ValueError(f"penalty.{name} has shape {came}; expected {expected}".replace("'", ""))
        if tensor.device != x.device:
            raise ValueError(f"penalty.{name} is on {tensor.device} and the data on {x.device}; move it there")
        if not tensor.is_contiguous():
            raise ValueError(f"penalty.{name} is not contiguous; pass penalty.{name}.contiguous()")
    if isinstance(weight, Tensor):
        if weight.dim() or weight.device != x.device:
            raise ValueError(f"penalty.weight is {list(weight.shape)} on {weight.device}; expected 0-dim on {x.device}")
    elif not 0 <= weight <= LARGEST:
        raise ValueError(f"penalty.weight={weight}; expected a finite number from 0 to {LARGEST:g}")


def check_penalty_rows(rows: Tensor, bank: Tensor) -> None:
    """Rows of the bank are there, and no two samples share one. On a GPU the values are trusted: no host read."""
    if rows.is_cuda:
        return
    used = rows[rows >= 0]
    if bool((rows < -1).any()) or bool((used >= len(bank)).any()) or len(used.unique()) < len(used):
        raise ValueError(
            f"penalty.rows is {rows.tolist()}; expected -1, or different numbers from 0 to {len(bank) - 1}: "
            "the bank has one row for each sample"
        )
