"""Full training steps: SSIUU by this library, GD without it, and Algorithm 1 in PyTorch.

All candidates compute the same loss and target from the same full logits: they differ in how the two gradients and the
update come about.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

import ssiuu_kernels as sk

from ..harness.device import ON_GPU
from .algorithm_1 import algorithm_1, compiled_update, eager_update, one_forward, two_forwards
from .batch import TARGET, Batch, Options, Step, Trainer, random_batch
from .models import Shape, build

ENGINE = "one-backward"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32  # of weights and states
OPTIONS = Options(penalty_weight=1e-3, adamw={"lr": 1e-6, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01})


def ssiuu(*, update_in_backward: bool) -> Trainer:
    """Ours. A step that does not take the path of one backward raises."""

    def make(model: nn.Module, options: Options) -> Step:
        handle = sk.patch(model, scope="all", engine=ENGINE)
        optimizer = sk.SsiuuAdamW(
            model.parameters(),
            penalty_weight=options.penalty_weight,
            update_in_backward=update_in_backward,
            **options.adamw,
        )

        def step(batch: Batch) -> None:
            handle.unlearning_loss(
                model(batch.input_ids, use_cache=False).logits, batch.labels, batch.forget, "gd", TARGET
            ).backward()
            optimizer.step()
            optimizer.zero_grad()
            path = handle.gradient_path
            if path.engine != "one-backward":
                raise RuntimeError(f"the step took the path {path.engine}: {path.reason}")

        return step

    return make


def plain_gd(model: nn.Module, options: Options) -> Step:
    """GD alone: no penalty, one backward, fused AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **options.adamw)

    def step(batch: Batch) -> None:
        batch.gradient_difference(batch.log_probs(model)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


# Ours first: ratios are to its time. GD last: it is timed first and last.
TRAINERS: dict[str, Trainer] = {
    "ssiuu, one backward": ssiuu(update_in_backward=False),
    "ssiuu, update in backward": ssiuu(update_in_backward=True),
    "Algorithm 1, eager, one forward": algorithm_1(one_forward, eager_update),
    "Algorithm 1, eager, two forwards": algorithm_1(two_forwards, eager_update),
    "Algorithm 1, compiled, two forwards": algorithm_1(two_forwards, compiled_update),
    "plain GD": plain_gd,
}


def stepping(trainer: Trainer, shape: Shape, batch: tuple[int, int], *, checkpointing: bool) -> Callable[[], None]:
    """A model of this shape with its optimizer; a call is one step.

    Args:
        batch: number of forget samples, and tokens of each; as many retain samples are added.
    """
    step = trainer(build(shape, DTYPE, checkpointing=checkpointing), OPTIONS)
    return partial(step, random_batch(shape.vocabulary, *batch))
