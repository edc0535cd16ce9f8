"""Optimizers that apply SSIUU's parameter-level penalty (Eq. 6-14, Algorithm 1)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from .backends import check_backend
from .ops import PenaltyStats, penalty_adamw_many_, penalty_many_
from .update_in_backward import UpdateInBackward

# Bounds of one step of the steered lambda: a share read as 0 or 1 says only "far", and early ones are noisy.
_SHARE_FLOOR = 1e-6
_MAX_LOG_STEP = math.log(1000)

# Parameters below this size share a launch. A launch costs a few microseconds, in which a device that moves 3 TB/s
# updates some 2^20 scalars of 20 bytes; above it a parameter keeps the device busy by itself.
SMALL = 1 << 20


def steered_weight(weight: Tensor, measured_share: Tensor, wanted_share: float) -> Tensor:
    """The next lambda, from the share measured with this one; without a host read.

    The log-odds of the share grow about linearly with log lambda (slope 0.6 to 1 in the figures of the project's
    design notes), so moving log lambda by the difference in log-odds is close to a Newton step, and does not overshoot.

    Args:
        weight: lambda, > 0, with which the share was measured; 0-dim.
        measured_share, wanted_share: fractions of I- whose penalty gradient outweighs their loss gradient.
    """
    wanted = math.log(wanted_share / (1 - wanted_share))
    move = wanted - torch.logit(measured_share, eps=_SHARE_FLOOR)
    return weight * move.clamp(-_MAX_LOG_STEP, _MAX_LOG_STEP).exp()


class _PenalisedOptimizer(torch.optim.Optimizer):
    """What the two optimizers share: lambda and its steering, the checks, and the life of `param.target_grad`."""

    state_names: tuple[str, ...]
    _update: Callable[[dict, list[nn.Parameter]], PenaltyStats]  # one launch over these parameters

    def __init__(
        self,
        params: Iterable,
        defaults: dict,
        penalty_weight: float,
        penalty_share: float | None,
        backend: str,
        capturable: bool,
    ):
        if not (math.isfinite(penalty_weight) and penalty_weight >= 0):
            raise ValueError(f"penalty_weight={penalty_weight}; expected a finite number >= 0")
        if penalty_share is not None and not 0 < penalty_share < 1:
            raise ValueError(f"penalty_share={penalty_share}; expected a fraction between 0 and 1, or None")
        if penalty_share is not None and penalty_weight == 0:
            raise ValueError("penalty_weight=0 cannot be steered to a penalty_share; start from a positive one")
        self.backend, self.capturable = check_backend(backend), capturable
        self.last_stats: PenaltyStats | None = None
        self._last_weight: float | Tensor = penalty_weight
        super().__init__(params, {**defaults, "penalty_weight": penalty_weight, "penalty_share": penalty_share})

    @property
    def penalty_weight(self) -> float:
        """lambda of the first parameter group, as the next step will use it. Waits for the device if it is steered."""
        return float(self.param_groups[0]["penalty_weight"])

    @property
    def last_weight(self) -> float:
        """lambda of the first parameter group at the last step. Waits for the device if it is steered."""
        return float(self._last_weight)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear `param.grad` and `param.target_grad`."""
        super().zero_grad(set_to_none)
        for _, param in self._all_params():
            param.target_grad = None

    def load_state_dict(self, state_dict: dict) -> None:
        """As in torch, but states keep the type in which they were saved: torch would cast them to the parameter's."""
        super().load_state_dict(state_dict)
        saved_ids = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for saved_id, (_, param) in zip(saved_ids, self._all_params(), strict=True):
            saved = state_dict["state"].get(saved_id, {})
            for name in self.state_names:
                if name in saved:
                    self.state[param][name] = saved[name].to(param.device, copy=True)

    def _all_params(self) -> Iterable[tuple[dict, nn.Parameter]]:
        return ((group, param) for group in self.param_groups for param in group["params"])

    def _new_state(self, param: nn.Parameter) -> dict:
        step = torch.zeros((), dtype=torch.float64, device=param.device) if self.capturable else 0
        zeros = {
            name: torch.zeros_like(param, dtype=self._state_dtype(param), memory_format=torch.contiguous_format)
            for name in self.state_names
        }
        return {"step": step, **zeros}

    def _state_dtype(self, param: nn.Parameter) -> torch.dtype:
        return param.dtype

    def _update_all(self) -> None:
        """Update every parameter that has a gradient, then steer lambda."""
        pending = [(group, param) for group, param in self._all_params() if param.grad is not None]
        self.finish_step(self.update_params(pending), [param for _, param in pending])

    def update_params(self, pending: Sequence[tuple[dict, nn.Parameter]]) -> list[PenaltyStats]:
        """Update these parameters, and set their target gradients to None."""
        for _, param in pending:  # before anything is written
            if getattr(param, "target_grad", None) is None:
                raise ValueError(
                    f"a parameter of shape {list(param.shape)} has a grad but no target_grad; expected both from "
                    "handle.unlearning_loss(...).backward(): patch with scope='all', or leave it to another optimizer"
                )
        for group, param in pending:
            if group["penalty_share"] is not None:
                self._put_weight_on(group, param.device)
            if not self.state[param]:
                self.state[param].update(self._new_state(param))
            self.state[param]["step"] += 1
        parts = [self._update(group, params) for group, params in self._launches(pending)]
        for _, param in pending:
            # It belongs to this step alone: left behind, it would be counted again by the next backward.
            param.target_grad = None
        return parts

    def finish_step(self, parts: Sequence[PenaltyStats], updated: Sequence[nn.Parameter]) -> None:
        """Total the statistics of a step, and steer lambda by them."""
        self.last_stats = PenaltyStats.total(parts) if parts else None
        weight = self.param_groups[0]["penalty_weight"]
        self._last_weight = weight.clone() if isinstance(weight, Tensor) else weight
        if parts:
            self._steer(self.state[updated[0]]["step"])

    def _launches(self, pending: Sequence[tuple[dict, nn.Parameter]]) -> list[tuple[dict, list[nn.Parameter]]]:
        """Parameters that are updated together: a large one alone, small ones of like kind in one launch."""
        together: dict[tuple, tuple[dict, list[nn.Parameter]]] = {}
        for index, (group, param) in enumerate(pending):
            state = self.state[param]
            step = 0 if self.capturable else state["step"]
            kind = (id(group), step, param.dtype, param.grad.dtype, state["prev_attribution"].dtype, param.device)
            key = kind if param.numel() < SMALL else index
            together.setdefault(key, (group, []))[1].append(param)
        return list(together.values())

    def _states(self, params: list[nn.Parameter], name: str) -> list[Tensor]:
        return [self.state[param][name] for param in params]

    @staticmethod
    def _put_weight_on(group: dict, device: torch.device) -> None:
        weight = group["penalty_weight"]
        if not isinstance(weight, Tensor) or weight.device != device:
            group["penalty_weight"] = torch.as_tensor(weight, dtype=torch.float64).to(device)

    def _steer(self, step: int | Tensor) -> None:
        if not isinstance(step, Tensor) and step == 1:
            return  # the first step has no A_{t-1}, so its share says nothing
        for group in self.param_groups:
            if group["penalty_share"] is None or not isinstance(group["penalty_weight"], Tensor):
                continue
            weight = group["penalty_weight"]
            steered = steered_weight(weight, self.last_stats.share.to(weight.device), group["penalty_share"])
            # In place: a captured graph reads this tensor.
            weight.copy_(torch.where(step > 1, steered, weight) if isinstance(step, Tensor) else steered)


