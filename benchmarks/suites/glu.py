"""`glu_forward`, `glu_backward`, and what attribution statistics and the penalty on neurons add to it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

import ssiuu_kernels as sk

from .. import peers
from ..harness.cases import Candidate, Case, Tensors
from ..harness.device import DEVICE, ON_GPU, backends

# (samples, tokens of each, MLP width), beyond the caches. CPU: Llama-3.2-1B's MLP, and many short samples of SmolLM2's.
SHAPES = [(4, 512, 8192), (16, 512, 14336), (64, 128, 8192)] if ON_GPU else [(4, 512, 8192), (32, 128, 1536)]
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def cases() -> Iterator[Case]:
    for dtype, tolerance in TOLERANCES.items():
        for shape in SHAPES:
            samples, tokens, width = shape
            name = f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
            tensor_bytes = samples * tokens * width * dtype.itemsize
            score_bytes = 6 * samples * width * 4
            common = {"suite": "glu", "inputs": partial(_inputs, shape, dtype), "tolerance": tolerance}
            yield Case(
                name=f"forward {name}",
                moved_bytes=3 * tensor_bytes,
                candidates=_candidates(_forward),
                exact=partial(_forward, backend="reference"),
                inputs_per_run=2,
                **common,
            )
            yield Case(
                name=f"backward {name}",
                moved_bytes=5 * tensor_bytes,
                candidates={**_candidates(partial(_backward, scores=False)), **_plain_peers()},
                exact=partial(_backward, scores=False, backend="reference"),
                inputs_per_run=2,
                missing=_missing(),
                **common,
            )
            yield Case(
                name=f"backward + scores {name}",
                moved_bytes=5 * tensor_bytes + score_bytes,
                candidates={
                    **_candidates(partial(_backward, scores=True)),
                    "without scores": partial(_backward, scores=False, backend="auto"),
                    "eager hooks": peers.swiglu_backward_with_hooks,
                    "compiled hooks": peers.compiled(peers.swiglu_backward_with_hooks),
                    **_liger(),
                },
                exact=partial(_backward, scores=True, backend="reference"),
                inputs_per_run=2,
                missing=_missing(),
                **common,
            )
            yield Case(
                name=f"backward + neuron penalty {name}",
                moved_bytes=5 * tensor_bytes + 2 * samples * width * 4,
                candidates={
                    **_candidates(_penalised),
                    "without penalty": partial(_plain, backend="auto"),
                },
                exact=lambda inputs: {**_penalised(inputs, "reference"), **_plain(inputs, "reference")},
                inputs_per_run=2,
                **common,
            )


def _inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Tensors:
    return {name: torch.randn(shape, device=DEVICE).to(dtype) for name in ("gate", "up", "grad_h")}


def _candidates(run) -> dict[str, Candidate]:
    return {backend: partial(run, backend=backend) for backend in backends()}


def _plain_peers() -> dict[str, Candidate]:
    return {
        "eager": peers.swiglu_backward,
        "torch.compile": peers.compiled(peers.swiglu_backward),
        **_liger(),
    }


def _liger() -> dict[str, Candidate]:
    return {} if peers.why_no_liger() else {"Liger, without scores": peers.liger_swiglu_backward()}


def _missing() -> dict[str, str]:
    reason = peers.why_no_liger()
    return {} if reason is None else {"Liger, without scores": reason}


def _forward(inputs: Tensors, backend: str) -> Tensors:
    return {"h": sk.ops.glu_forward(inputs["gate"], inputs["up"], backend=backend)}


def _backward(inputs: Tensors, backend: str, scores: bool) -> Tensors:
    grads = sk.ops.glu_backward(**inputs, scores=scores, backend=backend)
    outputs = {"grad_gate": grads.grad_gate, "grad_up": grads.grad_up}
    if scores:
        outputs |= {"h_scores": torch.stack(grads.h_scores), "gate_scores": torch.stack(grads.gate_scores)}
    return outputs


def _plain(inputs: Tensors, backend: str) -> Tensors:
    """The backward without the penalty, under names of its own: beside the penalised one its result is another."""
    return {f"plain_{name}": grad for name, grad in _backward(inputs, backend, scores=False).items()}


def _penalised(inputs: Tensors, backend: str) -> Tensors:
    samples, _, width = inputs["gate"].shape
    dtype = torch.float64 if inputs["gate"].dtype == torch.float64 else torch.float32
    penalty = sk.ops.NeuronPenalty(
        weight=1e-4,
        ratio=torch.ones(samples, dtype=dtype, device=DEVICE),
        bank=torch.zeros((samples, width), dtype=dtype, device=DEVICE),
        rows=torch.arange(samples, device=DEVICE),
    )
    grads = sk.ops.glu_backward(**inputs, penalty=penalty, backend=backend)
    return {"grad_gate": grads.grad_gate, "grad_up": grads.grad_up}
