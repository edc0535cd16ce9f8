"""Attribution statistics of any module's output (Q, K, V, O, down): per-sample max, min and sum of `z * grad_z`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..common import native_host, triton_host
from ..common.checks import as_rows, check_like, check_rows, check_segment_values, make_segments
from ..common.results import NeuronScores
from . import native, reference

backends.register("token_scores", "reference", reference.token_scores)
backends.register("token_scores", "native", native.token_scores, native_host.why_not)
_triton = triton_host.lazily(__name__, "token_scores")
backends.register("token_scores", "triton", _triton, triton_host.why_not)


def token_scores(z: Tensor, grad_z: Tensor, *, segments: Tensor | None = None, backend: str = "auto") -> NeuronScores:
    """Max, min and sum over each sample's tokens of the attribution `z * grad_z` (Eq. 1 before the factor `P(y|x)`).

    Args:
        z: `[T, D]` or `[B, S, D]`, float32, bfloat16, float16 or float64; a module's output.
        grad_z: like z; the gradient of the attributed quantity with respect to z.
        segments: int32 `[B, 2]`, start and end row of each sample in the flattened rows; rows in no segment are
            ignored. Default: `[B, S, D]` is B samples of S rows, `[T, D]` one sample.
        backend: "auto", "reference", "native" or "triton".

    Returns:
        `NeuronScores`, each float32 `[B, D]` (float64 for float64); zeros for a sample without rows.

    Raises:
        ValueError, TypeError: arguments of another shape, type or device; segments that overlap, go backwards or leave
            the rows; a backend that cannot run.
    """
    check_rows("z", z)
    check_like("grad_z", grad_z, "z", z)
    segments = make_segments(z, segments)
    return NeuronScores(*_token_scores(as_rows(z), as_rows(grad_z), segments, backends.check_backend(backend)).unbind())


@torch.library.custom_op("ssiuu::token_scores", mutates_args=())
def _token_scores(z: Tensor, grad_z: Tensor, segments: Tensor, backend: str) -> Tensor:
    check_segment_values(segments, z.shape[0])
    return backends.select("token_scores", backend, z, grad_z)(z, grad_z, segments)


@_token_scores.register_fake
def _(z: Tensor, grad_z: Tensor, segments: Tensor, backend: str) -> Tensor:
    score_dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    return z.new_empty((3, segments.shape[0], z.shape[1]), dtype=score_dtype)
