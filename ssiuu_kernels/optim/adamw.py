"""AdamW with SSIUU's parameter-level penalty (Eq. 6-14, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from ..ops import PenaltyStats
from ..ops.penalty import run_penalty_adamw
from ..ops.penalty.scalars import StepScalars
from .penalised import PenalisedOptimizer
from .update_in_backward import UpdateInBackward


class SsiuuAdamW(PenalisedOptimizer):
    """AdamW on `dJ = dL + lambda dR`, the penalty and the update in one pass over memory.

    Reads `param.grad` (`dL`) and `param.target_grad` (`gP`), as `PatchHandle.unlearning_loss` fills them. `step()` sets
    `target_grad` to None. `A_{t-1}`, the moments and the current lambda are in `state_dict()`. Where no batch since the
    last step had a forget sample, the step is plain AdamW, `A_{t-1}` stays, and lambda is not steered.

    A copy (`copy.deepcopy`, pickle) has copies of the parameters, and updates those: copy it together with its model.

    Args:
        params: parameters or parameter groups; frozen ones are left alone.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`; lr may be a 0-dim tensor.
        penalty_weight: lambda, or where the steered lambda starts. The paper's is 1e-3 (FaithUn) or 1e-4 (TOFU), but
            the same value means something else for another model. From 0 to 1e30.
        penalty_share: of the scalars in I-, the fraction whose penalty gradient should outweigh their loss gradient;
            lambda is then steered towards it from step to step, on the device, between 1e-24 and 1e24; not by steps
            that say nothing about it, as when P is almost 0 (`steering.py`). None keeps lambda fixed. A group with its
            own share is steered by its own statistics.
        state_dtype: of `A_{t-1}` and the moments; None: the parameter's, and float32 for float16.
        stochastic_rounding: round the bfloat16 tensors that a step writes, parameters and states, at random so that
            their mean is kept. Deterministic by seed and step.
        seed: of the stochastic rounding.
        capturable: step and lambda live on the device, so that `step()` can be captured in a CUDA graph and replayed.
            Every parameter then has a gradient at every step, or at none. A tensor lr or lambda on an accelerator is
            not read on the host: one that is not finite leaves the parameters as they are.
        update_in_backward: update a parameter as soon as its two gradients are complete, during `backward()`, and free
            them, so that the gradients of no more than two layers exist at once (`update_in_backward.py`). `step()`
            then updates what is left, the small parameters, and steers lambda. Every backward is followed by one. It
            cannot be combined with clipping, accumulation or a GradScaler.
        backend: backend of the ops.
        anchor: what the penalty compares A_t with. "previous" is A_{t-1}, as in Algorithm 1. "original" is A as it was
            measured first, of the model before unlearning: the "original level" that the paper's text promises. That
            is A of the first batch's facts; where later batches have others, `set_anchor` sets it for each.

    Attributes:
        last_stats: `PenaltyStats` of the last step, all parameters together.
        last_weight: lambda of the last step; `penalty_weight` is that of the next.

    Raises:
        ValueError: options out of range; a parameter twice in a group, or one that is not contiguous.
        TypeError: a trainable parameter that is not of a floating type.
    """

    state_names = ("prev_attribution", "exp_avg", "exp_avg_sq")
    op = "penalty_adamw_"
    options = (*PenalisedOptimizer.options, "state_dtype", "stochastic_rounding", "seed")
    updates_without_target = True
    _in_backward: UpdateInBackward | None = None

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        penalty_weight: float = 1e-3,
        penalty_share: float | None = None,
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        capturable: bool = False,
        update_in_backward: bool = False,
        backend: str = "auto",
        anchor: str = "previous",
    ):
        if state_dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(f"state_dtype={state_dtype}; expected torch.float32, torch.bfloat16 or None")
        self.state_dtype, self.stochastic_rounding, self.seed = state_dtype, stochastic_rounding, seed
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, penalty_weight, penalty_share, anchor, backend, capturable)
        self._in_backward = UpdateInBackward(self) if update_in_backward else None

    def add_param_group(self, param_group: dict) -> None:
        """As in torch; options out of range are refused, and new parameters once they are updated in backward."""
        if self._in_backward is not None:
            raise ValueError("update_in_backward=True fixes the parameters; make another optimizer for new ones")
        super().add_param_group(param_group)

    def set_anchor(self, values: Mapping[nn.Parameter, Tensor]) -> None:
        """As in `PenalisedOptimizer`; with update_in_backward it is called before the backward of its step."""
        if self._in_backward is not None and self._in_backward.between:
            raise ValueError(
                "set_anchor() between backward and step() with update_in_backward=True, which has updated parameters "
                "already; call it before the backward"
            )
        super().set_anchor(values)

    def __getstate__(self) -> dict:
        if self._in_backward is not None and self._in_backward.between:
            raise ValueError(
                "an optimizer with update_in_backward=True is copied between backward and step(); step first"
            )
        return {**super().__getstate__(), "_in_backward": self._in_backward is not None}

    def __setstate__(self, state: dict) -> None:
        # `load_state_dict` calls it too, with the groups and states alone.
        hooked = state.get("_in_backward", False)
        super().__setstate__({name: value for name, value in state.items() if name != "_in_backward"})
        if hooked:
            self._in_backward = UpdateInBackward(self)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Read by `torch.amp.GradScaler.step` on its way to `step`."""
        if self._in_backward is not None:
            raise ValueError(
                "a GradScaler with update_in_backward=True, which has applied the scaled gradients already; use "
                "bfloat16, which needs no scaler, or update_in_backward=False"
            )
        return False

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step of Algorithm 1.

        Args:
            closure: recomputes and returns the loss, as in `torch.optim.Optimizer.step`.

        Raises:
            ValueError: a parameter with a `grad` but no `target_grad` (two steps after one backward, say), options of a
                group out of range, a sparse gradient, or more than one process: nothing is changed then; with
                update_in_backward a step without a backward, or a gradient that was changed since (clipped, say).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._in_backward is None:
            self.update_all()
        else:
            self._in_backward.finish()
        return loss

    def _state_dtype(self, param: nn.Parameter) -> torch.dtype:
        return self.state_dtype or super()._state_dtype(param)

    def _tensors(self, params: list[nn.Parameter]) -> dict[str, list[Tensor]]:
        return {
            "param": params,
            "grad": [param.grad for param in params],
            "target_grad": [getattr(param, "target_grad", None) for param in params],
            **{name: self._states(params, name) for name in self.state_names},
        }

    def _scalars(self, group: dict, param: nn.Parameter) -> StepScalars:
        return super()._scalars(group, param, **{name: group[name] for name in ("lr", "betas", "eps", "weight_decay")})

    def _run(self, params, tensors, scalars) -> PenaltyStats:
        seeds = self._seeds(params) if self.stochastic_rounding else None
        return run_penalty_adamw(tensors, scalars, seeds, self.backend)

    def _seeds(self, params: list[nn.Parameter]) -> list[int]:
        """One for each parameter, from its index among all: no two share draws, whichever launch they are in."""
        place = {param: index for index, (_, param) in enumerate(self._all_params())}
        return [self.seed * 1_000_003 + place[param] for param in params]
