"""The penalty on neurons (Eq. 3): the bank of last attributions, and the backward that applies the penalty.

Per forget sample b, layer l and neuron i: `A_{b,i} = sum_k h_{b,k,i} c_{b,k,i}` with `c = dP_b/dh` held constant, and
the penalty is `weight * sum (A_{t,b,i} - A_{t-1,b,i})^2` over `A_t < 0`: a sample is compared with its own last value.

One backward serves: `w_b ds_b/dh` arrives at the topmost MLP, and `P_b / w_b` turns it into `c`. The penalty rescales
it there and flows on down with the loss, so what arrives at a lower MLP is the derivative of the penalised objective:
its `c` includes the penalties above it, and the gradient is that of the definition to first order in the weight.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import Variable

from .hidden import Form
from .ops import NeuronPenalty


class NeuronLevel:
    """What the MLPs of one patched model share for the penalty on neurons.

    Args:
        weight: lambda, >= 0; a float, or a 0-dim tensor that a schedule changes in place.
        samples: size of the forget set, `|C_f|`.

    Attributes:
        banks: MLP name -> float32 `[samples, F]` of `A_{t-1}`; NaN where a sample has not been seen.
        value: `R_t` of the last backward, a 0-dim tensor; None before the first.
    """

    def __init__(self, weight: float | Tensor, samples: int):
        if not isinstance(weight, Tensor) and not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"penalty_weight={weight}; expected a finite number >= 0")
        if samples < 1:
            raise ValueError(f"forget_samples={samples}; expected the size of the forget set, at least 1")
        self.weight, self.samples = weight, samples
        self.banks: dict[str, Tensor] = {}
        self.value: Tensor | None = None
        self._ratio: Tensor | None = None  # [B] while a backward of an unlearning loss is under way
        self._rows: Tensor | None = None
        self._segments: Tensor | None = None

    def observe(self, log_probs: Tensor, factor: Tensor, sample_ids: Tensor, length: int) -> Tensor:
        """`log_probs`, through which a backward pass makes this object ready before it reaches an MLP.

        Args:
            log_probs: `[B]`.
            factor: `[B]`, `P_b` (or another target's derivative by `s_b`); 0 for samples that are not penalised.
            sample_ids: int64 `[B]`, place of each sample in the forget set; what stands at others is not read.
            length: rows of a sample, padding included.
        """
        rows = torch.where(factor > 0, sample_ids, -1)
        return _ArmNeuronLevel.apply(log_probs, self, factor, rows, length)

    def arm(self, ratio: Tensor, rows: Tensor, length: int) -> None:
        """Penalise until the backward pass that is under way ends."""
        start = torch.arange(len(rows), dtype=torch.int32, device=rows.device) * length
        self._ratio, self._rows = ratio, rows
        self._segments = torch.stack([start, start + length], dim=1)
        self.value = ratio.new_zeros(())
        Variable._execution_engine.queue_callback(self._disarm)

    def _disarm(self) -> None:
        self._ratio = self._rows = self._segments = None

    def backward(self, name: str, form: Form, inputs: tuple[Tensor, ...], grad_h: Tensor, options: dict) -> tuple:
        """The gradients of a hidden activation's inputs, the penalty's included. See `hidden.Observer`."""
        if self._ratio is None:  # the backward of another loss
            return form.backward(*inputs, grad_h, **options).inputs
        bank = self._bank(name, grad_h)
        previous = bank[self._rows]
        penalty = NeuronPenalty(self.weight, self._ratio, bank, self._rows)
        # A shape [B, S, F] tells the samples apart by itself, and tells the kernels how long they are.
        segments = None if grad_h.dim() == 3 else self._segments
        grads = form.backward(*inputs, grad_h, segments=segments, penalty=penalty, **options)
        growth = bank[self._rows] - previous
        counted = (bank[self._rows] < 0) & ~growth.isnan() & (self._rows >= 0)[:, None]
        self.value += growth.masked_fill(~counted, 0).square().sum()
        return grads.inputs

    def _bank(self, name: str, grad_h: Tensor) -> Tensor:
        if name not in self.banks:
            dtype = torch.float64 if grad_h.dtype == torch.float64 else torch.float32
            size = (self.samples, grad_h.shape[-1])
            self.banks[name] = torch.full(size, math.nan, dtype=dtype, device=grad_h.device)
        return self.banks[name]

    def state_dict(self) -> dict[str, Tensor]:
        """The banks, for a checkpoint."""
        return dict(self.banks)

    def load_state_dict(self, banks: dict[str, Tensor]) -> None:
        """Take over the banks of a checkpoint.

        Raises:
            ValueError: a bank of another forget set's size.
        """
        for name, bank in banks.items():
            if len(bank) != self.samples:
                raise ValueError(f"bank {name} has {len(bank)} samples; expected forget_samples={self.samples}")
        self.banks = {name: bank.clone() for name, bank in banks.items()}


class _ArmNeuronLevel(torch.autograd.Function):
    """The identity on `[B]` log-likelihoods; its backward knows the weight `w_b` that each sample's signal carries."""

    @staticmethod
    def forward(ctx, log_probs: Tensor, level: NeuronLevel, factor: Tensor, rows: Tensor, length: int) -> Tensor:
        ctx.level, ctx.factor, ctx.rows, ctx.length = level, factor, rows, length
        return log_probs.view_as(log_probs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_log_probs: Tensor):
        carried = grad_log_probs != 0
        ratio = torch.where(carried, ctx.factor / torch.where(carried, grad_log_probs, 1), 0)
        ctx.level.arm(ratio, torch.where(carried, ctx.rows, -1), ctx.length)
        return grad_log_probs, None, None, None, None