class SsiuuAdamW(_PenalisedOptimizer):
    """AdamW on `dJ = dL + lambda dR`, the penalty and the update in one pass over memory.

    Reads `param.grad` (`dL`) and `param.target_grad` (`gP`), as `PatchHandle.unlearning_loss` fills them. `step()` sets
    `target_grad` to None. `A_{t-1}`, the moments and the current lambda are in `state_dict()`.

    Args:
        params: parameters or parameter groups.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`; lr may be a 0-dim tensor.
        penalty_weight: lambda, or where the steered lambda starts. The paper's is 1e-3 (FaithUn) or 1e-4 (TOFU), but
            it is no portable number.
        penalty_share: of the scalars in I-, the fraction whose penalty gradient should outweigh their loss gradient;
            lambda is then steered towards it from step to step, on the device. None keeps lambda fixed.
        state_dtype: of `A_{t-1}` and the moments; None: the parameter's.
        stochastic_rounding: round the bfloat16 tensors that a step writes, parameters and states, at random so that
            their mean is kept. Deterministic by seed and step.
        seed: of the stochastic rounding.
        capturable: step and lambda live on the device, so that `step()` can be captured in a CUDA graph and replayed.
            Every parameter then has a gradient at every step, or at none.
        update_in_backward: update a parameter as soon as its two gradients are complete, during `backward()`, and free
            them, so that the gradients of no more than two layers exist at once (`update_in_backward.py`). `step()`
            then updates what is left, the small parameters, and steers lambda. Every backward is followed by one.
        backend: backend of the ops.

    Attributes:
        last_stats: `PenaltyStats` of the last step, all parameters together.
        last_weight: lambda of the last step; `penalty_weight` is that of the next.

    Raises:
        ValueError: options out of range.
    """

    state_names = ("prev_attribution", "exp_avg", "exp_avg_sq")

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
    ):
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not isinstance(value, Tensor) and value < 0:
                raise ValueError(f"{name}={value}; expected a number >= 0")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas}; expected two numbers in [0, 1)")
        if state_dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(f"state_dtype={state_dtype}; expected torch.float32, torch.bfloat16 or None")
        self.state_dtype, self.stochastic_rounding, self.seed = state_dtype, stochastic_rounding, seed
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, penalty_weight, penalty_share, backend, capturable)
        self._in_backward = UpdateInBackward(self) if update_in_backward else None

    def add_param_group(self, param_group: dict) -> None:
        """As in torch; refused once parameters are updated in backward."""
        if getattr(self, "_in_backward", None) is not None:
            raise ValueError("update_in_backward=True fixes the parameters; make another optimizer for new ones")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step of Algorithm 1.

        Args:
            closure: recomputes and returns the loss, as in `torch.optim.Optimizer.step`.

        Raises:
            ValueError: a parameter with a `grad` but no `target_grad`, nothing is changed then; update_in_backward
                and a gradient that was changed since the backward (clipped, say).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._in_backward is None:
            self._update_all()
        else:
            self._in_backward.finish()
        return loss

    def _state_dtype(self, param: nn.Parameter) -> torch.dtype:
        return self.state_dtype or param.dtype

    def _update(self, group: dict, params: list[nn.Parameter]) -> PenaltyStats:
        return penalty_adamw_many_(
            params,
            [param.grad.contiguous() for param in params],
            [param.target_grad.contiguous() for param in params],
            *(self._states(params, name) for name in self.state_names),
            step=self.state[params[0]]["step"],
            weight=group["penalty_weight"],
            seeds=self._seeds(params) if self.stochastic_rounding else None,
            backend=self.backend,
            **{name: group[name] for name in ("lr", "betas", "eps", "weight_decay")},
        )

    def _seeds(self, params: list[nn.Parameter]) -> list[int]:
        """One for each parameter, by its place among all: two of them share no draws, in whatever launch they are."""
        place = {param: index for index, (_, param) in enumerate(self._all_params())}
        return [self.seed * 1_000_003 + place[param] for param in params]


