"""Whether an attention mask keeps packed samples apart."""

from __future__ import annotations

import torch
from torch import Tensor

from .row_weights import RowWeights


class Separation:
    """Asked of every attention's mask; the answer for a mask is kept, since layers share it.

    Args:
        weights: of the forward whose rows hold the packed samples.
    """

    def __init__(self, weights: RowWeights):
        self._weights, self._known = weights, {}

    def __call__(self, mask: Tensor) -> bool:
        """Whether `mask` `[.., S, S]` (true or 0 where a row is seen) lets no row of a sample see one outside of it."""
        key = mask.data_ptr(), mask.shape, mask.stride()
        if key not in self._known:
            self._known[key] = self._keeps_apart(mask)
        return self._known[key]

    def _keeps_apart(self, mask: Tensor) -> bool:
        sample = self._weights.packed_samples()
        rows, length = sample.shape
        if mask.dim() != 4 or mask.shape[0] not in (1, rows) or mask.shape[-2:] != (length, length):
            return False
        # A float mask is added to the scores: half of the lowest number silences a row as surely as -infinity.
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        apart = (sample[:, :, None] != sample[:, None, :]) & (sample[:, :, None] >= 0)
        return not bool((seen & apart[:, None]).any())
