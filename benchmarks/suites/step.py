"""A full training step: SSIUU by this library, Algorithm 1 in PyTorch, and GD without a penalty."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ..harness.cases import StepCase
from ..harness.device import ON_GPU
from ..training.gate import TOLERANCES, update_errors
from ..training.models import LLAMA_SHAPES, SMOLLM2_135M, parameters
from ..training.trainers import DTYPE, TRAINERS, stepping

SHAPES = LLAMA_SHAPES if ON_GPU else {"SmolLM2-135M": SMOLLM2_135M}
# Forget samples, and tokens of each; as many retain samples.
BATCHES = [(4, 128), (8, 256), (16, 512)] if ON_GPU else [(4, 128)]
# Beyond either, the layers' activations do not fit into 80 GB beside the states.
MOST_WEIGHTS, MOST_TOKENS = 5e9, 8192


def cases() -> Iterator[StepCase]:
    for name, shape in SHAPES.items():
        weights = parameters(shape)
        for batch in BATCHES:
            tokens = batch[0] * batch[1]
            checkpointing = weights > MOST_WEIGHTS or 2 * tokens > MOST_TOKENS
            kind = str(DTYPE).removeprefix("torch.") + ", checkpointing" * checkpointing
            yield StepCase(
                suite="step",
                name=f"{name}, {tokens} + {tokens} tokens, {kind}",
                candidates={
                    candidate: partial(stepping, trainer, shape, batch, checkpointing=checkpointing)
                    for candidate, trainer in TRAINERS.items()
                },
                errors=partial(update_errors, TRAINERS, DTYPE, tied=shape.tied, checkpointing=checkpointing),
                tolerance=TOLERANCES[DTYPE],
                tokens=2 * tokens,
                weight_bytes=weights * DTYPE.itemsize,
            )