class SsiuuPenalty(_PenalisedOptimizer):
    """The penalty alone, to stand before any optimizer's step: `penalty.apply_(); optimizer.step()`.

    Args:
        params, penalty_weight, penalty_share, backend: as in `SsiuuAdamW`.

    Attributes:
        last_stats: `PenaltyStats` of the last call, all parameters together.
    """

    state_names = ("prev_attribution",)

    def __init__(
        self,
        params: Iterable,
        penalty_weight: float = 1e-3,
        penalty_share: float | None = None,
        backend: str = "auto",
    ):
        super().__init__(params, {}, penalty_weight, penalty_share, backend, capturable=False)

    @torch.no_grad()
    def apply_(self) -> PenaltyStats | None:
        """Add the penalty's gradient to every `param.grad`, and set `param.target_grad` to None.

        Returns:
            `PenaltyStats` of all parameters together; None where no parameter has a gradient.

        Raises:
            ValueError: a parameter with a `grad` but no `target_grad`; nothing is changed then.
        """
        self._update_all()
        return self.last_stats

    def _update(self, group: dict, params: list[nn.Parameter]) -> PenaltyStats:
        grads = [param.grad.contiguous() for param in params]
        stats = penalty_many_(
            grads,
            params,
            [param.target_grad.contiguous() for param in params],
            self._states(params, "prev_attribution"),
            weight=group["penalty_weight"],
            step=self.state[params[0]]["step"],
            backend=self.backend,
        )
        for param, grad in zip(params, grads, strict=True):
            if grad is not param.grad:
                param.grad.copy_(grad)
        return stats
