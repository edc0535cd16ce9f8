"""Optimizers that apply SSIUU's parameter-level penalty (Eq. 6-14, Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .backends import check_backend
from .ops import PenaltyStats, penalty_, penalty_adamw_

# Bounds of one step of the steered lambda: a share read as 0 or 1 says only "far", and early ones are noisy.
_SHARE_FLOOR = 1e-6
_MAX_LOG_STEP = math.log(1000)


def steered_weight(weight: float, measured_share: float, wanted_share: float) -> float:
    """The next lambda, from the share measured with this one.

    The log-odds of the share grow about linearly with log lambda (slope 0.6 to 1 in the figures of the project's
    design notes), so moving log lambda by the difference in log-odds is close to a Newton step, and does not overshoot.

    Args:
        weight: lambda, > 0, with which the share was measured.
        measured_share, wanted_share: fractions of I- whose penalty gradient outweighs their loss gradient.
    """
    clamped = min(max(measured_share, _SHARE_FLOOR), 1 - _SHARE_FLOOR)
    move = _log_odds(wanted_share) - _log_odds(clamped)
    return weight * math.exp(min(max(move, -_MAX_LOG_STEP), _MAX_LOG_STEP))


def _log_odds(p: float) -> float:
    return math.log(p / (1 - p))


class _PenalisedOptimizer(torch.optim.Optimizer):
    """What the two optimizers share: lambda and its steering, the checks, and the life of `param.target_grad`."""

    def __init__(
        self,
        params: Iterable,
        defaults: dict,
        penalty_weight: float,
        penalty_share: float | None,
        backend: str,
    ):
        if not (math.isfinite(penalty_weight) and penalty_weight >= 0):
            raise ValueError(f"penalty_weight={penalty_weight}; expected a finite number >= 0")
        if penalty_share is not None and not 0 < penalty_share < 1:
            raise ValueError(f"penalty_share={penalty_share}; expected a fraction between 0 and 1, or None")
        if penalty_share is not None and penalty_weight == 0:
            raise ValueError("penalty_weight=0 cannot be steered to a penalty_share; start from a positive one")
        self.backend = check_backend(backend)
        self.last_stats: PenaltyStats | None = None
        self.last_weight = penalty_weight
        super().__init__(params, {**defaults, "penalty_weight": penalty_weight, "penalty_share": penalty_share})

    @property
    def penalty_weight(self) -> float:
        """lambda of the first parameter group, as the next step will use it."""
        return self.param_groups[0]["penalty_weight"]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear `param.grad` and `param.target_grad`."""
        super().zero_grad(set_to_none)
        for _, param in self._all_params():
            param.target_grad = None

    def _all_params(self) -> Iterable[tuple[dict, nn.Parameter]]:
        return ((group, param) for group in self.param_groups for param in group["params"])

    def _update_all(self, new_state: Callable[[nn.Parameter], dict], update: Callable[..., PenaltyStats]) -> None:
        """Call `update(param, target_grad, state, group)` on every parameter that has a gradient, then steer lambda."""
        pending = [(group, param) for group, param in self._all_params() if param.grad is not None]
        for _, param in pending:  # before anything is written
            if getattr(param, "target_grad", None) is None:
                raise ValueError(
                    f"a parameter of shape {list(param.shape)} has a grad but no target_grad; expected both from "
                    "handle.unlearning_loss(...).backward(): patch with scope='all', or leave it to another optimizer"
                )
        parts, step = [], 0
        for group, param in pending:
            state = self.state[param]
            if not state:
                state.update(step=0, **new_state(param))
            state["step"] += 1
            parts.append(update(param, param.target_grad, state, group))
            step = max(step, state["step"])
            # It belongs to this step alone: left behind, it would be counted again by the next backward.
            param.target_grad = None
        self.last_stats = PenaltyStats.total(parts) if parts else None
        self.last_weight = self.penalty_weight
        if parts and step > 1:
            self._steer()

    def _steer(self) -> None:
        steered = [group for group in self.param_groups if group["penalty_share"] is not None]
        if not steered:
            return
        share = self.last_stats.share.item()
        for group in steered:
            group["penalty_weight"] = steered_weight(group["penalty_weight"], share, group["penalty_share"])


