"""How much each row of one forward counts in `dL` and in `sum_b dP_b`, in whatever shape a layer sees the rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..log_probs import Answers, sample_of_rows
from ..ops.wgrad_pair.reference import Rows, complement

Lead = tuple[int, ...]  # a tensor's shape without its last dimension


class LayerRows(NamedTuple):
    """The rows that a layer sees, flattened to T; see `ops.wgrad_pair`.

    Attributes:
        loss, target: weights, `[T]`; target None where the forward has no forget sample.
        target_rows, other_rows: the rows of forget samples, and (where ratio is given) the others in parts.
        ratio: target / loss of the target rows, where they have one in common.
        all_zero: every target weight is 0, as where P(answer) underflows.
    """

    loss: Tensor
    target: Tensor | None
    target_rows: Rows
    other_rows: Sequence[Rows]
    ratio: float | None
    all_zero: bool


class RowWeights:
    """The weights of one forward's samples; without any until `arm`, and again after `disarm`.

    Args:
        labels: int64 `[B, S]` of that forward.
        segments: int32 `[N, 2]` of packed samples, or None.
        answers: of these labels.
        forget: which of the samples are forget samples, on the host.
    """

    def __init__(self, labels: Tensor, segments: Tensor | None, answers: Answers, forget: Sequence[bool]):
        self.batch: Lead = tuple(labels.shape)
        self.superseded = False  # whether a later loss has claimed the same forward
        self.answers = answers
        self._sample = None if segments is None else sample_of_rows(labels, segments)
        chosen = [sample for sample, penalised in enumerate(forget) if penalised]
        self._forget = chosen
        self._together = bool(chosen) and chosen[-1] - chosen[0] + 1 == len(chosen)
        self.disarm()

    def disarm(self) -> None:
        """Forget the weights: whatever runs backward now is another loss's."""
        self.armed = False
        self._loss = self._target = None
        self._cache: dict[Lead | str, LayerRows] = {}

    def arm(self, loss: Tensor, target: Tensor, host_loss: Sequence[float], host_target: Sequence[float]) -> None:
        """Weigh each sample by `loss` in dL and by `target` in the target gradient, `[N]` each; on the host too."""
        self.armed, self._loss, self._target = True, loss, target
        weights = [host_loss[sample] for sample in self._forget]
        factors = [host_target[sample] for sample in self._forget]
        self._all_zero = not any(factors)
        self._ratio = None if self._all_zero else _common_ratio(weights, factors, torch.finfo(loss.dtype).eps)

    def fits(self, lead: Lead) -> bool:
        """Whether it is known to which sample each row of a tensor of this leading shape belongs."""
        samples, length = self.batch
        if lead == (samples * length,):
            return True
        if self._sample is None:
            return lead[:1] == (samples,)
        return (lead[:2] == self.batch and len(lead) <= 3 and lead[2:] != (length,)) or self._heads_first(lead)

    def _heads_first(self, lead: Lead) -> bool:
        samples, length = self.batch
        return len(lead) == 3 and lead[0] == samples and lead[2] == length != lead[1]

    def rows(self, lead: Lead) -> LayerRows:
        """The weights of the rows of a tensor with this leading shape, for which `fits` is true."""
        if lead not in self._cache:
            self._cache[lead] = self._unpacked(lead) if self._sample is None else self._packed(lead)
        return self._cache[lead]

    def answer_rows(self) -> LayerRows:
        """The weights of the rows that predict an answer token alone, in the order of `answers.rows`."""
        if "answers" not in self._cache:
            self._cache["answers"] = self._by_sample(self.answers.samples)
        return self._cache["answers"]

    def _unpacked(self, lead: Lead) -> LayerRows:
        samples, each = self.batch[0], math.prod(lead) // self.batch[0]
        if not self._together:
            return self._by_sample(torch.arange(samples, device=self._loss.device).repeat_interleave(each))
        loss, target = (w[:, None].expand(samples, each).reshape(-1) for w in (self._loss, self._target))
        return self._layer(loss, target, slice(self._forget[0] * each, (self._forget[-1] + 1) * each))

    def _packed(self, lead: Lead) -> LayerRows:
        each = math.prod(lead) // math.prod(self.batch)
        if self._heads_first(lead):
            return self._by_sample(self._sample.view(self.batch)[:, None].expand(lead).reshape(-1))
        return self._by_sample(self._sample.repeat_interleave(each))

    def _by_sample(self, sample: Tensor) -> LayerRows:
        """From the sample of each row, -1 for none."""
        loss, target = (torch.where(sample >= 0, w[sample], 0) for w in (self._loss, self._target))
        forget = torch.zeros(len(self._loss), dtype=torch.bool, device=sample.device)
        forget[self._forget] = True
        return self._layer(loss, target, (forget[sample] & (sample >= 0)).nonzero().flatten())

    def _layer(self, loss: Tensor, target: Tensor, target_rows: Rows) -> LayerRows:
        others = [] if self._ratio is None else complement(target_rows, len(loss), loss.device)
        target = target if self._forget else None
        return LayerRows(loss, target, target_rows, others, self._ratio, self._all_zero)


def _common_ratio(weights: Sequence[float], factors: Sequence[float], eps: float) -> float | None:
    """factor / weight if it is the same for all, up to rounding; None if not, or if it is no good number."""
    if not all(weights):
        return None
    ratios = [factor / weight for factor, weight in zip(factors, weights, strict=True)]
    same = all(abs(ratio - ratios[0]) <= 4 * eps * abs(ratios[0]) for ratio in ratios)
    return ratios[0] if same and math.isfinite(ratios[0]) else None
