"""Whether a training step changes the weights as Algorithm 1 (or GD) in float64 does."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .algorithm_1 import algorithm_1, eager_update, one_forward
from .batch import Batch, Options, Trainer, random_batch
from .models import Shape, build
from .trainers import plain_gd

SMALL = Shape(64, 2, 96, 4, 2, 211, tied=True)
BATCH = (3, 16)
# With eps of the size of a gradient the update is smooth in it: AdamW's first would else be the sign of a rounding.
# With this lambda the penalty's gradient is as large as the loss's. bfloat16 weights would round a smaller lr away.
OPTIONS = Options(penalty_weight=1e8, adamw={"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-3, "weight_decay": 0.01})
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 4e-2}


def update_errors(
    trainers: Mapping[str, Trainer], dtype: torch.dtype, *, tied: bool, checkpointing: bool
) -> dict[str, float]:
    """Relative L2 error of what two steps on a small model add to its weights, for each trainer, against float64.

    "plain GD" is held against GD, the others against Algorithm 1; the first step has no penalty, the second has.

    Args:
        dtype: of the trainers' weights; all start from the same.
        tied, checkpointing: as the model that will be timed.

    Raises:
        RuntimeError: the penalty changes the update by too little to tell whether it took part.
    """
    model = build(SMALL._replace(tied=tied), dtype, checkpointing=checkpointing)
    batches = [random_batch(SMALL.vocabulary, *BATCH) for _ in range(2)]
    wide = copy.deepcopy(model).double()
    gd = _added(plain_gd, wide, batches)
    exact = _added(algorithm_1(one_forward, eager_update), wide, batches)
    if not _error(exact, gd) > 5 * TOLERANCES[dtype]:
        raise RuntimeError(f"the penalty changes the update by {_error(exact, gd):.1e}, too little to be seen")
    return {
        name: _error(_added(trainer, model, batches), gd if name == "plain GD" else exact)
        for name, trainer in trainers.items()
    }


def _added(trainer: Trainer, model: nn.Module, batches: list[Batch]) -> Tensor:
    """What one step a batch adds to the weights of a copy of the model, float64 `[N]`."""
    trained = copy.deepcopy(model)
    step = trainer(trained, OPTIONS)
    for batch in batches:
        step(batch)
    pairs = zip(trained.parameters(), model.parameters(), strict=True)
    return torch.cat([(after.detach().double() - before.detach().double()).flatten() for after, before in pairs])


def _error(actual: Tensor, exact: Tensor) -> float:
    return ((actual - exact).norm() / exact.norm()).item()
