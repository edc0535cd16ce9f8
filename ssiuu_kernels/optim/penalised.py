"""What the two optimizers share: the life of a step, of its states, of lambda and of `param.target_grad`."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..distributed import refuse_more_processes
from ..gradients.target_grad import changed_since_backward, drop_target_grad, has_empty_sum
from ..ops import PenaltyStats
from ..ops.backends import check_backend
from ..ops.penalty import check_launch
from ..ops.penalty.scalars import StepScalars, step_scalars
from .param_groups import (
    ORIGINAL,
    check_anchor_values,
    check_gradients,
    check_group,
    check_params,
    check_saved_anchor,
    check_saved_state,
)
from .steering import next_weight

logger = logging.getLogger(__name__)

# Parameters below this size share a launch. A launch costs a few microseconds, in which a device that moves 3 TB/s
# updates some 2^20 scalars of 20 bytes; above it a parameter keeps the device busy by itself.
SMALL = 1 << 20


class Part(NamedTuple):
    """What one launch of a step left.

    Attributes:
        group: of its parameters.
        stats: of them together.
        compared: whether their attributions were compared with others, so that the share says something.
    """

    group: dict
    stats: PenaltyStats
    compared: bool


class _Launch(NamedTuple):
    """Parameters that are updated together.

    Attributes:
        group: of the parameters.
        penalised: whether they have a target gradient; otherwise plain AdamW updates them, and A_{t-1} stays.
        anchored: whether they had a state before this step, and in it attributions to compare with.
    """

    group: dict
    params: list[nn.Parameter]
    penalised: bool
    anchored: bool


class PenalisedOptimizer(torch.optim.Optimizer):
    """Checks everything, then updates parameters launch by launch, then steers lambda."""

    state_names: tuple[str, ...]
    op: str  # that updates, by its name among `ops.penalty.WRITES`
    options: tuple[str, ...] = ("backend", "capturable", "last_stats", "_last_weight")  # that a copy keeps
    updates_without_target = False  # where the batches had no forget sample
    _warned = False
    _tensors: Callable[[list[nn.Parameter]], dict[str, list[Tensor]]]  # of these parameters, as the op takes them
    _run: Callable[[list[nn.Parameter], dict[str, list[Tensor]], StepScalars], PenaltyStats]  # one launch

    def __init__(
        self,
        params: Iterable,
        defaults: dict,
        penalty_weight: float,
        penalty_share: float | None,
        anchor: str,
        backend: str,
        capturable: bool,
    ):
        self.backend, self.capturable = check_backend(backend), capturable
        self.last_stats: PenaltyStats | None = None
        self._last_weight: float | Tensor = penalty_weight
        self._known_scalars: dict[tuple, StepScalars] = {}
        own = {"penalty_weight": penalty_weight, "penalty_share": penalty_share, "anchor": anchor}
        super().__init__(params, {**defaults, **own})

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
            drop_target_grad(param)

    def add_param_group(self, param_group: dict) -> None:
        """As in torch; options out of range and parameters that cannot be updated are refused."""
        if isinstance(param_group, dict):
            check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        try:
            check_params(self.param_groups[-1]["params"])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def set_anchor(self, values: Mapping[nn.Parameter, Tensor]) -> None:
        """Set the attributions that the next step compares its own with, at the first step too.

        For example, with mini-batches: the original model's attributions, summed over the facts of the next batch. With
        anchor="previous" the next step replaces them; with anchor="original" they stay until they are set again.
        Parameters that are not named keep theirs. Synchronizes with the host, which checks the values.

        Args:
            values: parameter -> its attributions, shaped like it, of any floating type and on any device; copied.

        Raises:
            ValueError: a key that is not a parameter of this optimizer; values of another shape, or that are not finite
                in the type of the states. Nothing is changed then.
            TypeError: not a mapping, or a value that is not a floating tensor.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"values is a {type(values).__name__}; expected a mapping from parameters to attributions")
        places = {id(param): index for index, (_, param) in enumerate(self._all_params())}
        for param, value in values.items():
            if id(param) not in places:
                raise ValueError(
                    f"a key of values, a {type(param).__name__} of shape {list(getattr(param, 'shape', ()))}, is not a "
                    "parameter of this optimizer; expected the parameters that it was made with"
                )
            known = self.state[param].get("prev_attribution") if param in self.state else None
            dtype = self._state_dtype(param) if known is None else known.dtype
            check_anchor_values(f"the anchor of parameter {places[id(param)]}", value, param, dtype)
        for param, value in values.items():
            self._complete_state(param)["prev_attribution"].copy_(value)

    def load_state_dict(self, state_dict: dict) -> None:
        """As in torch, but states keep the type in which they were saved: torch would cast them to the parameter's.

        The state of a `torch.optim.AdamW` works too: group options that it lacks stay as they are here, and `A_{t-1}`
        is unknown, so that the next step measures A and penalises nothing.

        Raises:
            ValueError: options out of range, or that would change the update (maximize, amsgrad); a state that is of
                another optimizer, shape or anchor. Nothing is changed then.
        """
        groups = []
        for own, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            groups.append({**own, **saved})
            check_group(groups[-1])
            check_group({**groups[-1], "penalty_weight": float(groups[-1]["penalty_weight"])})
            check_saved_anchor(saved, [state_dict["state"].get(i, {}) for i in saved["params"]], own["anchor"])
        groups += state_dict["param_groups"][len(groups) :]  # torch refuses them
        state_dict = {**state_dict, "param_groups": groups}
        params = [param for _, param in self._all_params()]
        saved_ids = list(itertools.chain.from_iterable(group["params"] for group in groups))
        states = {param: state_dict["state"].get(i) for param, i in zip(params, saved_ids, strict=False)}
        for param, saved in states.items():
            if saved:
                check_saved_state(saved, self.state_names, param)
        super().load_state_dict(state_dict)
        for param, saved in states.items():
            if saved:
                self.state[param] = self._loaded_state(param, saved)

    def _loaded_state(self, param: nn.Parameter, saved: dict) -> dict:
        state = {"step": self._step_count(param, saved["step"])}
        for name in self.state_names:
            state[name] = saved[name].to(param.device, copy=True) if name in saved else self._new_tensor(param, name)
        return state

    def _step_count(self, param: nn.Parameter, step: float | Tensor) -> int | Tensor:
        if self.capturable:
            return torch.as_tensor(step).to(param.device, torch.float64, copy=True)
        return int(step)

    def __getstate__(self) -> dict:
        """What a copy or a pickle keeps: torch's part, and the options."""
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self.options}}

    def _all_params(self) -> Iterable[tuple[dict, nn.Parameter]]:
        return ((group, param) for group in self.param_groups for param in group["params"])

    def _new_state(self, param: nn.Parameter) -> dict:
        return {
            "step": self._step_count(param, 0),
            **{name: self._new_tensor(param, name) for name in self.state_names},
        }

    def _new_tensor(self, param: nn.Parameter, name: str) -> Tensor:
        # NaN: A was never measured.
        value = float("nan") if name == "prev_attribution" else 0.0
        return torch.full_like(
            param, value, dtype=self._state_dtype(param), memory_format=torch.contiguous_format, requires_grad=False
        )

    def _state_dtype(self, param: nn.Parameter) -> torch.dtype:
        # The squares of ordinary gradients, and attributions, are 0 in float16, and the next step would divide by eps.
        return torch.float32 if param.dtype == torch.float16 else param.dtype

    def check_before_update(self) -> None:
        """Check what does not depend on the gradients, before the first update of a step."""
        refuse_more_processes()
        self._known_scalars = {}
        for group in self.param_groups:
            check_group(group)

    def update_all(self) -> None:
        """Update every parameter that has a gradient, then steer lambda."""
        self.check_before_update()
        pending = []
        for group, param in self._all_params():
            if param.grad is not None:
                pending.append((group, param))
            elif getattr(param, "target_grad", None) is not None:
                drop_target_grad(param)  # without a grad it is part of no step
        self._warn_of_changed_gradients([param for _, param in pending])
        self.finish_step(self.update_params(pending))

    def _warn_of_changed_gradients(self, params: Sequence[nn.Parameter]) -> None:
        if self._warned or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            return
        if changed_since_backward(params):
            self._warned = True
            logger.warning(
                "gradients were changed between the unlearning loss's backward and the step (by clip_grad_norm_, say): "
                "that scales dL and not the penalty, and so changes the balance between them. Do not clip; with "
                "transformers' Trainer set TrainingArguments(max_grad_norm=0.0)"
            )

    def update_params(self, pending: Sequence[tuple[dict, nn.Parameter]]) -> list[Part]:
        """Update these parameters, and drop their target gradients. All is checked before anything is written."""
        anchored = {param for _, param in pending if self.state.get(param)}
        pending = [(group, param) for group, param in pending if self._is_updated(group, param)]
        launches = self._launches(pending, anchored)
        tensors = [self._checked_tensors(launch) for launch in launches]
        for group, param in pending:
            if group["penalty_share"] is not None:
                self._put_weight_on(group, param.device)
            self.state[param]["step"] += 1
        parts = [self._update(launch, of_launch) for launch, of_launch in zip(launches, tensors, strict=True)]
        for _, param in pending:
            # It belongs to this step alone: left behind, it would be counted again by the next backward.
            drop_target_grad(param)
        return parts

    def _is_updated(self, group: dict, param: nn.Parameter) -> bool:
        """Whether there is something to do; a ValueError where it cannot be done. Makes a new parameter's state."""
        check_gradients(param)
        if getattr(param, "target_grad", None) is None:
            # torch.distributed.checkpoint makes the states of a fresh optimizer by a step of lr 0 on zero gradients.
            if not has_empty_sum(param) and not ("lr" in group and float(group["lr"]) == 0):
                raise ValueError(
                    f"a parameter of shape {list(param.shape)} has a grad but no target_grad; expected both from "
                    "handle.unlearning_loss(...).backward() before every step: patch with scope='all', or leave the "
                    "parameter to another optimizer"
                )
            if not self.updates_without_target:
                drop_target_grad(param)
                return False
        self._complete_state(param)
        return True

    def _complete_state(self, param: nn.Parameter) -> dict:
        """The state of a parameter, with what is new in it."""
        state = self.state[param]
        if not state:
            state.update(self._new_state(param))
        else:
            check_saved_state(state, self.state_names, param)
            if "prev_attribution" not in state:
                state["prev_attribution"] = self._new_tensor(param, "prev_attribution")
        return state

    def _launches(
        self, pending: Sequence[tuple[dict, nn.Parameter]], anchored: Collection[nn.Parameter]
    ) -> list[_Launch]:
        """Parameters that are updated together: a large one alone, small ones of like kind in one launch."""
        together: dict[tuple | int, _Launch] = {}
        for index, (group, param) in enumerate(pending):
            state, penalised = self.state[param], getattr(param, "target_grad", None) is not None
            step = 0 if self.capturable else state["step"]
            types = (param.dtype, param.grad.dtype, state["prev_attribution"].dtype)
            alike = (id(group), step, penalised, param in anchored, *types, param.device)
            launch = _Launch(group, [], penalised, param in anchored)
            together.setdefault(alike if param.numel() < SMALL else index, launch).params.append(param)
        return list(together.values())

    def _checked_tensors(self, launch: _Launch) -> dict[str, list[Tensor]]:
        for param in launch.params:
            if not param.grad.is_contiguous():
                param.grad.data = param.grad.contiguous()
            if launch.penalised:
                param.target_grad = param.target_grad.contiguous()
        tensors = self._tensors(launch.params)
        if not launch.penalised:
            tensors["target_grad"] = tensors["grad"]  # only read, and replaced for the launch
        check_launch(self.op, tensors, self.backend)
        return tensors

    def _update(self, launch: _Launch, tensors: dict[str, list[Tensor]]) -> Part:
        group, params = launch.group, launch.params
        if not launch.penalised:
            # A is 0 everywhere, and is not kept.
            for name in ("target_grad", "prev_attribution"):
                tensors[name] = [torch.zeros_like(tensor) for tensor in tensors[name]]
        stats = self._run(params, tensors, self._scalars_once(group, params[0]))
        return Part(group, stats, launch.penalised and launch.anchored)

    def _scalars(self, group: dict, param: nn.Parameter, **adamw) -> StepScalars:
        """Of the step that a parameter of this group is at. NaN says what was never measured, at step 1 too."""
        step, keep_anchor = self.state[param]["step"], group["anchor"] == ORIGINAL
        weight = group["penalty_weight"]
        return step_scalars(step, weight, param.device, **adamw, keep_anchor=keep_anchor, anchored=True)

    def _scalars_once(self, group: dict, param: nn.Parameter) -> StepScalars:
        """Those of a step are derived once for all parameters of a group that are at it: on a device that is a dozen
        launches."""
        step = self.state[param]["step"]
        if isinstance(step, Tensor):
            return self._scalars(group, param)
        key = (id(group), step, param.device)
        if key not in self._known_scalars:
            self._known_scalars[key] = self._scalars(group, param)
        return self._known_scalars[key]

    def finish_step(self, parts: Sequence[Part]) -> None:
        """Total the statistics of a step, and steer each group's lambda by its own."""
        self.last_stats = PenaltyStats.total([part.stats for part in parts]) if parts else None
        weight = self.param_groups[0]["penalty_weight"]
        self._last_weight = weight.clone() if isinstance(weight, Tensor) else weight
        for group in self.param_groups:
            own = [part.stats for part in parts if part.compared and part.group is group]
            if group["penalty_share"] is not None and own:
                stats = self.last_stats if len(own) == len(parts) else PenaltyStats.total(own)
                weight = group["penalty_weight"]
                stats = PenaltyStats(*(value.to(weight.device) for value in stats))
                # In place: a captured graph reads this tensor.
                weight.copy_(next_weight(weight, stats, group["penalty_share"]))

    def _states(self, params: list[nn.Parameter], name: str) -> list[Tensor]:
        return [self.state[param][name] for param in params]

    @staticmethod
    def _put_weight_on(group: dict, device: torch.device) -> None:
        weight = group["penalty_weight"]
        if not isinstance(weight, Tensor) or weight.device != device:
            group["penalty_weight"] = torch.as_tensor(weight, dtype=torch.float64).to(device)
