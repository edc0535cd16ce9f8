"""`penalty_` and `penalty_adamw_` on one large parameter."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

import ssiuu_kernels as sk

from .. import peers
from ..harness.cases import Case, Tensors
from ..harness.device import DEVICE, ON_GPU, backends

SIZE = 1 << (28 if ON_GPU else 25)  # on the CPU 32 M scalars: 128 MB a tensor in float32
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
ADAMW = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
WEIGHT, STEP = 0.1, 10


def cases() -> Iterator[Case]:
    for dtype, tolerance in TOLERANCES.items():
        adamw_peers = {
            "eager + fused AdamW": peers.penalty_then_fused_adamw(WEIGHT, STEP, ADAMW),
            "torch.compile": peers.compiled_penalty_adamw(WEIGHT, STEP, ADAMW),
        }
        for name, run, tensors, others in (
            ("penalty_", _penalty, 6, {}),
            ("penalty_adamw_", _penalty_adamw, 10, adamw_peers),
        ):
            yield Case(
                suite="penalty",
                name=f"{name} {SIZE >> 20} M {str(dtype).removeprefix('torch.')}",
                moved_bytes=tensors * SIZE * dtype.itemsize,
                inputs=partial(_inputs, dtype),
                candidates={**{backend: partial(run, backend=backend) for backend in backends()}, **others},
                exact=partial(run, backend="reference"),
                tolerance=tolerance,
            )


def _inputs(dtype: torch.dtype) -> Tensors:
    names = ("param", "grad", "target_grad", "prev_attribution", "exp_avg")
    inputs = {name: torch.randn(SIZE, device=DEVICE).to(dtype) for name in names}
    return {**inputs, "exp_avg_sq": torch.rand(SIZE, device=DEVICE).to(dtype)}


def _penalty(inputs: Tensors, backend: str) -> Tensors:
    names = ("grad", "param", "target_grad", "prev_attribution")
    sk.ops.penalty_(*(inputs[name] for name in names), weight=WEIGHT, step=STEP, backend=backend)
    return {name: inputs[name] for name in ("grad", "prev_attribution")}


def _penalty_adamw(inputs: Tensors, backend: str) -> Tensors:
    sk.ops.penalty_adamw_(**inputs, step=STEP, weight=WEIGHT, backend=backend, **ADAMW)
    return {name: inputs[name] for name in ("param", "prev_attribution", "exp_avg", "exp_avg_sq")}
