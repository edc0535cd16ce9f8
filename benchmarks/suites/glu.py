"""`glu_forward`, `glu_backward`, and what the attribution statistics add to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

import ssiuu_kernels as sk

from ..cases import Case, Tensors

# (samples, tokens of each, MLP width): Llama-3.2-1B's MLP, and many short samples of SmolLM2's. Beyond the caches.
SHAPES = [(4, 512, 8192), (32, 128, 1536)]
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def cases() -> Iterator[Case]:
    for dtype, tolerance in TOLERANCES.items():
        for shape in SHAPES:
            name = f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
            tensor_bytes = shape[0] * shape[1] * shape[2] * dtype.itemsize
            score_bytes = 6 * shape[0] * shape[2] * 4
            common = {"suite": "glu", "inputs": partial(_inputs, shape, dtype), "tolerance": tolerance}
            yield Case(
                name=f"forward {name}",
                moved_bytes=3 * tensor_bytes,
                candidates=_candidates(_forward),
                exact=partial(_forward, backend="reference"),
                inputs_per_run=2,
                **common,
            )
            for scores in (False, True):
                yield Case(
                    name=f"backward{' + scores' if scores else ''} {name}",
                    moved_bytes=5 * tensor_bytes + (score_bytes if scores else 0),
                    candidates=_candidates(partial(_backward, scores=scores)),
                    exact=partial(_backward, scores=scores, backend="reference"),
                    inputs_per_run=2,
                    **common,
                )


def _inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Tensors:
    return {name: torch.randn(shape).to(dtype) for name in ("gate", "up", "grad_h")}


def _candidates(run: Callable[..., Tensors]) -> dict[str, Callable[[Tensors], Tensors]]:
    return {backend: partial(run, backend=backend) for backend in ("native", "reference")}


def _forward(inputs: Tensors, backend: str) -> Tensors:
    return {"h": sk.ops.glu_forward(inputs["gate"], inputs["up"], backend=backend)}


def _backward(inputs: Tensors, backend: str, scores: bool) -> Tensors:
    grads = sk.ops.glu_backward(**inputs, scores=scores, backend=backend)
    outputs = {"grad_gate": grads.grad_gate, "grad_up": grads.grad_up}
    if scores:
        outputs |= {"h_scores": torch.stack(grads.h_scores), "gate_scores": torch.stack(grads.gate_scores)}
    return outputs
