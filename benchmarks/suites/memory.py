"""The largest model of a shape whose training step fits into a budget, by each way of making the step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from ..harness.cases import BudgetCase
from ..harness.device import ON_GPU
from ..training.batch import Trainer
from ..training.gate import TOLERANCES, update_errors
from ..training.models import LLAMA_SHAPES, SMOLLM2_135M, parameters
from ..training.trainers import DTYPE, TRAINERS, stepping

NAME, SHAPE = ("Llama-3.1-8B", LLAMA_SHAPES["Llama-3.1-8B"]) if ON_GPU else ("SmolLM2-135M", SMOLLM2_135M)
BUDGET = (72 if ON_GPU else 4) * 10**9  # 72 GB of a card of 80
BATCH = (4, 128) if ON_GPU else (1, 64)
TOO_MANY = 64  # 4 bytes a scalar for plain GD on the CPU, and 64 layers are 255 M scalars


def cases() -> Iterator[BudgetCase]:
    tokens = BATCH[0] * BATCH[1]
    yield BudgetCase(
        suite="memory",
        name=f"{BUDGET / 1e9:.0f} GB, layers of {NAME}, {tokens} + {tokens} tokens, "
        f"{str(DTYPE).removeprefix('torch.')}, checkpointing",
        candidates={name: partial(_stepping, trainer) for name, trainer in TRAINERS.items()},
        errors=partial(update_errors, TRAINERS, DTYPE, tied=SHAPE.tied, checkpointing=True),
        tolerance=TOLERANCES[DTYPE],
        budget=BUDGET,
        too_many=TOO_MANY,
        parameters=lambda layers: parameters(SHAPE._replace(layers=layers)),
    )


def _stepping(trainer: Trainer, layers: int) -> Callable[[], None]:
    return stepping(trainer, SHAPE._replace(layers=layers), BATCH, checkpointing=True)
