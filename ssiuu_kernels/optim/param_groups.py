"""Checks of an optimizer's parameter groups and of the states that it is given, before anything is written."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops.common.checks import check_float
from ..ops.common.precision import LARGEST
from ..ops.penalty.scalars import check_scalars

# Options of other optimizers' groups that would change the update, and their values that do not. Others (foreach,
# fused, a scheduler's initial_lr) are ignored.
_FOREIGN = {"maximize": False, "amsgrad": False, "differentiable": False, "decoupled_weight_decay": True}

PREVIOUS, ORIGINAL = ANCHORS = ("previous", "original")  # A of the step before, or A as it was measured first


def host_value(value: float | Tensor) -> float | Tensor:
    """The number in a tensor on the CPU; one on an accelerator stays there, since reading it would wait for it."""
    return value.item() if isinstance(value, Tensor) and value.device.type == "cpu" else value


def check_group(group: dict) -> None:
    """The options of a group are in their ranges; a ValueError that names the one that is not."""
    for name, harmless in _FOREIGN.items():
        if group.get(name, harmless) != harmless:
            raise ValueError(f"{name}={group[name]} in a parameter group is not supported; expected {harmless}")
    for name in ("penalty_weight", "lr"):
        value = group.get(name)
        if isinstance(value, Tensor) and value.dim():
            raise ValueError(f"{name} has shape {list(value.shape)}; expected a number or a 0-dim tensor")
    weight, share = host_value(group["penalty_weight"]), group["penalty_share"]
    if not isinstance(weight, Tensor) and not 0 <= weight <= LARGEST:
        raise ValueError(f"penalty_weight={weight}; expected a finite number from 0 to {LARGEST:g}")
    if share is not None and not 0 < share < 1:
        raise ValueError(f"penalty_share={share}; expected a fraction between 0 and 1, or None")
    if share is not None and not isinstance(weight, Tensor) and weight == 0:
        raise ValueError("penalty_weight=0 cannot be steered to a penalty_share; start from a positive one")
    if group["anchor"] not in ANCHORS:
        raise ValueError(f"anchor={group['anchor']!r}; expected one of {', '.join(ANCHORS)}")
    if "lr" in group:
        check_scalars(1, 0.0, host_value(group["lr"]), group["betas"], group["eps"], group["weight_decay"])


def check_params(params: Sequence[nn.Parameter]) -> None:
    """The parameters of a group can be updated. Frozen ones may be of any type: nothing is done to them."""
    if len({id(param) for param in params}) < len(params):
        raise ValueError("a parameter is in its group twice, and would be updated twice; expected each once")
    for index, param in enumerate(params):
        if not param.requires_grad:
            continue
        check_float(f"parameter {index}", param)
        if param.layout != torch.strided or not param.is_contiguous():
            raise ValueError(
                f"parameter {index} of shape {list(param.shape)} is not contiguous; the update in place needs it so: "
                "set param.data = param.data.contiguous() first"
            )


def check_gradients(param: nn.Parameter) -> None:
    """The gradients of a parameter that is about to be updated are of a kind that the kernels take."""
    for name in ("grad", "target_grad"):
        grad = getattr(param, name, None)
        if grad is not None and grad.layout != torch.strided:
            raise ValueError(
                f"the {name} of a parameter of shape {list(param.shape)} is sparse; expected a dense one: "
                "make the embedding with sparse=False"
            )


def check_saved_state(saved: dict, names: Sequence[str], param: nn.Parameter) -> None:
    """A saved state fits its parameter. `prev_attribution` may be missing: other optimizers measure none."""
    missing = [name for name in ("step", *names) if name not in saved and name != "prev_attribution"]
    if missing:
        raise ValueError(
            f"the state of a parameter of shape {list(param.shape)} has {', '.join(saved)} and no {missing[0]}; "
            "expected the state_dict of SsiuuAdamW or torch.optim.AdamW"
        )
    for name in names:
        if name in saved and saved[name].shape != param.shape:
            raise ValueError(
                f"{name} in the state_dict has shape {list(saved[name].shape)}; expected its parameter's, "
                f"{list(param.shape)}"
            )


def check_saved_anchor(saved: dict, states: Sequence[dict], anchor: str) -> None:
    """The `prev_attribution` of a saved group was kept by the rule of `anchor`. Version 0.1.0 had "previous" alone."""
    unnamed = PREVIOUS if any("prev_attribution" in state for state in states) else anchor
    if saved.get("anchor", unnamed) != anchor:
        raise ValueError(
            f"the state_dict has attributions of anchor={saved.get('anchor', unnamed)!r} and this optimizer has "
            f"anchor={anchor!r}; make the optimizer with the anchor that its state_dict was saved with"
        )


def check_anchor_values(name: str, value: Tensor, param: nn.Parameter, dtype: torch.dtype) -> None:
    """`value` can be a parameter's `prev_attribution`, of type `dtype`."""
    check_float(name, value)
    if value.shape != param.shape:
        raise ValueError(f"{name} has shape {list(value.shape)}; expected its parameter's, {list(param.shape)}")
    if not bool(value.to(dtype).isfinite().all()):
        raise ValueError(f"{name} is not finite in {dtype}, the type of its state; expected finite attributions")
