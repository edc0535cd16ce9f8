"""The definition of `token_scores`, and the reduction over a sample's tokens that `glu_backward` shares."""

from __future__ import annotations

from torch import Tensor

from ..common.precision import compute_dtype


def segment_scores(attribution: Tensor, segments: Tensor) -> Tensor:
    """Max, min and sum over each segment's rows: `[T, D]`, int32 `[B, 2]` -> `[3, B, D]`; zeros where it is empty."""
    scores = attribution.new_zeros((3, len(segments), attribution.shape[1]))
    for sample, (start, end) in enumerate(segments.tolist()):
        if start < end:
            rows = attribution[start:end]
            scores[0, sample], scores[1, sample] = rows.amax(0), rows.amin(0)
            scores[2, sample] = rows.sum(0)
    return scores


def token_scores(z: Tensor, grad_z: Tensor, segments: Tensor) -> Tensor:  # [T, D], [T, D], int32 [B, 2] -> [3, B, D]
    dtype = compute_dtype(z.dtype)
    return segment_scores(z.to(dtype) * grad_z.to(dtype), segments)
