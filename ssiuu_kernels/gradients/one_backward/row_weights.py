"""How much each row of one forward counts in `dL` and in `sum_b dP_b`, for any order in which a layer sees the rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...log_probs import Answers, sample_of_rows
from ...ops.wgrad_pair.product import Rows, complement
from .axes import Axis

Lead = tuple[int, ...]  # a tensor's shape without its last dimension


class Layout(NamedTuple):
    """The rows that a layer sees, flattened.

    Attributes:
        count: T.
        inner: rows in a row at one place of each axis that is followed (`axes.flattened`); an entry per axis.
    """

    count: int
    inner: tuple[int, ...]


class LayerRows(NamedTuple):
    """The weights of T rows; see `ops.wgrad_pair`.

    Attributes:
        loss, target: weights, `[T]`; target None where the forward has no forget sample.
        target_rows, other_rows: the rows of forget samples, and (where ratio is given) the others in parts.
        ratio: target / loss of the target rows, where they have one in common.
        all_zero: every target weight is 0, as where P(answer) underflows.
        scales: powers of two by which gradients made from loss and target have to be multiplied; both 1 unless float16
            is to hold the products.
    """

    loss: Tensor
    target: Tensor | None
    target_rows: Rows
    other_rows: Sequence[Rows]
    ratio: float | None
    all_zero: bool
    scales: tuple[float, float]


class RowWeights:
    """The weights of one forward's samples; without any until `arm`, and again after `disarm`.

    Args:
        labels: int64 `[B, S]` of that forward.
        segments: int32 `[N, 2]` of packed samples, or None.
        answers: of these labels.
        forget: which of the samples are forget samples, on the host.

    Attributes:
        axes: where the samples are in the logits: the first dimension, and of packed samples the second too. None are
            needed where the forward has one sample.
        counts: the length of each axis.
    """

    def __init__(self, labels: Tensor, segments: Tensor | None, answers: Answers, forget: Sequence[bool]):
        self._labels = labels
        self.superseded = False  # whether a later loss has claimed the same forward
        self.answers = answers
        self._sample = None if segments is None else sample_of_rows(labels, segments)
        followed = [dim for dim in range(1 if segments is None else 2) if labels.shape[dim] > 1]
        self.axes = tuple(Axis(dim, 1) for dim in followed)
        self.counts = tuple(labels.shape[dim] for dim in followed)
        self._strides = tuple(1 if dim or segments is None else labels.shape[1] for dim in followed)
        chosen = [sample for sample, penalised in enumerate(forget) if penalised]
        self._forget = chosen
        self._together = segments is None and bool(chosen) and chosen[-1] - chosen[0] + 1 == len(chosen)
        self.disarm()

    def disarm(self) -> None:
        """Forget the weights: the next backward belongs to another loss."""
        self.armed = False
        self._loss = self._target = None
        self._host: tuple[Sequence[float], Sequence[float]] = ((), ())
        self._cache: dict[tuple[Layout | None, bool], LayerRows] = {}

    def arm(self, loss: Tensor, target: Tensor, host_loss: Sequence[float], host_target: Sequence[float]) -> None:
        """Weigh each sample by `loss` in dL and by `target` in the target gradient, `[N]` each; on the host too."""
        self.armed, self._loss, self._target, self._host = True, loss, target, (host_loss, host_target)

    def rows(self, layout: Layout | None, half: bool = False) -> LayerRows:
        """The weights of the rows of this layout.

        Args:
            layout: None: of the rows that predict an answer token alone, in the order of `answers.rows`.
            half: for products in float16, which cannot hold P(answer): the weights are divided by `scales`, so that
                the largest of each is near 1.
        """
        key = layout, half
        if key not in self._cache:
            self._cache[key] = self._made(layout, half)
        return self._cache[key]

    def packed_samples(self) -> Tensor:
        """The sample at each place of the labels, int64 `[B, S]`, where samples are packed; -1 for none."""
        return self._sample.view(self._labels.shape)

    def _made(self, layout: Layout | None, half: bool) -> LayerRows:
        scales = tuple(power_of_two(max(map(abs, host))) if half else 1.0 for host in self._host)
        loss, target = (weights / scale for weights, scale in zip((self._loss, self._target), scales, strict=True))
        host_loss, host_target = (
            [host[sample] / scale for sample in self._forget] for host, scale in zip(self._host, scales, strict=True)
        )
        all_zero = not any(host_target)
        ratio = None if all_zero else _common_ratio(host_loss, host_target, torch.finfo(loss.dtype).eps)
        samples = len(loss)
        each = layout.inner[0] if layout and layout.inner else layout.count if layout else 0
        if self._together and layout and each * samples == layout.count:
            # Sample after sample: the forget samples' rows are a slice.
            loss, target = (w[:, None].expand(samples, each).reshape(-1) for w in (loss, target))
            target_rows = slice(self._forget[0] * each, (self._forget[-1] + 1) * each)
        else:
            sample = self.answers.samples if layout is None else self._sample_of(layout)
            forget = torch.zeros(samples, dtype=torch.bool, device=sample.device)
            forget[self._forget] = True
            target_rows = (forget[sample] & (sample >= 0)).nonzero().flatten()
            loss, target = (torch.where(sample >= 0, w[sample], 0) for w in (loss, target))
        others = [] if ratio is None else complement(target_rows, len(loss), loss.device)
        return LayerRows(loss, target if self._forget else None, target_rows, others, ratio, all_zero, scales)

    def _sample_of(self, layout: Layout) -> Tensor:
        """The sample of each row, int64 `[T]`; -1 for none."""
        row = torch.arange(layout.count, device=self._loss.device)
        place = torch.zeros_like(row)
        for below, length, stride in zip(layout.inner, self.counts, self._strides, strict=True):
            place += row // below % length * stride
        return place if self._sample is None else self._sample[place]


def power_of_two(value: float) -> float:
    """The largest power of two that is no larger than `value`; 1 for 0 and for what is not finite."""
    if not value or not math.isfinite(value):
        return 1.0
    return 2.0 ** (math.frexp(value)[1] - 1)


def _common_ratio(weights: Sequence[float], factors: Sequence[float], eps: float) -> float | None:
    """factor / weight if it is the same for all, up to rounding; None if not, or if it is not finite."""
    if not all(weights):
        return None
    ratios = [factor / weight for factor, weight in zip(factors, weights, strict=True)]
    same = all(abs(ratio - ratios[0]) <= 4 * eps * abs(ratios[0]) for ratio in ratios)
    return ratios[0] if same and math.isfinite(ratios[0]) else None
