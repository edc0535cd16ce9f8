"""What a module is, judged by its parts and by what it computes, never by its class name. Imports no transformers."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import nn

from .ops.activations import ACTIVATIONS, recognise

GATED_MLP = ("gate_proj", "up_proj", "down_proj")
ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}


class UnsupportedModuleError(Exception):
    """Why a module that looks like one of ours cannot be patched."""


def gated_mlps(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of everything in `model` that has a gate, an up and a down projection."""
    for name, module in model.named_modules():
        if all(isinstance(getattr(module, part, None), nn.Module) for part in GATED_MLP):
            yield name, module


def attentions(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every attention with separate Q, K, V and O projections."""
    for name, module in model.named_modules():
        if all(isinstance(getattr(module, part, None), nn.Module) for part in ATTENTION.values()):
            yield name, module


def gated_activation(module: nn.Module) -> str:
    """The activation of a gated MLP that computes `down(act(gate(x)) * up(x))`.

    Raises:
        UnsupportedModuleError: it computes something else, or cannot be replaced without being noticed.
    """
    for part in GATED_MLP:
        # A subclass may be a quantised or an adapted layer, whose weight means something else.
        if type(getattr(module, part)) is not nn.Linear:
            raise UnsupportedModuleError(
                f"{part} is a {type(getattr(module, part)).__name__}; expected torch.nn.Linear"
            )
    if "forward" in vars(module):
        raise UnsupportedModuleError("its forward was already replaced by another library")
    act_fn = getattr(module, "act_fn", None)
    if not callable(act_fn):
        raise UnsupportedModuleError("it has no act_fn")
    if any(getattr(act_fn, hooks, None) for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")):
        raise UnsupportedModuleError("act_fn carries hooks, which the fused activation would not call")
    activation = recognise(act_fn)
    if activation is None:
        raise UnsupportedModuleError(f"act_fn {type(act_fn).__name__} is none of {', '.join(ACTIVATIONS)}")
    if not _computes_gated_mlp(module, activation):
        raise UnsupportedModuleError(f"{type(module).__name__}.forward does not compute down(act(gate(x)) * up(x))")
    return activation


def _computes_gated_mlp(module: nn.Module, activation: str) -> bool:
    """Whether the class's own forward, run on a tiny twin of the module, gives the gated MLP's value.

    The twin shares everything with the module but its three projections, so it costs nothing, fires no hook of the
    user's and draws nothing from the global random generator.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = {"gate_proj": (4, 8), "up_proj": (4, 8), "down_proj": (8, 4)}
    tiny = {name: nn.utils.skip_init(nn.Linear, *size, dtype=torch.float64) for name, size in sizes.items()}
    for linear in tiny.values():
        for parameter in linear.parameters():
            parameter.data.normal_(generator=generator)
    twin = copy.copy(module)
    twin._modules = {**module._modules, **tiny}
    x = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        hidden = ACTIVATIONS[activation].value(tiny["gate_proj"](x)) * tiny["up_proj"](x)
        try:
            return torch.allclose(type(module).forward(twin, x), tiny["down_proj"](hidden), rtol=1e-4, atol=1e-5)
        except Exception:  # a forward with other arguments, or one that reads sizes, is not the plain gated MLP
            return False
