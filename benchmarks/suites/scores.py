"""`token_scores` of an attention projection's output."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

import ssiuu_kernels as sk

from .. import peers
from ..harness.cases import Case, Tensors
from ..harness.device import DEVICE, backends

SHAPE = (8, 512, 4096)
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def cases() -> Iterator[Case]:
    for dtype, tolerance in TOLERANCES.items():
        yield Case(
            suite="scores",
            name=f"token_scores {'x'.join(map(str, SHAPE))} {str(dtype).removeprefix('torch.')}",
            moved_bytes=2 * SHAPE[0] * SHAPE[1] * SHAPE[2] * dtype.itemsize + 3 * SHAPE[0] * SHAPE[2] * 4,
            inputs=partial(_inputs, dtype),
            candidates={
                **{backend: partial(_scores, backend=backend) for backend in backends()},
                "eager": peers.token_scores,
                "torch.compile": peers.compiled(peers.token_scores),
            },
            exact=partial(_scores, backend="reference"),
            tolerance=tolerance,
            inputs_per_run=2,
        )


def _inputs(dtype: torch.dtype) -> Tensors:
    return {name: torch.randn(SHAPE, device=DEVICE).to(dtype) for name in ("z", "grad_z")}


def _scores(inputs: Tensors, backend: str) -> Tensors:
    return {"scores": torch.stack(sk.ops.token_scores(**inputs, backend=backend))}
