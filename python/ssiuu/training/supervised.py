"""Plain training on the answers of samples: what fine-tuning and the retraining attacks do."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, set_seed

from ..data.prompts import Encoded, PromptFormat
from .schedule import Part, Schedule
from .step_log import StepRecord
from .trainer import RecordedTrainer, training_arguments


def train_on(
    model: PreTrainedModel,
    prompts: PromptFormat,
    samples: Sequence[Encoded],
    *,
    learning_rate: float,
    steps: int,
    batch_size: int,
    seed: int,
    record: StepRecord,
) -> None:
    """Train on the answers of `samples` with AdamW at a constant learning rate; nothing is saved.

    Args:
        samples: what to train on; `batch_size` of them per step, or all where there are fewer.
        record: receives every step.

    Raises:
        DivergedError: a loss or gradient that is not finite.
    """
    set_seed(seed)
    schedule = Schedule([Part(samples, min(batch_size, len(samples)), False)], steps, seed)
    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(Path(folder), learning_rate=learning_rate, max_steps=steps, seed=seed)
        RecordedTrainer(model, arguments, schedule, prompts, record).train()
