"""The activations of gated and ungated MLPs and their derivatives, in plain PyTorch.

The native counterpart is csrc/include/ssiuu/activation.h; `CODES` is the order that both share.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Activation(NamedTuple):
    """`value(x)` and `gradient(x, grad)`, which is `grad * act'(x)`; elementwise.

    Where x <= 0 the gradient of a rectifier is 0 whatever `grad` is, infinity and NaN included, as in PyTorch.
    """

    value: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]


def _silu_derivative(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))


def _gelu_derivative(x: Tensor) -> Tensor:
    return _normal_cdf(x) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


_TANH_SCALE, _TANH_CUBE = math.sqrt(2 / math.pi), 0.044715


def _gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(_TANH_SCALE * (x + _TANH_CUBE * x * x * x)))


def _gelu_tanh_derivative(x: Tensor) -> Tensor:
    t = torch.tanh(_TANH_SCALE * (x + _TANH_CUBE * x * x * x))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * _TANH_SCALE * (1 + 3 * _TANH_CUBE * x * x)


def _relu_squared_gradient(x: Tensor, grad: Tensor) -> Tensor:
    return (2 * x * grad).masked_fill_(x <= 0, 0)


ACTIVATIONS = {
    "silu": Activation(lambda x: x * torch.sigmoid(x), lambda x, grad: grad * _silu_derivative(x)),
    "gelu": Activation(lambda x: x * _normal_cdf(x), lambda x, grad: grad * _gelu_derivative(x)),
    "gelu_tanh": Activation(_gelu_tanh, lambda x, grad: grad * _gelu_tanh_derivative(x)),
    "relu": Activation(torch.relu, lambda x, grad: grad.masked_fill(x <= 0, 0)),
    "relu_squared": Activation(lambda x: torch.relu(x).square(), _relu_squared_gradient),
}
CODES = {name: code for code, name in enumerate(ACTIVATIONS)}


def check_activation(activation: str) -> str:
    """`activation` if it is known; a ValueError that lists the names otherwise."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is unknown; expected one of {', '.join(ACTIVATIONS)}")
    return activation


def recognise(function: Callable[[Tensor], Tensor]) -> str | None:
    """The name of the activation that `function` computes, found by its values, or None.

    Libraries have many classes for one activation; their values on a float64 grid tell more than their names. The grid
    separates the erf and tanh forms of GELU, which differ by up to 5e-4, and its large values those that clip.
    """
    fine = torch.linspace(-6, 6, 97, dtype=torch.float64, device="cpu")
    grid = torch.cat([fine, 5 * fine, 200 * fine])
    try:
        with torch.no_grad():
            values = function(grid)
    except Exception:  # a module that refuses a plain float64 vector is not one of our elementwise activations
        return None
    if not isinstance(values, Tensor) or values.shape != grid.shape:
        return None
    for name, activation in ACTIVATIONS.items():
        # 1e-6 leaves room for functions that compute in float32 whatever they are given.
        if torch.allclose(values.double(), activation.value(grid), rtol=1e-6, atol=1e-6):
            return name
    return None
