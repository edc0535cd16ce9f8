"""A proof that every row of a layer belongs to the one sample that it is taken for.

The gradient of `sum_b w_b v_b` is that of `sum_b v_b` with each row multiplied by its sample's `w_b`, if no row meets
another sample's and the rows stand in the order of the batch; in a model that mixes samples, or that reorders them, it
is not. So one more backward of data gradients, with weights that differ from sample to sample, settles it where
`one_backward.graph.rows_in_order` cannot follow the rows.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

# Powers of two multiply without rounding, so that kernels that are deterministic agree to the last bit. Others
# (atomics) differ by roundings, of which a sum over a row keeps no more than this, relative to the row's norm.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


class RowProof:
    """Compares the signals of two backwards, of `sum_b w_b v_b` and of `sum_b v_b`, row by row.

    Args:
        samples: B, of the batch.
        like: a tensor of the type and device of the values `v`.

    Attributes:
        weights: `w`, `[B]`.
    """

    def __init__(self, samples: int, like: Tensor):
        order = torch.arange(samples, device=like.device)
        self.weights = torch.exp2(((order * 5 + order // 8) % 8).to(like.dtype))
        self._signals: tuple[dict[str, list[Tensor]], ...] = (defaultdict(list), defaultdict(list))
        self._tolerance = 0.0

    def add(self, name: str, signal: Tensor, *, weighted: bool) -> None:
        """A module's signal, rows flattened in the order of the batch; a module that ran twice has two."""
        self._tolerance = max(self._tolerance, TOLERANCE[signal.dtype])
        rows = signal.reshape(-1, signal.shape[-1])
        rows = rows if rows.dtype == torch.float64 else rows.float()
        self._signals[not weighted][name].append(torch.stack([rows.sum(1), rows.norm(dim=1)]))

    def check(self) -> None:
        """Raise a ValueError that names the first module whose rows are not of one sample each."""
        weighted, plain = self._signals
        for name, calls in plain.items():
            for (actual, _), (signal, norm) in zip(weighted[name], calls, strict=True):
                weights = self.weights.to(signal.dtype).repeat_interleave(len(signal) // len(self.weights))
                # A gradient that comes from another sample is seen in a row that has none of its own, too.
                room = self._tolerance * (weights * norm).maximum(norm.nan_to_num().max())
                if bool(((actual - weights * signal).abs() > room).any()):
                    raise ValueError(
                        f"{name} mixes samples, or has them in another order than the batch: a row's gradient is not "
                        "of one sample alone; give a batch of one sample at a time"
                    )