class SsiuuAdamW(_PenalisedOptimizer):
    """AdamW on `dJ = dL + lambda dR`, the penalty and the update in one pass over memory.

    Reads `param.grad` (`dL`) and `param.target_grad` (`gP`), as `PatchHandle.unlearning_loss` fills them. `step()` sets
    `target_grad` to None. `A_{t-1}`, the moments and the current lambda are in `state_dict()`.

    Args:
        params: parameters or parameter groups; states have the parameter's type.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
        penalty_weight: lambda, or where the steered lambda starts. The paper's is 1e-3 (FaithUn) or 1e-4 (TOFU), but
            it is no portable number.
        penalty_share: of the scalars in I-, the fraction whose penalty gradient should outweigh their loss gradient;
            lambda is then steered towards it from step to step. None keeps lambda fixed.
        backend: backend of the ops.

    Attributes:
        last_stats: `PenaltyStats` of the last step, all parameters together.
        last_weight: lambda of the last step; `penalty_weight` is that of the next.

    Raises:
        ValueError: options out of range.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        penalty_weight: float = 1e-3,
        penalty_share: float | None = None,
        backend: str = "auto",
    ):
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if value < 0:
                raise ValueError(f"{name}={value}; expected a number >= 0")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas}; expected two numbers in [0, 1)")
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, penalty_weight, penalty_share, backend)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step of Algorithm 1.

        Args:
            closure: recomputes and returns the loss, as in `torch.optim.Optimizer.step`.

        Raises:
            ValueError: a parameter with a `grad` but no `target_grad`; nothing is changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update_all(self._new_state, self._update)
        return loss

    @staticmethod
    def _new_state(param: nn.Parameter) -> dict:
        names = ("prev_attribution", "exp_avg", "exp_avg_sq")
        return {name: torch.zeros_like(param, memory_format=torch.contiguous_format) for name in names}

    def _update(self, param: nn.Parameter, target_grad: Tensor, state: dict, group: dict) -> PenaltyStats:
        return penalty_adamw_(
            param,
            param.grad.contiguous(),
            target_grad.contiguous(),
            state["prev_attribution"],
            state["exp_avg"],
            state["exp_avg_sq"],
            step=state["step"],
            weight=group["penalty_weight"],
            backend=self.backend,
            **{name: group[name] for name in ("lr", "betas", "eps", "weight_decay")},
        )


class SsiuuPenalty(_PenalisedOptimizer):
    """The penalty alone, to stand before any optimizer's step: `penalty.apply_(); optimizer.step()`.

    Args:
        params, penalty_weight, penalty_share, backend: as in `SsiuuAdamW`.

    Attributes:
        last_stats: `PenaltyStats` of the last call, all parameters together.
    """

    def __init__(
        self,
        params: Iterable,
        penalty_weight: float = 1e-3,
        penalty_share: float | None = None,
        backend: str = "auto",
    ):
        super().__init__(params, {}, penalty_weight, penalty_share, backend)

    @torch.no_grad()
    def apply_(self) -> PenaltyStats | None:
        """Add the penalty's gradient to every `param.grad`, and set `param.target_grad` to None.

        Returns:
            `PenaltyStats` of all parameters together; None where no parameter has a gradient.

        Raises:
            ValueError: a parameter with a `grad` but no `target_grad`; nothing is changed then.
        """
        self._update_all(self._new_state, self._update)
        return self.last_stats

    @staticmethod
    def _new_state(param: nn.Parameter) -> dict:
        return {"prev_attribution": torch.zeros_like(param, memory_format=torch.contiguous_format)}

    def _update(self, param: nn.Parameter, target_grad: Tensor, state: dict, group: dict) -> PenaltyStats:
        grad = param.grad if param.grad.is_contiguous() else param.grad.contiguous()
        stats = penalty_(
            grad,
            param,
            target_grad.contiguous(),
            state["prev_attribution"],
            weight=group["penalty_weight"],
            step=state["step"],
            backend=self.backend,
        )
        if grad is not param.grad:
            param.grad.copy_(grad)
        return stats
